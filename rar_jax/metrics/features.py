"""Images to Inception features, in graph: resize, then the network, in the precision of the parameters.

Two protocols of resizing are in use, and their numbers must not be compared:
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


def features(params: Mapping[str, Any], images: jax.Array, *, resize: str = "tf1") -> dict[str, jax.Array]:
    """What FID, sFID, the Inception score, precision and recall are made of; jittable, each image by itself.

    Args:
      params: from `interop.inception.load`. Their dtype, float32 or float64, is that of the computation; float64 needs
        jax_enable_x64.
      images: (b, y, x, c) uint8 of any size; c is 3, or 1 for grey images, which count as three equal channels.
      resize: "tf1" or "pytorch_fid".

    Returns: {"pool3": (b, 2048), "spatial": (b, 2023), "logits": (b, 1008; without the bias)}.
    Raises: ConfigError for an unknown resize; ValueError for images or parameters of another shape or dtype.
    Source: openai/guided-diffusion, evaluations/evaluator.py.
    """
    require(resize in RESIZES, f"resize is '{resize}': it must be 'tf1' or 'pytorch_fid'.{nearest(resize, RESIZES)}")
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images are {images.dtype} {images.shape}: features take uint8 (batch, height, width, 1 or 3 channels)"
        )
    if 0 in images.shape[1:3]:
        raise ValueError(f"images are without pixels: {images.shape}")
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


# ---------------------------------------------------------------- resizing


def resize_tf1(images: jax.Array, *, size: int = IMAGE_SIZE) -> jax.Array:
    """TensorFlow 1's bilinear resize without align_corners: (b, y, x, c) float32 or float64 -> (b, size, size, c).

    Pixel i is read at i * in / size, so that the image moves by half a pixel: half of the FID's definition.
    Source: tensorflow/core/kernels/resize_bilinear_op.cc before half_pixel_centers.
    """

    def places(length: int, dtype: np.dtype) -> npt.NDArray[np.floating]:
        # TensorFlow's scale is float32; the product has the precision of the parameters.
        return np.arange(size, dtype=dtype) * dtype.type(np.float32(length / size))

    return _bilinear(images, places)


def resize_half_pixel(images: jax.Array, *, size: int = IMAGE_SIZE) -> jax.Array:
    """Bilinear resize about pixel centres, without antialiasing: (b, y, x, c) float32 or float64 -> (b, size, size, c).

    Source: torch.nn.functional.interpolate(mode="bilinear", align_corners=False), as pytorch-fid calls it.
    """

    def places(length: int, dtype: np.dtype) -> npt.NDArray[np.floating]:
        scale = dtype.type(length) / dtype.type(size)
        return np.maximum((np.arange(size, dtype=dtype) + dtype.type(0.5)) * scale - dtype.type(0.5), 0)

    return _bilinear(images, places)


# Length and dtype of an axis -> where on it each new pixel is read.
Places = Callable[[int, np.dtype], npt.NDArray[np.floating]]


def _bilinear(images_byxc: jax.Array, places: Places) -> jax.Array:
    """Columns first, then rows, as the two protocols do. Raises: ValueError for other dtypes than floats."""
    if images_byxc.dtype not in _DTYPES:
        raise ValueError(f"images are {images_byxc.dtype}: make them float32 or float64 before they are resized")
    for axis in (2, 1):
        length = images_byxc.shape[axis]
        # Made at trace time, in NumPy: computed in graph, the grid would depend on how the device multiplies.
        at = places(length, np.dtype(images_byxc.dtype))
        lower = np.minimum(np.floor(at), length - 1).astype(np.int32)
        upper = np.minimum(lower + 1, length - 1)
        fraction = np.expand_dims((at - lower).astype(at.dtype), [a for a in range(4) if a != axis])
        low, high = (jnp.take(images_byxc, index, axis=axis, mode="clip") for index in (lower, upper))
        images_byxc = low + (high - low) * fraction
    return images_byxc
