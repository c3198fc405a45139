"""Inception scores of images: the jitted program over the mesh, and the numbers that are made of its sums.

Samples are made, decoded, rounded, resized, passed through Inception and summed in one program; only sums leave the devices
(and, for precision, recall and KID, the pool3 features). Images made elsewhere go through the same program from the rounding
on. Definitions: openai/guided-diffusion, evaluations/evaluator.py.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rar_jax.config import require
from rar_jax.evaluation.chunks import Chunk
from rar_jax.evaluation.image_sets import ImageSet
from rar_jax.evaluation.reference import Reference
from rar_jax.metrics import frechet, inception_score, kid, moments, precision_recall, reconstruction, sums
from rar_jax.metrics.features import features
from rar_jax.metrics.sums import Shift, Totals
from rar_jax.models import Model
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.sampling import ROUNDINGS, Guidance, sample_images, sample_keys, to_uint8

# Resize and what else a published number is made with.
PROTOCOLS = {"adm": "tf1", "pytorch_fid": "pytorch_fid"}
ENOUGH = 2048  # images, below which the covariance of 2048 features is singular


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are scored. All of it but batch_size and chunk changes the number.

    protocol: "adm" or "pytorch_fid". rounding: of samples to uint8, "truncate" (RAR's code) or "round".
    features: what Inception and the sums are computed in, "float32", or "float64" to see what float32 costs (not on TPUs).
    chunk: images between two saves; it divides a split of the Inception Score.
    neighbours: precision, recall and KID too, where the reference has images.
    """

    protocol: str = "adm"
    rounding: str = "truncate"
    features: str = "float32"
    seed: int = 0
    batch_size: int = 64
    chunk: int = 1000
    split_size: int = inception_score.SPLIT_SIZE
    neighbours: bool = True

    def __post_init__(self) -> None:
        require(self.protocol in PROTOCOLS, f"protocol is '{self.protocol}': it must be adm or pytorch_fid")
        require(self.rounding in ROUNDINGS, f"rounding is '{self.rounding}': it must be truncate or round")
        require(
            self.features in ("float32", "float64"), f"features is '{self.features}': it must be float32 or float64"
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}: it must be in 0..4294967295 (uint32)")
        for name in ("batch_size", "chunk"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(
            self.split_size % self.chunk == 0,
            f"chunk is {self.chunk}: it must divide {self.split_size}, a split of the Inception Score",
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """Inception's parameters, replicated on the mesh, and the sha256 of their file."""

    params: Any
    sha256: str


# ---------------------------------------------------------------- in graph


class Program:
    """The jitted chunk programs of one mesh: a scan over batches.

    JAX is in float64 mode around a program of float64 features, and out of it around sampling, which it would change.
    """

    def __init__(self, network: Network, mesh: Mesh, settings: Settings, shift: Shift | None) -> None:
        self.mesh: Mesh = mesh
        self.settings: Settings = settings
        zero = Shift(np.zeros(sums.POOL3, np.float32), np.zeros(sums.SPATIAL, np.float32))
        self.shift: Shift = jax.tree.map(lambda x: np.asarray(x, np.float32), shift or zero)
        at = replicated(mesh)
        self._dtype = np.dtype(settings.features)
        self._network = network
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._score_samples = jax.jit(self._scan_samples, static_argnames=("models", "keep"), out_shardings=at)
        self._score_images = jax.jit(self._scan_images, static_argnames="keep", out_shardings=at)
        self._score_reconstructions = jax.jit(self._scan_reconstructions, static_argnames="tokenizer", out_shardings=at)

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return {"inception": self._network.params, "shift": put_on_mesh(self.shift, replicated(self.mesh))}

    def _one(self, params: Any, total: sums.Sums, images: jax.Array, weights_b: jax.Array) -> tuple[sums.Sums, Any]:
        out = features(params["inception"], images, resize=PROTOCOLS[self.settings.protocol])
        return sums.add(total, out, weights_b, params["shift"]), out["pool3"]

    def _scan_samples(
        self,
        params: Any,
        batch: Any,
        seed: Any,
        guidance: Guidance,
        *,
        models: tuple[Model, Model],
        keep: tuple[str, ...],
    ) -> Chunk:
        def body(total: sums.Sums, rows: Any) -> tuple[sums.Sums, Any]:
            labels_b, ids_b, weights_b = rows
            with jax.enable_x64(False):
                images = sample_images(
                    *models, params, labels_b, sample_keys(seed, ids_b), guidance, rounding=self.settings.rounding
                )
            total, pool3_bf = self._one(params, total, images, weights_b)
            return total, {name: {"pool3": pool3_bf, "images": images}[name] for name in keep}

        return Chunk(*jax.lax.scan(body, sums.zero(self._dtype), batch))

    def _scan_images(self, params: Any, batch: Any, *, keep: tuple[str, ...]) -> Chunk:
        def body(total: sums.Sums, rows: Any) -> tuple[sums.Sums, Any]:
            total, pool3_bf = self._one(params, total, *rows)
            return total, {"pool3": pool3_bf} if "pool3" in keep else {}

        return Chunk(*jax.lax.scan(body, sums.zero(self._dtype), batch))

    def _scan_reconstructions(self, params: Any, batch: Any, *, tokenizer: Model) -> Chunk:
        def body(total: sums.Sums, rows: Any) -> tuple[sums.Sums, Any]:
            images, weights_b = rows
            with jax.enable_x64(False):
                tokens_bn = tokenizer.module.encode(tokenizer.config, params["tokenizer"], images)
                decoded = tokenizer.module.decode(tokenizer.config, params["tokenizer"], tokens_bn)
                reconstructed = to_uint8(decoded, self.settings.rounding)
                kept = {"tokens": tokens_bn, **reconstruction.reconstruction(images, reconstructed)}
            return self._one(params, total, reconstructed, weights_b)[0], kept

        return Chunk(*jax.lax.scan(body, sums.zero(self._dtype), batch))

    # ---- from the host

    def samples(
        self,
        models: tuple[Model, Model],
        params: Mapping[str, Any],
        guidance: Guidance,
        keep: tuple[str, ...] = (),
        *,
        whole_batches: bool = False,
    ) -> Callable[[int, int], Chunk]:
        """Function (start, count) -> Chunk of the samples with these ids; sample i has class i modulo the classes.

        Args:
          models: generator and tokenizer. Others of the same configs compile nothing anew.
          params: {"generator", "tokenizer"}.
          whole_batches: of batch_size even where fewer images are wanted, so that the last few compile nothing anew.
        """

        def compute(start: int, count: int) -> Chunk:
            rows = self._rows(start, count, self.settings.batch_size if whole_batches else count)
            with sharded(self.mesh), self._mode():
                given = self._to_sample(models, params, guidance, rows)
                return _flat(self._run(self._score_samples, *given, models=models, keep=keep))

        return compute

    def compile_samples(self, models: tuple[Model, Model], params: Mapping[str, Any], guidance: Guidance) -> None:
        """Compiles what `samples` of whole batches runs, without running it."""
        rows = self._rows(0, self.settings.batch_size)
        with sharded(self.mesh), self._mode():
            self._compile(self._score_samples, *self._to_sample(models, params, guidance, rows), models=models, keep=())

    def _to_sample(
        self, models: tuple[Model, Model], params: Mapping[str, Any], guidance: Guidance, rows: tuple[np.ndarray, ...]
    ) -> tuple[Any, ...]:
        """Arguments of `_score_samples` for these ids and weights."""
        ids_sb, weights_sb = rows
        placed = self._place(((ids_sb % models[0].config.num_classes).astype(np.int32), ids_sb, weights_sb))
        return {**params, **self._params}, placed, np.uint32(self.settings.seed), guidance

    def lower_samples(
        self, models: tuple[Model, Model], params: Mapping[str, Any], guidance: Guidance
    ) -> jax.stages.Lowered:
        """The program of `samples` for one batch, to be compiled for devices that need not be here.

        Args:
          params: ShapeDtypeStructs with shardings, as the network's are.
        """
        whole, rows = (
            replicated(self.mesh),
            NamedSharding(self.mesh, PartitionSpec(None, *batch_sharding(self.mesh).spec)),
        )
        shape = 1, self.settings.batch_size
        batch = tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (np.int32, np.int32, np.float32))
        shift = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), self.shift)
        given = {**params, "inception": self._network.params, "shift": shift}
        with sharded(self.mesh), self._mode():
            return self._score_samples.lower(given, batch, np.uint32(0), guidance, models=models, keep=())

    def images(self, images: ImageSet, keep: tuple[str, ...]) -> Callable[[int, int], Chunk]:
        """Function (start, count) -> Chunk of these images of a set."""

        def compute(start: int, count: int) -> Chunk:
            rows = self._rows_of(images, start, count)
            with sharded(self.mesh), self._mode():
                return _flat(self._run(self._score_images, self._params, rows, keep=keep))

        return compute

    def reconstructions(self, tokenizer: Model, params: Any, images: ImageSet) -> Callable[[int, int], Chunk]:
        """Function (start, count) -> Chunk of what a tokenizer makes of these images; keeps their tokens, PSNR and SSIM."""

        def compute(start: int, count: int) -> Chunk:
            rows = self._rows_of(images, start, count)
            with sharded(self.mesh), self._mode():
                given = {"tokenizer": params, **self._params}
                return _flat(self._run(self._score_reconstructions, given, rows, tokenizer=tokenizer))

        return compute

    def time_shares(
        self, models: tuple[Model, Model], params: Mapping[str, Any], guidance: Guidance
    ) -> dict[str, float]:
        """Seconds of a batch in each part by itself, the best of 3 after compiling: what the fused program is made of."""
        generator, tokenizer = models
        params = {**params, **self._params}
        ids_sb, weights_sb = self._rows(0, self.settings.batch_size)
        labels_sb = (ids_sb % generator.config.num_classes).astype(np.int32)
        labels_b, ids_b, weights_b = (x[0] for x in self._place((labels_sb, ids_sb, weights_sb)))
        keys = sample_keys(self.settings.seed, ids_b)
        seconds: dict[str, float] = {}

        def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
            compiled = jax.jit(function)
            out = jax.block_until_ready(compiled(*args))
            times = []
            for _ in range(3):
                began = time.perf_counter()
                jax.block_until_ready(compiled(*args))
                times.append(time.perf_counter() - began)
            seconds[name] = min(times)
            return out

        def decode(p: Any, tokens_bn: jax.Array) -> jax.Array:
            return to_uint8(tokenizer.module.decode(tokenizer.config, p, tokens_bn), self.settings.rounding)

        with sharded(self.mesh):
            sample = functools.partial(generator.module.sample, generator.config)
            tokens_bn = timed(
                "sampling", lambda p, labels, k, g: sample(p, labels, keys=k, guidance=g), params["generator"],
                labels_b, keys, guidance,
            )  # fmt: skip
            images = timed("decoding", decode, params["tokenizer"], tokens_bn)
            with self._mode():
                resize = PROTOCOLS[self.settings.protocol]
                out = timed("inception", functools.partial(features, resize=resize), params["inception"], images)
                timed("moments", sums.add, sums.zero(self._dtype), out, weights_b, params["shift"])
        return seconds

    def _run(self, program: Any, *args: Any, **static: Any) -> Chunk:
        """Calls a jitted program. Raises: ConfigError as `_compile` does."""
        return self._compile(program, *args, **static)(*args)

    def _compile(self, program: Any, *args: Any, **static: Any) -> jax.stages.Compiled:
        """A jitted program for arguments of this form, compiled once. Raises: ConfigError, before it runs, if a device has not
        the memory that it takes."""
        leaves, tree = jax.tree.flatten(args)
        form = program, tree, tuple((np.shape(x), jnp.result_type(x)) for x in leaves), tuple(static.items())
        if form not in self._compiled:
            compiled = program.lower(*args, **static).compile()
            rows, parts = self.settings.batch_size, batch_divisor(self.mesh)
            memory.check(compiled, rows, divisor=parts)
            self._compiled[form] = compiled
        return self._compiled[form]

    def _mode(self) -> Any:
        return jax.enable_x64(self._dtype == np.float64)

    def _rows_of(self, images: ImageSet, start: int, count: int) -> tuple[jax.Array, ...]:
        """Images and weights; the last image fills up."""
        ids_sb, weights_sb = self._rows(0, count)
        return self._place((images.read(start, count)[np.minimum(ids_sb, count - 1)], weights_sb))

    def _rows(self, start: int, count: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and 0/1 weights (steps, batch of at most `most`, by default `count`); those that fill up the last have weight 0."""
        parts = batch_divisor(self.mesh)
        size = -(-min(self.settings.batch_size, most or count) // parts) * parts
        steps = -(-count // size)
        ids_sb = np.arange(start, start + steps * size, dtype=np.int32).reshape(steps, size)
        return ids_sb, (ids_sb < start + count).astype(np.float32)

    def _place(self, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
        at = NamedSharding(self.mesh, PartitionSpec(None, *batch_sharding(self.mesh).spec))
        return put_on_mesh(arrays, at)


def _flat(chunk: Chunk) -> Chunk:
    """Kept arrays (steps, batch, ...) as (steps * batch, ...)."""
    kept = {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in chunk.kept.items()}
    return Chunk(jax.device_get(chunk.sums), kept)


# ---------------------------------------------------------------- numbers


def shift_of(reference: Reference | None) -> Shift | None:
    """The points that sums are taken about: the reference's means."""
    if reference is None:
        return None
    spatial = reference.spatial_mean
    return Shift(reference.mean, np.zeros(sums.SPATIAL) if spatial is None else spatial)


def metrics(
    totals: Totals, program: Program, reference: Reference | None, pool3: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, float]:
    """All numbers that can be had: FID, sFID and KID, lower is better; the others, higher.

    Args:
      pool3: features of the reference's images and of the samples, for precision, recall and KID.
    """
    numbers: dict[str, float] = {}
    if reference is not None:
        mean, cov = moments.finalize(totals.pool3, program.shift.pool3)
        numbers["fid"] = frechet.distance(reference.mean, reference.cov, mean, cov, n1=reference.n, n2=totals.done)
        in_graph = jax.jit(frechet.distance_in_graph)(
            *(jnp.asarray(x, jnp.float32) for x in (reference.mean, reference.cov, mean, cov))
        )
        numbers["fid_in_graph_float32"] = float(in_graph)
        if reference.spatial_mean is not None and reference.spatial_cov is not None:
            mean, cov = moments.finalize(totals.spatial, program.shift.spatial)
            numbers["sfid"] = frechet.distance(
                reference.spatial_mean, reference.spatial_cov, mean, cov, n1=reference.n, n2=totals.done
            )
    numbers["inception_score"] = inception_score.score(totals.splits)
    if pool3 is not None:
        numbers |= precision_recall.precision_recall(*pool3)
        numbers["kid"] = kid.kid(*pool3)
    return numbers


def check_protocol(reference: Reference | None, settings: Settings) -> None:
    """Raises: ConfigError if a reference was made with another protocol."""
    if reference is not None:
        require(
            reference.protocol in (None, settings.protocol),
            f"{reference.path} was made with protocol {reference.protocol}, not {settings.protocol}: they do not compare",
        )


def remarks(
    n: int,
    classes: int | None,
    reference: Reference | None,
    inception_sha256: str,
    size: tuple[int, int] | None = None,
) -> list[str]:
    """What a reader of the number must know; size: height and width of the images."""
    said = []
    if reference is not None and reference.images is not None and size is not None:
        theirs = reference.images.height, reference.images.width
        if size != theirs:
            said.append(
                f"the reference's images have {theirs[0]} x {theirs[1]} pixels, these {size[0]} x {size[1]}, which is a part of the "
                "distance: rar-jax evaluate --make-reference makes one of images of this size"
            )
    if n < ENOUGH:
        said.append(f"n is {n}, below {ENOUGH}: the covariance is singular, and the FID is far above that of 50,000")
    if classes is not None and n % classes:
        said.append(f"n is {n}, no multiple of the {classes} classes: they are not equally often among the samples")
    if reference is not None and reference.n is not None and reference.n < ENOUGH:
        said.append(f"the reference is of {reference.n} images, below {ENOUGH}: its covariance is singular")
    if reference is not None and reference.weights_sha256 not in (None, inception_sha256):
        said.append(
            "the reference was made with another file of Inception's weights: see that they are the same numbers"
        )
    return said
