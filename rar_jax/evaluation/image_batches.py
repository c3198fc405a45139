"""Images to score: samples, sets of images, or reconstructions of a set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rar_jax.config import to_dict
from rar_jax.data.sources import ImageSource
from rar_jax.errors import NonFiniteError
from rar_jax.evaluation.image_sets import ImageSet
from rar_jax.keys import sample_keys
from rar_jax.metrics.reconstruction import compare_images
from rar_jax.models import Model
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding
from rar_jax.sampling import SamplingSettings, has_nonfinite, reconstruct_pixels, sample_pixels, to_uint8


@dataclasses.dataclass(frozen=True)
class ImageBatches:
    """Images in a fixed order: rows on the host, and a function that makes images.

    num: number of images.
    shape: (y, x, c) of one.
    read: function of ids (steps, b) -> rows, a dict of arrays (steps, b, ...).
    make: traceable, hashable function of (params, rows (b, ...)) -> {"images": uint8 (b, y, x, c), other arrays}; of
      images that are made as floats, "nonfinite": bool (b,).
    params: what `make` reads, on the devices.
    made_from: what the images depend on, as JSON.
    classes: number of classes that the images are evenly drawn from, if known.
    """

    num: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    make: Callable[[Any, Any], dict[str, jax.Array]]
    params: Any
    made_from: dict[str, Any]
    classes: int | None = None

    def read_rows(
        self, start: int, count: int, batch_size: int, mesh: Mesh
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return rows and 0/1 weights (steps, b) of images start .. start + count - 1.

        b is min(batch_size, num), rounded up to divide over the mesh. The last image pads the last batch.
        """
        parts = batch_divisor(mesh)
        size = -(-min(batch_size, self.num) // parts) * parts
        steps = -(-count // size)
        ids_sb = np.arange(start, start + steps * size, dtype=np.int32).reshape(steps, size)
        weights_sb = (ids_sb < start + count).astype(np.float32)
        return self.read(np.minimum(ids_sb, start + count - 1)), weights_sb


def require_finite_images(nonfinite: float, num: int) -> None:
    """Raise NonFiniteError if some of `num` images have pixels that are not finite: scores would count them as black."""
    if nonfinite:
        raise NonFiniteError(
            f"{int(nonfinite)} of {num} images have non-finite pixels, so there is no score: check that the tokenizer "
            "belongs to the generator and that its weights are finite, or use --dtype float32"
        )


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of rows (steps, b, ...) over the batch."""
    return NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))


def batch_samples(
    models: tuple[Model, Model],
    params: dict[str, Any],
    sampling: SamplingSettings,
    *,
    num: int,
    seed: int,
    rounding: str = "truncate",
    made_from: dict[str, Any] | None = None,
) -> ImageBatches:
    """Draw samples of a generator and its tokenizer.

    Sample i has class i modulo num_classes. params: {"generator", "tokenizer"}. made_from: checksums of the weights.
    """
    generator, tokenizer = models
    classes = generator.config.num_classes
    settings = {"sampling": to_dict(sampling), "seed": seed, "rounding": rounding}
    return ImageBatches(
        num=num,
        shape=tokenizer.module.image_spec(tokenizer.config).shape,
        read=lambda ids_sb: {"ids": ids_sb, "labels": (ids_sb % classes).astype(np.int32)},
        make=_Sampler(generator, tokenizer, rounding),
        params={**params, "seed": np.uint32(seed), "sampling": sampling},
        made_from={**(made_from or {}), **settings},
        classes=classes,
    )


@dataclasses.dataclass(frozen=True)
class _Sampler:
    generator: Model
    tokenizer: Model
    rounding: str

    def __call__(self, params: Any, rows: Any) -> dict[str, jax.Array]:
        keys = sample_keys(params["seed"], rows["ids"])
        pixels = sample_pixels(self.generator, self.tokenizer, params, rows["labels"], keys, params["sampling"])
        return {"images": to_uint8(pixels, self.rounding), "nonfinite": has_nonfinite(pixels)}


def batch_image_set(images: ImageSet) -> ImageBatches:
    """Take the images of a set as they are."""

    def read(ids_sb: np.ndarray) -> dict[str, np.ndarray]:
        start = int(ids_sb.min())
        return {"images": images.read(start, int(ids_sb.max()) - start + 1)[ids_sb - start]}

    return ImageBatches(
        num=images.num,
        shape=images.read(0, 1).shape[1:],
        read=read,
        make=_take_images,
        params={},
        made_from={"images_from": images.name, "images_sha256": images.fingerprint()},
    )


def batch_source(source: ImageSource) -> ImageBatches:
    """Take the images of a source with their labels."""

    def read(ids_sb: np.ndarray) -> dict[str, np.ndarray]:
        rows = source.gather(ids_sb.reshape(-1))
        return {name: rows[name].reshape(*ids_sb.shape, *rows[name].shape[1:]) for name in ("images", "labels")}

    return ImageBatches(len(source), source.image_shape, read, _take_images, params={}, made_from={})


def batch_reconstructions(
    originals: ImageBatches, tokenizer: Model, params: Any, rounding: str, *, tokenizer_sha256: str
) -> ImageBatches:
    """Encode and decode the images of a set; "tokens", "psnr" and "ssim" can be kept."""
    made_from = {**originals.made_from, "tokenizer_sha256": tokenizer_sha256, "rounding": rounding}
    return dataclasses.replace(originals, make=_Reconstructor(tokenizer, rounding), params=params, made_from=made_from)


def _take_images(params: Any, rows: Any) -> dict[str, jax.Array]:
    return {"images": rows["images"]}


@dataclasses.dataclass(frozen=True)
class _Reconstructor:
    tokenizer: Model
    rounding: str

    def __call__(self, params: Any, rows: Any) -> dict[str, jax.Array]:
        pixels, tokens = reconstruct_pixels(self.tokenizer, params, rows["images"])
        images, bad = to_uint8(pixels, self.rounding), has_nonfinite(pixels)
        return {"images": images, "tokens": tokens, "nonfinite": bad, **compare_images(rows["images"], images)}
