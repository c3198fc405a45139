"""PSNR, SSIM and codebook usage, for a tokenizer's reconstructions; in graph.

Shapes: b batch, y x height width, c channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, SIGMA = 11, 1.5  # pixels
_K1, _K2 = 0.01, 0.03


def compare_images(originals: jax.Array, reconstructions: jax.Array) -> dict[str, jax.Array]:
    """Compute {"psnr", "ssim"} (b,) of uint8 images (b, y, x, c).

    "ssim" is left out for images smaller than its window. Raises: ValueError if shapes differ or images are not uint8.
    """
    if originals.dtype != jnp.uint8 or reconstructions.dtype != jnp.uint8:
        raise ValueError(f"images are {originals.dtype} and {reconstructions.dtype}: both must be uint8")
    metrics = {"psnr": psnr, "ssim": ssim} if min(originals.shape[1:3]) >= WINDOW else {"psnr": psnr}
    return {name: metric(originals, reconstructions, data_range=255.0) for name, metric in metrics.items()}


def psnr(a: jax.Array, b: jax.Array, *, data_range: float) -> jax.Array:
    """Compute 10 log10(data_range^2 / mean squared error) of each pair of images.

    a, b: (b, y, x, c), any dtype. data_range: the largest value minus the smallest that a pixel can have: 255 or 1.
    Returns: (b,) float32, decibels; infinite for equal images.
    Raises: ValueError (while tracing) if the shapes differ or are not of 4 dimensions.
    """
    a_byxc, b_byxc = _checked(a, b, data_range)
    return -10 * jnp.log10(jnp.mean((a_byxc - b_byxc) ** 2, axis=(1, 2, 3)))


def ssim(a: jax.Array, b: jax.Array, *, data_range: float) -> jax.Array:
    """Compute SSIM of each pair of images, mean over channels and windows.

    Equals scikit-image's `structural_similarity(..., gaussian_weights=True, use_sample_covariance=False,
    channel_axis=-1)`: a Gaussian window of 11 x 11 pixels with sigma 1.5, each channel by itself.

    Args, as in `psnr`. Returns: (b,) float32, 1 for equal images.
    Raises: ValueError as in `psnr`, or if an image is smaller than the window.
    Source: Wang et al. 2004 (IEEE Transactions on Image Processing 13, 4), equation 13.
    """
    a_byxc, b_byxc = _checked(a, b, data_range)
    if min(a_byxc.shape[1:3]) < WINDOW:
        raise ValueError(f"images of {a_byxc.shape[1]} x {a_byxc.shape[2]} pixels are smaller than SSIM's window, 11")
    # Covariances do not see a shift, and E[x^2] - E[x]^2 loses digits far from zero: 1e-4 of SSIM in a bright sky.
    shift_b11c = jnp.mean(a_byxc, axis=(1, 2), keepdims=True)
    x, y = a_byxc - shift_b11c, b_byxc - shift_b11c
    blurred = _blur(jnp.concatenate([x, y, x * x, y * y, x * y], axis=-1))
    mean_x, mean_y, xx, yy, xy = jnp.split(blurred, 5, axis=-1)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + shift_b11c, mean_y + shift_b11c
    c1, c2 = _K1**2, _K2**2  # the images are in units of data_range
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * cov + c2) / (var_x + var_y + c2), axis=(1, 2, 3))


def _blur(images_byxc: jax.Array) -> jax.Array:
    """The Gaussian window's mean wherever it fits: (b, y - 10, x - 10, c)."""
    taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    # Rows, then columns, as sums of slices: no convolution, whose default precision on a TPU is bfloat16.
    for axis in (1, 2):
        size = images_byxc.shape[axis] - WINDOW + 1
        slices = [jax.lax.slice_in_dim(images_byxc, i, i + size, axis=axis) for i in range(WINDOW)]
        images_byxc = sum((tap * part for tap, part in zip(taps, slices, strict=True)), jnp.zeros(()))
    return images_byxc


def _checked(a: jax.Array, b: jax.Array, data_range: float) -> tuple[jax.Array, jax.Array]:
    """Both in float32, in units of data_range."""
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"images are {a.shape} and {b.shape}: both must be (b, y, x, c) and alike")
    return a.astype(jnp.float32) / data_range, b.astype(jnp.float32) / data_range


def measure_code_usage(counts_v: np.ndarray) -> dict[str, float]:
    """Compute {"codebook_usage", "perplexity"} from how often each code was seen."""
    p = counts_v[counts_v > 0] / counts_v.sum()
    return {"codebook_usage": float((counts_v > 0).mean()), "perplexity": float(np.exp(-(p * np.log(p)).sum()))}
