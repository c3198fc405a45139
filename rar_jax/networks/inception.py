"""The Inception network of 2015-12-05 that FID is defined by, for evaluation only, with BatchNorm in the kernels.

It is not the Inception v3 of today's libraries: average pools divide by the real pixels under the window, the last
block's pool is a maximum, there are 1008 classes, and BatchNorm's epsilon is 1e-3 (weights/inception.py folds it).
Source: "Rethinking the Inception Architecture" (arXiv 1512.00567) as the TensorFlow graph of 2015-12-05 has it. The
names of the submodules are those of the released PyTorch copies.

Shape suffixes: b batch, y height, x width, c image channels, d feature width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGE_SIZE = 299
POOL3, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008  # widths of what the network gives
_SPATIAL_CHANNELS = 7
_HIGHEST = jax.lax.Precision.HIGHEST  # features must not depend on the device


class ConvNormRelu(nn.Module):
    """Convolution with bias, then ReLU."""

    width: int
    size: tuple[int, int] = (1, 1)  # height, width
    stride: int = 1
    valid: bool = False  # no padding; else half the kernel's size on each side

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        shape = (*self.size, x_byxd.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, x_byxd.dtype)
        bias_d = self.param("bias", nn.initializers.zeros, (self.width,), x_byxd.dtype)
        # XLA's CPU convolution takes twice as long as a product for 1x1, and for float64 it is a scalar loop.
        as_products = self.size == (1, 1) or x_byxd.dtype == jnp.float64
        y_byxd = self._products(x_byxd, kernel) if as_products else self._convolve(x_byxd, kernel)
        return nn.relu(y_byxd + bias_d[None, None, None, :])

    def _products(self, x_byxd: jax.Array, kernel: jax.Array) -> jax.Array:
        sides = [0 if self.valid else k // 2 for k in self.size]
        x_byxd = jnp.pad(x_byxd, ((0, 0), (sides[0], sides[0]), (sides[1], sides[1]), (0, 0)))
        ends = [n - k + 1 for n, k in zip(x_byxd.shape[1:3], self.size, strict=True)]
        under = [
            x_byxd[:, dy : dy + ends[0] : self.stride, dx : dx + ends[1] : self.stride]
            for dy in range(self.size[0])
            for dx in range(self.size[1])
        ]
        flat = kernel.reshape(-1, self.width)
        return jnp.einsum("byxd,de->byxe", jnp.concatenate(under, axis=-1), flat, precision=_HIGHEST)

    def _convolve(self, x_byxd: jax.Array, kernel: jax.Array) -> jax.Array:
        sides = [0 if self.valid else k // 2 for k in self.size]
        # One extra row of zeros (and one column, if valid), cropped afterwards, selects a faster XLA:CPU convolution
        # (docs/measurements/inception.md).
        padding = [(sides[0], sides[0] + 1), (sides[1], sides[1] + self.valid)]
        strides, numbers = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        y_byxd = jax.lax.conv_general_dilated(
            x_byxd, kernel, strides, padding, dimension_numbers=numbers, precision=_HIGHEST
        )
        sizes = zip(x_byxd.shape[1:3], sides, self.size, strict=True)
        y, x = ((n + 2 * side - k) // self.stride + 1 for n, side, k in sizes)
        return y_byxd[:, :y, :x]


def _branch(x_byxd: jax.Array, name: str, *layers: tuple[Any, ...]) -> jax.Array:
    """Apply the convolutions name_1, name_2, ..., each of them the arguments of `ConvNormRelu`."""
    for i, layer in enumerate(layers, start=1):
        x_byxd = ConvNormRelu(*layer, name=f"{name}_{i}")(x_byxd)
    return x_byxd


class Mixed5(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, average pool. (b, 35, 35, any) -> (b, 35, 35, 224 + pool_width)."""

    pool_width: int

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        one = ConvNormRelu(64, name="branch1x1")(x_byxd)
        five = _branch(x_byxd, "branch5x5", (48,), (64, (5, 5)))
        double = _branch(x_byxd, "branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3)))
        pool = ConvNormRelu(self.pool_width, name="branch_pool")(average_pool(x_byxd))
        return jnp.concatenate([one, five, double, pool], axis=-1)


class Mixed6a(nn.Module):
    """(b, 35, 35, 288) -> (b, 17, 17, 768)."""

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        three = ConvNormRelu(384, (3, 3), stride=2, valid=True, name="branch3x3")(x_byxd)
        double = _branch(x_byxd, "branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2, True))
        return jnp.concatenate([three, double, max_pool(x_byxd, stride=2)], axis=-1)


class Mixed6(nn.Module):
    """17x17: 1x1, 7x7 as two, 7x7 twice as four, average pool. (b, 17, 17, 768) -> the same; 1x1 comes first in it."""

    width: int  # of the factored convolutions

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        width, row, column = self.width, (1, 7), (7, 1)
        one = ConvNormRelu(192, name="branch1x1")(x_byxd)
        seven = _branch(x_byxd, "branch7x7", (width,), (width, row), (192, column))
        factors = (width,), (width, column), (width, row), (width, column), (192, row)
        double = _branch(x_byxd, "branch7x7dbl", *factors)
        pool = ConvNormRelu(192, name="branch_pool")(average_pool(x_byxd))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class Mixed7a(nn.Module):
    """(b, 17, 17, 768) -> (b, 8, 8, 1280)."""

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        three = _branch(x_byxd, "branch3x3", (192,), (320, (3, 3), 2, True))
        seven = _branch(x_byxd, "branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, True))
        return jnp.concatenate([three, seven, max_pool(x_byxd, stride=2)], axis=-1)


class Mixed7(nn.Module):
    """8x8: 1x1, 3x3 split in two, 3x3 and the same split, pool. (b, 8, 8, any) -> (b, 8, 8, 2048)."""

    pool_is_max: bool  # in the last block, which may have been a slip in 2015; FID keeps it

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        one = ConvNormRelu(320, name="branch1x1")(x_byxd)
        three = ConvNormRelu(384, name="branch3x3_1")(x_byxd)
        three_a = ConvNormRelu(384, (1, 3), name="branch3x3_2a")(three)
        three_b = ConvNormRelu(384, (3, 1), name="branch3x3_2b")(three)
        double = _branch(x_byxd, "branch3x3dbl", (448,), (384, (3, 3)))
        double_a = ConvNormRelu(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_b = ConvNormRelu(384, (3, 1), name="branch3x3dbl_3b")(double)
        pooled = max_pool(x_byxd, stride=1, padding=1) if self.pool_is_max else average_pool(x_byxd)
        pool = ConvNormRelu(192, name="branch_pool")(pooled)
        return jnp.concatenate([one, three_a, three_b, double_a, double_b, pool], axis=-1)


class Classes(nn.Module):
    """Linear layer without the bias, which the Inception score leaves out."""

    @nn.compact
    def __call__(self, x_bd: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x_bd.shape[-1], CLASSES), x_bd.dtype)
        return jnp.matmul(x_bd, kernel, precision=_HIGHEST)


class Inception(nn.Module):
    """Images of 299 pixels to the three things that evaluation asks for."""

    @nn.compact
    def __call__(self, images_byxc: jax.Array) -> dict[str, jax.Array]:
        """Map images (b, 299, 299, 3) in about [-1, 1] to

        "pool3" (b, 2048): mean of the last block.  "logits" (b, 1008): of pool3, without the bias.
        "spatial" (b, 2023): the first 7 channels of Mixed_6d's 1x1 branch, flattened in (row, column, channel) order.
        """
        x = ConvNormRelu(32, (3, 3), stride=2, valid=True, name="Conv2d_1a_3x3")(images_byxc)
        x = ConvNormRelu(32, (3, 3), valid=True, name="Conv2d_2a_3x3")(x)
        x = max_pool(ConvNormRelu(64, (3, 3), name="Conv2d_2b_3x3")(x), stride=2)
        x = ConvNormRelu(80, name="Conv2d_3b_1x1")(x)
        x = max_pool(ConvNormRelu(192, (3, 3), valid=True, name="Conv2d_4a_3x3")(x), stride=2)
        x = Mixed5(32, name="Mixed_5b")(x)
        x = Mixed5(64, name="Mixed_5c")(x)
        x = Mixed5(64, name="Mixed_5d")(x)
        x = Mixed6a(name="Mixed_6a")(x)
        x = Mixed6(128, name="Mixed_6b")(x)
        x = Mixed6(160, name="Mixed_6c")(x)
        x = Mixed6(160, name="Mixed_6d")(x)
        # TensorFlow's mixed_6/conv. Several public ports take Mixed_6e, whose sFID is another number.
        spatial = x[..., :_SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = Mixed6(192, name="Mixed_6e")(x)
        x = Mixed7a(name="Mixed_7a")(x)
        x = Mixed7(pool_is_max=False, name="Mixed_7b")(x)
        x = Mixed7(pool_is_max=True, name="Mixed_7c")(x)
        pool3 = x.mean(axis=(1, 2))
        return {"pool3": pool3, "spatial": spatial, "logits": Classes(name="fc")(pool3)}


# Pools as sums and maxima of shifted slices: XLA's reduce_window made the network 4 to 10 % slower on a CPU.


def average_pool(x_byxd: jax.Array) -> jax.Array:
    """Mean over 3x3, stride 1, the same size; at the border the mean of the pixels that are there."""
    # In NumPy, at trace time: XLA spends 10 to 20 s in folding the same constant from reduce_window(ones).
    places = [np.arange(size) for size in x_byxd.shape[1:3]]
    rows_y, columns_x = (3 - (i == 0) - (i == i.size - 1) for i in places)
    share_yx = (1 / np.outer(rows_y, columns_x)).astype(x_byxd.dtype)
    total_byxd = jnp.pad(x_byxd, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (1, 2):
        first, second, third = _thirds(total_byxd, axis=axis, stride=1)
        total_byxd = first + second + third
    return total_byxd * share_yx[None, :, :, None]


def max_pool(x_byxd: jax.Array, *, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over 3x3; (b, y, x, d) -> (b, (y + 2 padding - 3) // stride + 1, the same of x, d)."""
    sides = (padding, padding)
    x_byxd = jnp.pad(x_byxd, ((0, 0), sides, sides, (0, 0)), constant_values=-np.inf)
    for axis in (1, 2):
        first, second, third = _thirds(x_byxd, axis=axis, stride=stride)
        x_byxd = jnp.maximum(jnp.maximum(first, second), third)
    return x_byxd


def _thirds(x: jax.Array, *, axis: int, stride: int) -> list[jax.Array]:
    """The first, second and third element under a window of 3 along an axis, each for all places of the window."""
    last = (x.shape[axis] - 3) // stride * stride
    return [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(3)]
