"""The jitted program that scores images with Inception over the mesh.

Only sums leave the devices and, for precision, recall and KID, the pool3 features.
Definitions: openai/guided-diffusion, evaluations/evaluator.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import require
from rar_jax.errors import ConfigError
from rar_jax.evaluation.chunks import Chunk, ChunkStore, accumulate_chunks
from rar_jax.evaluation.image_batches import ImageBatches, require_finite_images, row_sharding
from rar_jax.evaluation.reference import Reference, read_reference
from rar_jax.metrics import sums
from rar_jax.metrics.features import extract_features
from rar_jax.metrics.inception_score import SPLIT_SIZE
from rar_jax.metrics.sums import ScoreTotals, Shift
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import replicated, sharded
from rar_jax.runs.bucket import Path
from rar_jax.runs.machine import versions
from rar_jax.runs.manifest import file_sha256
from rar_jax.sampling import ROUNDINGS
from rar_jax.weights import inception

PROTOCOLS = {"adm": "tf1", "pytorch_fid": "pytorch_fid"}  # and their resize


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are scored. All of it but batch_size and chunk changes the number.

    protocol: "adm" or "pytorch_fid". rounding: of samples to uint8, "truncate" (RAR's code) or "round".
    features: dtype of Inception and the sums, "float32" or, to see what float32 costs, "float64" (not on TPUs).
    chunk: images between two saves; it divides a split of the Inception Score.
    neighbours: precision, recall and KID too, where the reference has images.
    """

    protocol: str = "adm"
    rounding: str = "truncate"
    features: str = "float32"
    seed: int = 0
    batch_size: int = 64
    chunk: int = 1000
    split_size: int = SPLIT_SIZE
    neighbours: bool = True

    def __post_init__(self) -> None:
        require(self.protocol in PROTOCOLS, f"protocol is '{self.protocol}': it must be adm or pytorch_fid")
        require(self.rounding in ROUNDINGS, f"rounding is '{self.rounding}': it must be truncate or round")
        dtypes = "float32", "float64"
        require(self.features in dtypes, f"features is '{self.features}': it must be float32 or float64")
        require(0 <= self.seed < 2**32, f"seed is {self.seed}: it must be in 0..4294967295 (uint32)")
        for name in ("batch_size", "chunk"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        divides = self.split_size % self.chunk == 0
        require(divides, f"chunk is {self.chunk}: it must divide {self.split_size}, a split of the Inception Score")


@dataclasses.dataclass(frozen=True)
class Network:
    """Inception's parameters, replicated on the mesh, and the sha256 of their file."""

    params: Any
    sha256: str


def open_program(
    inception_path: pathlib.Path,
    settings: Settings,
    *,
    reference_path: pathlib.Path | None = None,
    tensor: int = 1,
    chunks: Path | None = None,
) -> Program:
    """Load what samples or images are scored with, over all devices.

    Args:
      tensor: devices that share one copy of the generator.
      chunks: where finished chunks are stored; by default beside the results.

    Raises: ConfigError, ReferenceFileError; WeightsError that says where to get Inception's weights.
    """
    mesh = make_mesh(MeshConfig(tensor=tensor))
    reference = read_reference(reference_path) if reference_path else None
    return Program(load_inception(inception_path, mesh, settings), mesh, settings, reference, chunks=chunks)


def load_inception(path: pathlib.Path, mesh: Mesh, settings: Settings) -> Network:
    """Load Inception's weights on every device."""
    with jax.enable_x64(settings.features == "float64"):
        params = put_on_mesh(inception.load(path, dtype=settings.features), replicated(mesh))
    return Network(params, file_sha256(path))


class Program:
    """The jitted program of one mesh: a scan over the batches of a chunk.

    Sums are taken about `shift`, by default the means of the reference. JAX is in float64 mode around a program of
    float64 features, and out of it where images are made. Raises: ConfigError for a reference of another protocol.
    """

    def __init__(
        self,
        network: Network,
        mesh: Mesh,
        settings: Settings,
        reference: Reference | None,
        shift: Shift | None = None,
        *,
        chunks: Path | None = None,
    ) -> None:
        self.network: Network = network
        self.mesh: Mesh = mesh
        self.settings: Settings = settings
        self.reference: Reference | None = reference
        self.chunks: Path | None = chunks
        if reference is not None and reference.protocol not in (None, settings.protocol):
            theirs = f"{reference.path} was made with protocol {reference.protocol}"
            raise ConfigError(f"{theirs}, not {settings.protocol}: they do not compare")
        mean, spatial_mean = shift or ((reference.mean, reference.spatial_mean) if reference else (None, None))
        zeros = Shift(np.zeros(sums.POOL3), np.zeros(sums.SPATIAL))
        pairs = zip((mean, spatial_mean), zeros, strict=True)
        self.shift: Shift = Shift(*(np.asarray(zero if x is None else x, np.float32) for x, zero in pairs))
        self._dtype = np.dtype(settings.features)
        self._jitted = jax.jit(self._scan, static_argnames=("make", "keep"), out_shardings=replicated(mesh))

    def _scan(self, params: Any, rows: Any, weights_sb: Any, *, make: Any, keep: tuple[str, ...]) -> Chunk:
        def add_batch(total: sums.Sums, batch: Any) -> tuple[sums.Sums, Any]:
            rows, weights_b = batch
            with jax.enable_x64(False):
                made = make(params["images"], rows)
            out = extract_features(params["inception"], made["images"], resize=PROTOCOLS[self.settings.protocol])
            made = {**made, "pool3": out["pool3"]}
            total = sums.update_sums(total, out, weights_b, params["shift"], made.get("nonfinite", 0))
            return total, {name: made[name] for name in keep}

        return Chunk(*jax.lax.scan(add_batch, sums.init_sums(self._dtype), (rows, weights_sb)))

    @functools.cached_property
    def _placed_shift(self) -> Shift:
        return put_on_mesh(self.shift, replicated(self.mesh))

    def score(self, batches: ImageBatches, start: int, count: int, keep: tuple[str, ...] = ()) -> Chunk:
        """Return sums of images from `start` on, and the arrays named in `keep`.

        Raises: DeviceMemoryError if a device has too little memory.
        """
        size = self.settings.batch_size
        rows, weights_sb = batches.read_rows(start, count, size, self.mesh)
        with sharded(self.mesh), self._mode(), memory.exhaustion(f"scoring, batch_size {size}", "make it smaller"):
            placed = put_on_mesh((rows, weights_sb), row_sharding(self.mesh))
            params = self._params(batches, self._placed_shift)
            chunk = jax.device_get(self._jitted(params, *placed, make=batches.make, keep=keep))
        kept = {name: x.reshape(-1, *x.shape[2:])[:count] for name, x in chunk.kept.items()}
        return Chunk(chunk.sums, kept)

    def lower(self, batches: ImageBatches) -> jax.stages.Lowered:
        """Lower what `score` runs for one batch; parameters may be ShapeDtypeStructs."""
        rows = _make_abstract(batches.read_rows(0, 1, self.settings.batch_size, self.mesh), row_sharding(self.mesh))
        shift = _make_abstract(self.shift, replicated(self.mesh))
        with sharded(self.mesh), self._mode():
            return self._jitted.lower(self._params(batches, shift), *rows, make=batches.make, keep=())

    def accumulate(
        self, batches: ImageBatches, out: pathlib.Path, *, keep: tuple[str, ...] = (), description: str, quiet: bool
    ) -> tuple[ScoreTotals, ChunkStore]:
        """Score all images in chunks, and resume after the last finished chunk in `self.chunks`, by default `out`.

        Raises: NonFiniteError at the end, with the number of images.
        """
        shift = hashlib.sha256(b"".join(x.tobytes() for x in self.shift)).hexdigest()
        made_from = {**self.describe_inputs(batches), **self.describe_execution(), "shift_sha256": shift}
        store, settings = ChunkStore(self.chunks or out, made_from, keep), self.settings
        totals = accumulate_chunks(
            store, lambda start, count: self.score(batches, start, count, keep), images=batches.num,
            chunk=settings.chunk, split_size=settings.split_size, description=description, quiet=quiet,
        )  # fmt: skip
        require_finite_images(totals.nonfinite, totals.done)
        return totals, store

    def describe_inputs(self, batches: ImageBatches) -> dict[str, Any]:
        """Return what the numbers depend on, besides the machine."""
        return {
            "images": batches.num,
            "protocol": self.settings.protocol,
            "inception_sha256": self.network.sha256,
            "features": self.settings.features,
            "reference_sha256": self.reference.sha256 if self.reference else None,
            **batches.made_from,
        }

    def describe_execution(self) -> dict[str, Any]:
        """Return what changes the last bits of the sums: batches, devices and versions."""
        settings = self.settings
        return {
            "batch_size": settings.batch_size,
            "chunk": settings.chunk,
            "split_size": settings.split_size,
            "mesh": dict(self.mesh.shape),
            "device": jax.devices()[0].device_kind,
            "versions": versions(("jax", "jaxlib", "flax", "numpy")),
        }

    def _params(self, batches: ImageBatches, shift: Shift) -> dict[str, Any]:
        return {"images": batches.params, "inception": self.network.params, "shift": shift}

    def _mode(self) -> Any:
        return jax.enable_x64(self._dtype == np.float64)


def _make_abstract(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def shift_to_mean(program: Program, batches: ImageBatches) -> Program:
    """Return a program that takes sums about the means of the first batch.

    Float32 sums about zero lose what small eigenvalues are made of: an error of 1e-4 of an FID was seen.
    """
    first = program.score(batches, 0, min(program.settings.batch_size, batches.num)).sums
    shift = Shift(first.pool3.sum / first.pool3.count, first.spatial.sum / first.spatial.count)
    return Program(program.network, program.mesh, program.settings, program.reference, shift, chunks=program.chunks)
