"""Inception features of images, in the precision of the parameters.

Two resize protocols are in use, and their numbers do not compare:
  tf1           TensorFlow 1's bilinear resize of the ADM suite: no half-pixel centres, no antialiasing, (x - 128) / 128
  pytorch_fid   half-pixel centres without antialiasing, 2x / 255 - 1

Shape suffixes: b batch, y height, x width, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rar_jax.config import nearest, require
from rar_jax.networks.inception import IMAGE_SIZE, Inception

RESIZES = ("tf1", "pytorch_fid")
_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def extract_features(params: Mapping[str, Any], images: jax.Array, *, resize: str = "tf1") -> dict[str, jax.Array]:
    """Compute the features that FID and the other scores need; jittable.

    params: from `weights.inception.load`. Their dtype, float32 or float64, is that of the computation.
    images: (b, y, x, c) uint8 of any size; c is 3, or 1 for grey images, which count as three equal channels.

    Returns: {"pool3": (b, 2048), "spatial": (b, 2023), "logits": (b, 1008; without the bias)}.
    Raises: ConfigError for an unknown resize; ValueError for other images, or parameters of another dtype.
    Source: openai/guided-diffusion, evaluations/evaluator.py.
    """
    require(resize in RESIZES, f"resize is '{resize}': it must be 'tf1' or 'pytorch_fid'.{nearest(resize, RESIZES)}")
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:3]:
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 (b, height, width, 1 or 3 channels)")
    dtype = np.dtype(params["fc"]["kernel"].dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"the Inception parameters are {dtype}: features are computed in float32 or float64 only")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError("the Inception parameters are float64, which JAX rounds off: set jax_enable_x64")
    pixels_byxc = images.astype(dtype)
    if resize == "tf1":
        pixels_byxc = (resize_tf1(pixels_byxc) - 128) / 128
    else:
        pixels_byxc = resize_half_pixel(pixels_byxc) * (2 / 255) - 1
    pixels_byxc = jnp.broadcast_to(pixels_byxc, (*pixels_byxc.shape[:3], 3))
    return dict(_apply(params, pixels_byxc))


def _apply(params: Mapping[str, Any], pixels_byxc: jax.Array) -> Any:  # Any: Flax types apply() with its variables
    return Inception().apply({"params": params}, pixels_byxc)


def resize_tf1(images: jax.Array, *, size: int = IMAGE_SIZE) -> jax.Array:
    """Resize as TensorFlow 1 does, without align_corners.

    Pixel i is read at i * in / size, so that the image moves by half a pixel: part of the FID's definition.
    Source: tensorflow/core/kernels/resize_bilinear_op.cc before half_pixel_centers.
    """

    def read_at(length: int, dtype: np.dtype) -> npt.NDArray[np.floating]:
        # TensorFlow's scale is float32; the product has the precision of the parameters.
        return np.arange(size, dtype=dtype) * dtype.type(np.float32(length / size))

    return _resize_bilinear(images, read_at)


def resize_half_pixel(images: jax.Array, *, size: int = IMAGE_SIZE) -> jax.Array:
    """Resize about pixel centres, without antialiasing.

    Source: torch.nn.functional.interpolate(mode="bilinear", align_corners=False), as pytorch-fid calls it.
    """

    def read_at(length: int, dtype: np.dtype) -> npt.NDArray[np.floating]:
        scale = dtype.type(length) / dtype.type(size)
        return np.maximum((np.arange(size, dtype=dtype) + dtype.type(0.5)) * scale - dtype.type(0.5), 0)

    return _resize_bilinear(images, read_at)


def _resize_bilinear(images_byxc: jax.Array, read_at: Callable[[int, np.dtype], npt.NDArray[np.floating]]) -> jax.Array:
    """Resize columns, then rows, bilinearly.

    read_at: length and dtype of an axis -> where each new pixel is read.
    """
    if images_byxc.dtype not in _DTYPES:
        raise ValueError(f"images are {images_byxc.dtype}: make them float32 or float64 before they are resized")
    for axis in (2, 1):
        length = images_byxc.shape[axis]
        # Made at trace time, in NumPy: computed in graph, the grid would depend on how the device multiplies.
        at = read_at(length, np.dtype(images_byxc.dtype))
        lower = np.minimum(np.floor(at), length - 1).astype(np.int32)
        upper = np.minimum(lower + 1, length - 1)
        fraction = np.expand_dims((at - lower).astype(at.dtype), [a for a in range(4) if a != axis])
        low, high = (jnp.take(images_byxc, index, axis=axis, mode="clip") for index in (lower, upper))
        images_byxc = low + (high - low) * fraction
    return images_byxc


def check_feature_sets(
    reference: npt.ArrayLike, samples: npt.ArrayLike, *, least: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both sets, (n, d) and (m, d), in float64.

    Raises: ValueError if shapes do not fit, a set has fewer than `least` rows, or a number is not finite.
    """
    sets = {"reference": np.asarray(reference), "samples": np.asarray(samples)}
    for name, x in sets.items():
        if x.ndim != 2 or x.shape[1] < 1 or len(x) < least:
            raise ValueError(f"{name} has shape {x.shape}: it must be (n, d) with at least {least} rows")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds {np.sum(~np.isfinite(x))} numbers that are not finite: look at the images")
    widths = [x.shape[1] for x in sets.values()]
    if widths[0] != widths[1]:
        raise ValueError(f"reference has {widths[0]} features and samples {widths[1]}: both must come from one network")
    return sets["reference"].astype(np.float64), sets["samples"].astype(np.float64)
