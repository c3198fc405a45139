"""Encoder and decoder of the MaskGIT-VQGAN: a plain convolutional autoencoder without attention.

Source: MaskGIT (arXiv 2202.04200) with the details of the released ImageNet f16 file. The names of the
submodules are the released keys with "_" for "." around numbers ("down_0_block_1" is "down.0.block.1").

Shape suffixes: b batch, y height, x width, c image channels, d feature width, z latent width, v codes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

CODES_AT_A_TIME = 4096  # distances to all 2**18 codes of the largest tables would take gigabytes


def nearest_codes(codebook_vz: jax.Array, latents_bnz: jax.Array) -> jax.Array:
    """Return the index of the nearest code, int32 (b, n); of equally near ones the first. No gradient passes.

    Distances are float32, to `CODES_AT_A_TIME` codes at a time.
    """
    codes_vz, latents_bnz = jax.lax.stop_gradient((jnp.asarray(codebook_vz, jnp.float32), latents_bnz))
    size, width = codes_vz.shape
    # |z|^2 is the same for all codes; leaving it out also keeps the differences between codes exact.
    norms_v = jnp.sum(jnp.square(codes_vz), axis=1)

    def nearest(codes_vz: jax.Array, norms_v: jax.Array) -> tuple[jax.Array, jax.Array]:
        products_bnv = jnp.einsum("bnz,vz->bnv", latents_bnz, codes_vz, precision=jax.lax.Precision.HIGHEST)
        distances_bnv = norms_v[None, None, :] - 2.0 * products_bnv
        return jnp.min(distances_bnv, axis=-1), jnp.argmin(distances_bnv, axis=-1).astype(jnp.int32)

    if size <= CODES_AT_A_TIME:
        return nearest(codes_vz, norms_v)[1]

    def closer(best: tuple[jax.Array, jax.Array], part: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        first, codes_vz, norms_v = part
        distances_bn, ids_bn = nearest(codes_vz, norms_v)
        is_closer_bn = distances_bn < best[0]
        return (jnp.where(is_closer_bn, distances_bn, best[0]), jnp.where(is_closer_bn, first + ids_bn, best[1])), None

    padding = -size % CODES_AT_A_TIME  # no latent is near to codes of infinite norm
    codes = jnp.pad(codes_vz, ((0, padding), (0, 0))).reshape(-1, CODES_AT_A_TIME, width)
    norms = jnp.pad(norms_v, (0, padding), constant_values=jnp.inf).reshape(-1, CODES_AT_A_TIME)
    firsts = jnp.arange(len(norms), dtype=jnp.int32) * CODES_AT_A_TIME
    none = jnp.full(latents_bnz.shape[:-1], jnp.inf), jnp.zeros(latents_bnz.shape[:-1], jnp.int32)
    return jax.lax.scan(closer, none, (firsts, codes, norms))[0][1]


class Conv(nn.Module):
    """Convolution of stride 1 that keeps the size; its kernel (size, size, in, features) carries its logical axes.

    With `double`, the input is first upsampled 2 x 2 (nearest), in 4/9 of the arithmetic: each of the four output
    pixels has a 2 x 2 kernel.
    """

    features: int
    size: int
    dtype: Any
    bias: bool = True
    shard: bool = True
    double: bool = False

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        axes = ("kernel_y", "kernel_x", "conv_in", "conv_out" if self.shard else None)
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
        shape = (self.size, self.size, x_byxd.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", init, shape, jnp.float32))
        x_byxd = x_byxd.astype(self.dtype)
        y_byxd = _doubled(x_byxd, kernel) if self.double else _same(x_byxd, kernel)
        if not self.bias:
            return y_byxd
        bias_d = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y_byxd + jnp.asarray(bias_d, self.dtype)[None, None, None, :]


def _convolve(x_byxd: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    # float32 means float32 on TPUs too, where the default is one bfloat16 pass: tokens depend on it.
    precision = jax.lax.Precision.HIGHEST if x_byxd.dtype == jnp.float32 else None
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = kernel.astype(x_byxd.dtype)
    return jax.lax.conv_general_dilated(x_byxd, kernel, (1, 1), padding, dimension_numbers=numbers, precision=precision)


def _same(x_byxd: jax.Array, kernel: jax.Array) -> jax.Array:
    side, rows = kernel.shape[0] // 2, x_byxd.shape[1]
    if side == 0 or rows < 128:
        return _convolve(x_byxd, kernel, "SAME")
    # One extra row, cropped afterwards, selects a faster XLA:CPU convolution (docs/measurements/tokenizer.md).
    return _convolve(x_byxd, kernel, ((side, side + 1), (side, side)))[:, :rows]


def _doubled(x_byxd: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve 3 x 3 the input upsampled 2 x 2."""

    def two_taps(kernel: jax.Array, axis: int, place: int) -> jax.Array:
        first, second, third = jnp.split(kernel, 3, axis)
        return jnp.concatenate([first + second, third] if place else [first, second + third], axis)

    def pixels(row: int, column: int) -> jax.Array:
        kernel_of_place = two_taps(two_taps(kernel, 0, row), 1, column)
        return _convolve(x_byxd, kernel_of_place, ((1 - row, row), (1 - column, column)))

    rows = [jnp.stack([pixels(row, 0), pixels(row, 1)], axis=3) for row in (0, 1)]  # (b, y, x, 2, d)
    b, y, x, _, d = rows[0].shape
    return jnp.stack(rows, axis=2).reshape(b, 2 * y, 2 * x, d)


class NormSilu(nn.Module):
    """GroupNorm of 32 groups (one a channel where there are fewer), eps 1e-6, then SiLU. Statistics in float32.

    Sums go over rows, then columns, then the channels of a group: one sum over all takes XLA:CPU 2.5 times as long.
    Two passes: E[x^2] - E[x]^2 cancels where the mean is large, as it is after many residual blocks.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        batch, width = x_byxd.shape[0], x_byxd.shape[-1]
        scale_d = jnp.asarray(self.param("scale", nn.initializers.ones, (width,), jnp.float32))
        bias_d = jnp.asarray(self.param("bias", nn.initializers.zeros, (width,), jnp.float32))
        groups = min(32, width)

        def mean(x_byxd: jax.Array) -> jax.Array:
            mean_bg = x_byxd.mean(axis=2).mean(axis=1).reshape(batch, groups, -1).mean(axis=-1)
            return jnp.repeat(mean_bg, width // groups, axis=1)[:, None, None]

        x_byxd = x_byxd.astype(jnp.float32)
        x_byxd = x_byxd - mean(x_byxd)
        factor_b11d = jax.lax.rsqrt(mean(jnp.square(x_byxd)) + 1e-6) * scale_d[None, None, None]
        return nn.silu((x_byxd * factor_b11d + bias_d[None, None, None]).astype(self.dtype))


class ResidualBlock(nn.Module):
    """(GroupNorm, SiLU, conv3x3) twice, with the released shortcut where the width changes; in `dtype`."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        h_byxd = Conv(self.width, 3, self.dtype, bias=False, name="conv1")(NormSilu(self.dtype, name="norm1")(x_byxd))
        h_byxd = Conv(self.width, 3, self.dtype, bias=False, name="conv2")(NormSilu(self.dtype, name="norm2")(h_byxd))
        if x_byxd.shape[-1] == self.width:
            return x_byxd + h_byxd
        # Not x + ...: the released weights were trained with the shortcut on the transformed activations.
        return h_byxd + Conv(self.width, 1, self.dtype, bias=False, name="nin_shortcut")(h_byxd)


class Encoder(nn.Module):
    """Images to latents. One level keeps the resolution; each further level halves it."""

    base_width: int
    width_multipliers: tuple[int, ...]
    blocks_per_level: int
    latent_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images_byxc: jax.Array) -> jax.Array:
        """Maps images (B, H, W, C) float, H and W divisible by f = 2^(levels-1), to (B, H/f, W/f, latent_width)."""
        widths = [self.base_width * m for m in self.width_multipliers]
        h = Conv(self.base_width, 3, self.dtype, bias=False, name="conv_in")(images_byxc)
        for i, width in enumerate(widths):
            if i > 0:
                h = nn.avg_pool(h, (2, 2), (2, 2))
            for j in range(self.blocks_per_level):
                h = ResidualBlock(width, self.dtype, name=f"down_{i}_block_{j}")(h)
        for j in range(self.blocks_per_level):
            h = ResidualBlock(widths[-1], self.dtype, name=f"mid_{j}")(h)
        return Conv(self.latent_width, 1, self.dtype, name="conv_out")(NormSilu(self.dtype, name="norm_out")(h))


class Decoder(nn.Module):
    """Latents to images, not clipped. Level 0 is the highest resolution and comes last."""

    base_width: int
    width_multipliers: tuple[int, ...]
    blocks_per_level: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents_byxz: jax.Array) -> jax.Array:
        """Maps latents (B, h, w, z) float to images (B, h*f, w*f, channels) in `dtype`, f = 2^(levels-1)."""
        widths = [self.base_width * m for m in self.width_multipliers]
        h = Conv(widths[-1], 3, self.dtype, name="conv_in")(latents_byxz)
        for j in range(self.blocks_per_level):
            h = ResidualBlock(widths[-1], self.dtype, name=f"mid_{j}")(h)
        for i, width in reversed(list(enumerate(widths))):
            for j in range(self.blocks_per_level):
                h = ResidualBlock(width, self.dtype, name=f"up_{i}_block_{j}")(h)
            if i > 0:
                h = Conv(width, 3, self.dtype, double=True, name=f"up_{i}_upsample_conv")(h)
        h = NormSilu(self.dtype, name="norm_out")(h)
        # One or three channels divide over no mesh: this kernel stays whole.
        return Conv(self.channels, 3, self.dtype, shard=False, name="conv_out")(h)
