"""`rar_jax.load(...)`: weights, tokenizer and jitted sampler in one object, for notebooks and other programs."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import build, require
from rar_jax.data import imagenet
from rar_jax.errors import ConfigError
from rar_jax.models import Model, check_pair
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import batch_divisor, find_devices, matmul_dtype, with_device_dtype
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.object_store import is_url
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import Guidance, sample_images, sample_keys, to_uint8
from rar_jax.weights import registry as released
from rar_jax.weights.loading import open_weights, read_directory


class Pipeline:
    """A generator and its tokenizer, ready to sample.

    Attributes:
      params: {"generator": decoding parameters, "tokenizer": parameters}, an argument of `sample_fn`.
      guidance: what `sample` uses unless told otherwise.
      class_names: one a class with its synonyms, "tench, Tinca tinca", or numbers where there are no names.
    """

    def __init__(
        self,
        generator: Model,
        tokenizer: Model,
        generator_params: Any,
        tokenizer_params: Any,
        *,
        guidance: Guidance | None = None,
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
        dtype: Any = None,
    ) -> None:
        """The parameters are jax.Arrays that lie where they shall (on the mesh); see `load`."""
        check_pair(generator, tokenizer)
        self.generator: Model = generator
        self.tokenizer: Model = tokenizer
        self.mesh: Mesh | None = mesh
        self.guidance: Guidance = guidance or Guidance(0.0)
        self.class_names: tuple[str, ...] = tuple(class_names) or tuple(
            str(i) for i in range(generator.config.num_classes)
        )
        prepared = generator.module.prepare(generator.config, generator_params, dtype=dtype)
        self.params: dict[str, Any] = {"generator": prepared, "tokenizer": tokenizer_params}
        # On a mesh every process gets all images.
        self._at = replicated(mesh) if mesh is not None else None
        self._jitted = jax.jit(self.sample_fn, out_shardings=self._at)
        self._keys = jax.jit(sample_keys)
        self._programs: dict[Any, Any] = {}

    @property
    def generator_params(self) -> Any:
        """The generator's decoding parameters."""
        return self.params["generator"]

    @property
    def tokenizer_params(self) -> Any:
        """The tokenizer's parameters."""
        return self.params["tokenizer"]

    def sample_fn(self, params: Any, labels: jax.Array, keys: jax.Array, guidance: Guidance) -> jax.Array:
        """uint8 images (b, y, x, c); pure and jittable, for use inside a program of one's own.

        Args:
          params: `pipeline.params`, passed as an argument so that a jit does not bake the weights in.
          labels: int (b,). keys: typed PRNG keys (b,), one a sample.
          guidance: traced; changing its numbers does not compile again.

        Labels are traced, so they are not checked here (`sample` checks them).
        """
        return sample_images(self.generator, self.tokenizer, params, labels, keys, guidance)

    def sample(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        guidance: Guidance | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws one image a label.

        Args:
          labels: class numbers, (b,).
          seed: image i is a function of (seed, i, its label), whatever the batch size and the mesh.
          guidance: default `self.guidance`.
          batch_size: images at a time; default all, at most 64.

        Returns: uint8 (b, y, x, c).
        Raises: ConfigError for a label that is no class, or a batch that memory will not hold; DeviceMemoryError where it
          turns out so.
        """
        return np.concatenate(list(self.sample_batches(labels, seed=seed, guidance=guidance, batch_size=batch_size)))

    def sample_batches(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        guidance: Guidance | None = None,
        batch_size: int | None = None,
    ) -> Iterator[np.ndarray]:
        """As `sample`, one batch after the other as soon as it is drawn. Its length is known: `batch_count`."""
        labels_b = np.asarray(labels).reshape(-1)
        self._check(labels_b, seed, guidance, batch_size)
        return self._batches(labels_b, seed, guidance or self.guidance, self._batch(len(labels_b), batch_size))

    def _batches(self, labels_b: np.ndarray, seed: int, guidance: Guidance, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(labels_b), size):
            ids_b = np.arange(start, start + size) % len(labels_b)  # the last batch is filled up, and cut again
            rows: Any = labels_b[ids_b].astype(np.int32), ids_b.astype(np.int32)
            if self.mesh is not None:
                rows = put_on_mesh(rows, batch_sharding(self.mesh))
            labels, ids = rows
            args = (self.params, labels, self._keys(np.uint32(seed), ids), guidance)
            with memory.exhaustion(f"sampling, batch_size {size}", "give a smaller batch_size, or dtype='bfloat16'"):
                images = np.asarray(self._program(size, args)(*args))
            yield images[: len(labels_b) - start]

    def _program(self, size: int, args: tuple[Any, ...]) -> Any:
        """The sampler compiled for such arguments. Raises: ConfigError if it would not fit in memory."""
        key = jax.tree.structure(args), *(jax.typeof(x) for x in jax.tree.leaves(args))
        if key not in self._programs:
            with contextlib.nullcontext() if self.mesh is None else sharded(self.mesh):
                compiled = self._jitted.lower(*args).compile()
            memory.check(compiled, size, divisor=1 if self.mesh is None else batch_divisor(self.mesh))
            self._programs[key] = compiled
        return self._programs[key]

    def batch_count(self, images: int, batch_size: int | None = None) -> int:
        """How many batches `sample_batches` takes for so many images."""
        return -(-images // self._batch(images, batch_size))

    def _batch(self, images: int, batch_size: int | None) -> int:
        divisor = 1 if self.mesh is None else batch_divisor(self.mesh)
        return -(-(batch_size or min(images, 64)) // divisor) * divisor

    def _check(self, labels_b: np.ndarray, seed: int, guidance: Guidance | None, batch_size: int | None) -> None:
        require(
            labels_b.dtype.kind in "iu" or not labels_b.size, f"labels are {labels_b.dtype}: give class numbers (ints)"
        )
        require(
            isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32,
            f"seed is {seed}: it must be in 0..4294967295 (uint32)",
        )
        require(
            batch_size is None or (isinstance(batch_size, int) and batch_size >= 1),
            f"batch_size is {batch_size}: it must be at least 1, a whole number",
        )
        require(
            guidance is None or isinstance(guidance, Guidance),
            f"guidance is {guidance!r}: give rar_jax.Guidance(scale, power, temperature)",
        )
        classes = self.generator.config.num_classes
        if bad := [int(label) for label in labels_b if not 0 <= label < classes]:
            raise ConfigError(f"label {bad[0]} is outside the classes 0..{classes - 1}")
        require(labels_b.size > 0, "no labels: give at least one class to sample")

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (b, y, x, c), of the tokenizer's size, as it keeps them: encoded, decoded, rounded; uint8, the same shape."""
        module, config = self.tokenizer.module, self.tokenizer.config

        def through(params: Any, images_byxc: jax.Array) -> jax.Array:
            return to_uint8(module.decode(config, params, module.encode(config, params, images_byxc)))

        return np.asarray(jax.jit(through, out_shardings=self._at)(self.tokenizer_params, np.asarray(images)))


def load(
    path_or_name: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    download: bool = False,
    step: int | None = None,
) -> Pipeline:
    """Loads a work directory, a converted directory, or a released generator file with its tokenizer's.

    A released file of RAR-B, L, XL or XXL brings the guidance that the authors sample it with, and ImageNet's class names.

    Args:
      path_or_name: directory of `rar-jax run`, also gs:// or s3://, or of `rar-jax convert`; a RAR file (.bin, .pth, .safetensors); or the name of
        a released one ("rar_b"), which is looked up in the Hugging Face cache.
      tokenizer: MaskGIT-VQ file; needed with a generator file, and the released one with a released name.
      mesh: devices to spread over (default: one).
      dtype: what the generator multiplies in: "float32", or "bfloat16", which halves its parameters once they are loaded
        (not the peak of loading) and changes about one greedy choice in a hundred (docs/measurements/bfloat16.md). A GPU that has no bfloat16 takes
        float32 instead, with a warning.
      step: of the generator's checkpoints in a work directory; default the newest good one.
      download: fetch released files that are not there, and check their sha256.

    Raises: ConfigError, WeightsError or CheckpointError that say what is missing or wrong.
    """
    if dtype is not None:
        try:
            known = jnp.dtype(dtype).name in ("float32", "bfloat16")
        except TypeError:
            known = False
        require(known, f"dtype is {dtype!r}: it must be 'float32' or 'bfloat16'")
    find_devices()
    dtype = None if dtype is None else matmul_dtype(jnp.dtype(dtype).name)
    require(mesh is None or isinstance(mesh, Mesh), f"mesh is {mesh!r}: give a jax.sharding.Mesh, as make_mesh does")
    if is_url(path_or_name):
        path_or_name = Workdir(path_or_name).fetch().path
    path = released.locate(path_or_name, download=download)
    if path.is_dir():
        require(tokenizer is None, f"{path} is a directory, which has its own tokenizer: leave tokenizer out")
        config = read_directory(path)
        guidance = build(Guidance, config["guidance"], where="config.guidance")
        class_names = config["data"].get("class_names", ())
        tokenizer = path
    else:
        by_name = path != pathlib.Path(path_or_name)
        if tokenizer is None and by_name:
            tokenizer = released.TOKENIZER
        if tokenizer is None:
            raise ConfigError(
                f"{path} is a generator's file: give its tokenizer's too (--tokenizer, load(..., tokenizer=...))"
            )
        tokenizer = released.locate(tokenizer, download=download)
        guidance, class_names = None, ()
    generator = open_weights(path, "generators", step=step)
    num_tokens = generator.model.module.token_spec(generator.model.config).shape[0]
    of_images = open_weights(tokenizer, "tokenizers", num_tokens=num_tokens)
    check_pair(generator.model, of_images.model)
    if path.is_file() and (known := released.preset(generator.model.config)):
        guidance, class_names = known.guidance, imagenet.class_names()
    return Pipeline(
        generator.model,
        Model(of_images.model.module, with_device_dtype(of_images.model.config)),
        generator.place(mesh),
        of_images.place(mesh),
        guidance=guidance,
        class_names=class_names,
        mesh=mesh,
        dtype=dtype,
    )
