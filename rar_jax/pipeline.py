"""`rar_jax.load(...)`: weights, tokenizer and jitted sampler in one object."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import require
from rar_jax.data import imagenet
from rar_jax.errors import ConfigError
from rar_jax.keys import sample_keys
from rar_jax.models import Model, check_pair, find_known_tokens, prepare_params
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import batch_divisor, find_devices, matmul_dtype, with_device_dtype
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.bucket import is_url
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import SamplingSettings, complete_images, make_sampling, reconstruct_images, sample_images
from rar_jax.weights.loading import Reading, Weights, open_pair, read_directory
from rar_jax.weights.registry import find_file, find_named, find_released


class Pipeline:
    """A generator and its tokenizer, ready to sample.

    Attributes:
      params: {"generator": decoding parameters, "tokenizer": parameters}, an argument of `sample_fn`.
      sampling: settings of `sample`: the published ones, or those of the experiment.
      sources: generator's and tokenizer's Weights, of a Pipeline that `load` made.
      class_names: one per class with its synonyms, "tench, Tinca tinca", or numbers if there are no names.
    """

    def __init__(
        self,
        generator: Model,
        tokenizer: Model,
        generator_params: Any,
        tokenizer_params: Any,
        *,
        sampling: Mapping[str, Any] | None = None,
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
        dtype: Any = None,
        sources: Sequence[Weights] = (),
    ) -> None:
        """Build from parameters that are on the devices (of the mesh) already; see `load`."""
        check_pair(generator, tokenizer)
        self.generator: Model = generator
        self.tokenizer: Model = tokenizer
        self.mesh: Mesh | None = mesh
        self.sampling: Any = make_sampling(generator, sampling or {})
        self.sources: tuple[Weights, ...] = tuple(sources)
        numbers = tuple(str(i) for i in range(generator.config.num_classes))
        self.class_names: tuple[str, ...] = tuple(class_names) or numbers
        prepared = prepare_params(generator, generator_params, dtype=dtype)
        self.params: dict[str, Any] = {"generator": prepared, "tokenizer": tokenizer_params}
        everywhere = None if mesh is None else replicated(mesh)  # every process gets all images
        self._sample = jax.jit(self.sample_fn, out_shardings=everywhere)
        self._complete = jax.jit(self._complete_fn, static_argnames="known", out_shardings=everywhere)
        self._reconstruct = jax.jit(functools.partial(reconstruct_images, tokenizer), out_shardings=everywhere)
        self._keys = jax.jit(sample_keys)

    @property
    def generator_params(self) -> Any:
        """The generator's decoding parameters."""
        return self.params["generator"]

    @property
    def tokenizer_params(self) -> Any:
        """The tokenizer's parameters."""
        return self.params["tokenizer"]

    def sample_fn(self, params: Any, labels: jax.Array, keys: jax.Array, sampling: SamplingSettings) -> jax.Array:
        """Return uint8 images (b, y, x, c). Pure and jittable, for your own programs.

        Args:
          params: `pipeline.params`, an argument so that jit does not bake the weights in.
          labels: int (b,), not checked. keys: typed PRNG keys (b,), one per sample.
          sampling: of `make_sampling`. Its floats are traced: changing them does not recompile.
        """
        return sample_images(self.generator, self.tokenizer, params, labels, keys, sampling)

    def make_sampling(self, changes: Mapping[str, Any]) -> Any:
        """Return the generator's Sampling: `self.sampling` with some settings changed.

        Raises: ConfigError for a setting that the generator does not have, or a value that it cannot be.
        """
        return make_sampling(self.generator, changes, self.sampling)

    def sample(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> np.ndarray:
        """Draw one image per label: uint8 (b, y, x, c).

        Args:
          labels: class numbers, (b,).
          seed: image i is a function of (seed, i, its label), for any batch size and mesh.
          batch_size: images at a time; default all, at most 64.
          sampling: settings of the generator that differ from `self.sampling`: scale=4.0.

        Raises: ConfigError for a label that is no class; DeviceMemoryError if memory runs out.
        """
        return np.concatenate(list(self.sample_batches(labels, seed=seed, batch_size=batch_size, **sampling)))

    def sample_batches(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Iterator[np.ndarray]:
        """Draw as `sample` does, and yield each of the `batch_count` batches as soon as it is drawn."""
        return self._batches(self._sample, labels, seed, self.make_sampling(sampling), batch_size)

    def complete(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        **options: Any,
    ) -> np.ndarray:
        """Draw as `complete_batches` does: uint8 (b, y, x, c)."""
        return np.concatenate(list(self.complete_batches(image, mask, labels, **options)))

    def complete_batches(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        keep_pixels: bool = False,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Iterator[np.ndarray]:
        """Draw a part of an image, once per label, and yield each of the `batch_count` batches, uint8 (b, y, x, c).

        Args:
          image: uint8 (y, x, c) of the tokenizer's size.
          mask: bool (y, x), True where to draw. A token is drawn if any of its pixels is.
          labels, seed, batch_size, sampling: as of `sample`.
          keep_pixels: take the pixels outside the mask from `image`. They are decoded from its tokens otherwise.

        Raises: ConfigError for a mask that the generator cannot complete (RAR: the drawn tokens must be the last ones).
        """
        image, mask = np.asarray(image), np.asarray(mask)
        shape = self.tokenizer.module.image_spec(self.tokenizer.config).shape
        is_image = image.dtype == np.uint8 and image.shape == shape
        require(is_image, f"the image is {image.dtype} {list(image.shape)}: it must be uint8 {list(shape)}")
        is_mask = mask.dtype == bool and mask.shape == shape[:2]
        require(is_mask, f"the mask is {mask.dtype} {list(mask.shape)}: it must be bool {list(shape[:2])}")
        require(bool(mask.any()), "the mask is False (black) everywhere: there is nothing to draw")
        known = find_known_tokens(self.generator, self.tokenizer, mask)
        draw = functools.partial(self._complete, image=image, known=(known.shape, known.tobytes()))
        batches = self._batches(draw, labels, seed, self.make_sampling(sampling), batch_size)
        return (np.where(mask[..., None], drawn, image) for drawn in batches) if keep_pixels else batches

    def _complete_fn(
        self, params: Any, labels: jax.Array, keys: jax.Array, sampling: Any, image: jax.Array, known: tuple[Any, bytes]
    ) -> jax.Array:
        known_mask = np.frombuffer(known[1], bool).reshape(known[0])
        return complete_images(self.generator, self.tokenizer, params, labels, keys, sampling, image, known_mask)

    def _batches(
        self, draw: Any, labels: Any, seed: int, sampling: SamplingSettings, batch_size: int | None
    ) -> Iterator[np.ndarray]:
        labels_b = np.asarray(labels).reshape(-1)
        self._check(labels_b, seed, batch_size)
        return self._draw_batches(draw, labels_b, seed, sampling, self._batch(len(labels_b), batch_size))

    def _draw_batches(
        self, draw: Any, labels_b: np.ndarray, seed: int, sampling: SamplingSettings, size: int
    ) -> Iterator[np.ndarray]:
        for start in range(0, len(labels_b), size):
            ids_b = np.arange(start, start + size) % len(labels_b)  # pads the last batch
            rows: Any = labels_b[ids_b].astype(np.int32), ids_b.astype(np.int32)
            if self.mesh is not None:
                rows = put_on_mesh(rows, batch_sharding(self.mesh))
            labels, ids = rows
            advice = "give a smaller batch_size, or dtype='bfloat16'"
            on_mesh = contextlib.nullcontext() if self.mesh is None else sharded(self.mesh)
            with memory.exhaustion(f"sampling, batch_size {size}", advice), on_mesh:
                images = np.asarray(draw(self.params, labels, self._keys(np.uint32(seed), ids), sampling))
            yield images[: len(labels_b) - start]

    def batch_count(self, images: int, batch_size: int | None = None) -> int:
        """Return the number of batches of `sample_batches`."""
        return -(-images // self._batch(images, batch_size))

    def _batch(self, images: int, batch_size: int | None) -> int:
        divisor = 1 if self.mesh is None else batch_divisor(self.mesh)
        return -(-(batch_size or min(images, 64)) // divisor) * divisor

    def _check(self, labels_b: np.ndarray, seed: int, batch_size: int | None) -> None:
        require(labels_b.size > 0, "no labels: give at least one class to sample")
        require(labels_b.dtype.kind in "iu", f"labels are {labels_b.dtype}: give class numbers (ints)")
        classes = self.generator.config.num_classes
        if bad := [int(label) for label in labels_b if not 0 <= label < classes]:
            raise ConfigError(f"label {bad[0]} is outside the classes 0..{classes - 1}")
        is_seed = isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32
        require(is_seed, f"seed is {seed}: it must be in 0..4294967295 (uint32)")
        is_size = batch_size is None or (isinstance(batch_size, int) and batch_size >= 1)
        require(is_size, f"batch_size is {batch_size}: it must be a whole number of at least 1")

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encode and decode uint8 images (b, y, x, c) of the tokenizer's size; the same shape and dtype."""
        return np.asarray(self._reconstruct(self.tokenizer_params, np.asarray(images))[0])


def load(
    path_or_name: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    download: bool = False,
    facts: Mapping[str, Any] | None = None,
    models: Sequence[str] = (),
    raw: bool = False,
    step: int | None = None,
) -> Pipeline:
    """Load a work directory, a converted directory, or released files with the published settings.

    Args:
      path_or_name: directory of `rar-jax run` (also gs:// or s3://) or `convert`; a RAR file (.bin, .pth,
        .safetensors); or a released name ("rar_b"), looked up in the Hugging Face cache.
      tokenizer: MaskGIT-VQ file, needed with a generator file; a released name has its own.
      mesh: devices to shard over; default one device.
      dtype: of the generator's matmuls: "float32", or "bfloat16", which halves its parameters and may change
        individual tokens. A GPU without bfloat16 uses float32, with a warning.
      step: of the generator's checkpoints in a work directory; default the newest good one.
      download: fetch released files that are not cached, and check their sha256.
      facts: Config fields that files do not tell, {"image_size": 256}; files of `convert` and released sizes do.
      models: names of the modules that read the files; by default the files' keys say it.
      raw: read the parameters as trained, not their moving average, where there are both.

    Raises: ConfigError, WeightsError or CheckpointError that say what is missing or wrong.
    """
    try:
        known = dtype is None or jnp.dtype(dtype).name in ("float32", "bfloat16")
    except TypeError:
        known = False
    require(known, f"dtype is {dtype!r}: it must be 'float32' or 'bfloat16'")
    require(mesh is None or isinstance(mesh, Mesh), f"mesh is {mesh!r}: give a jax.sharding.Mesh, as make_mesh does")
    find_devices()
    if is_url(path_or_name):
        path_or_name = Workdir(path_or_name).fetch().path
    path = find_file(path_or_name, download=download)
    if path.is_dir():
        require(tokenizer is None, f"{path} is a directory, which has its own tokenizer: leave tokenizer out")
        tokenizer = path
    elif tokenizer is None and path != pathlib.Path(path_or_name) and (named := find_named(path_or_name)):
        tokenizer = named[1].tokenizer
    if tokenizer is None:
        raise ConfigError(f"{path} is a generator's file: give its tokenizer's too (--tokenizer, tokenizer=...)")
    reading = Reading(download, facts or {}, models, raw)
    generator, of_images = pair = open_pair(path_or_name, tokenizer, reading=reading, step=step)
    sampling, class_names = _find_defaults(path, generator.model)
    return Pipeline(
        generator.model,
        Model(of_images.model.module, with_device_dtype(of_images.model.config)),
        generator.place(mesh),
        of_images.place(mesh),
        sampling=sampling,
        class_names=class_names,
        mesh=mesh,
        dtype=None if dtype is None else matmul_dtype(jnp.dtype(dtype).name),
        sources=pair,
    )


def _find_defaults(path: pathlib.Path, generator: Model) -> tuple[Mapping[str, Any], Sequence[str]]:
    if path.is_dir():
        config = read_directory(path)
        return config["sampling"], config["data"].get("class_names", ())
    known = find_released(generator)
    return (known.sampling, imagenet.class_names()) if known else ({}, ())
