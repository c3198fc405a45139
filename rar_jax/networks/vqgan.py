"""Encoder and decoder of the MaskGIT-VQGAN: a plain convolutional autoencoder without attention.

Source: MaskGIT (arXiv 2202.04200) with the details of the released ImageNet f16 file. The names of the
submodules are the released keys with "_" for "." around numbers ("down_0_block_1" is "down.0.block.1").

Shape suffixes: b batch, y height, x width, c image channels, d feature width, z latent width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def _conv(features: int, size: int, name: str, dtype: Any, *, bias: bool = True, shard: bool = True) -> nn.Conv:
    """Convolution of stride 1 whose kernel (size, size, in, out) carries its logical axes."""
    axes = ("kernel_y", "kernel_x", "conv_in", "conv_out" if shard else None)
    return nn.Conv(
        features,
        (size, size),
        padding="SAME",
        use_bias=bias,
        dtype=dtype,
        # float32 means float32 on TPUs too, where the default is one bfloat16 pass: tokens depend on it.
        precision=jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes),
        name=name,
    )


def _norm_silu(x_byxd: jax.Array, name: str, dtype: Any) -> jax.Array:
    # The fast variance E[x^2]-E[x]^2 cancels where the mean is large, as it is after many residual blocks.
    groups = min(32, x_byxd.shape[-1])
    norm = nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)
    return nn.silu(norm(x_byxd))


class ResidualBlock(nn.Module):
    """(GroupNorm, SiLU, conv3x3) twice, with the released shortcut where the width changes."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        """Maps (B, H, W, any) to (B, H, W, width) in `dtype`."""
        h_byxd = _conv(self.width, 3, "conv1", self.dtype, bias=False)(_norm_silu(x_byxd, "norm1", self.dtype))
        h_byxd = _conv(self.width, 3, "conv2", self.dtype, bias=False)(_norm_silu(h_byxd, "norm2", self.dtype))
        if x_byxd.shape[-1] == self.width:
            return x_byxd + h_byxd
        # Not x + ...: the released weights were trained with the shortcut on the transformed activations.
        return h_byxd + _conv(self.width, 1, "nin_shortcut", self.dtype, bias=False)(h_byxd)


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
        h = _conv(self.base_width, 3, "conv_in", self.dtype, bias=False)(images_byxc.astype(self.dtype))
        for i, width in enumerate(widths):
            if i > 0:
                h = nn.avg_pool(h, (2, 2), (2, 2))
            for j in range(self.blocks_per_level):
                h = ResidualBlock(width, self.dtype, name=f"down_{i}_block_{j}")(h)
        for j in range(self.blocks_per_level):
            h = ResidualBlock(widths[-1], self.dtype, name=f"mid_{j}")(h)
        return _conv(self.latent_width, 1, "conv_out", self.dtype)(_norm_silu(h, "norm_out", self.dtype))


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
        h = _conv(widths[-1], 3, "conv_in", self.dtype)(latents_byxz.astype(self.dtype))
        for j in range(self.blocks_per_level):
            h = ResidualBlock(widths[-1], self.dtype, name=f"mid_{j}")(h)
        for i, width in reversed(list(enumerate(widths))):
            for j in range(self.blocks_per_level):
                h = ResidualBlock(width, self.dtype, name=f"up_{i}_block_{j}")(h)
            if i > 0:
                h = _conv(width, 3, f"up_{i}_upsample_conv", self.dtype)(upsample(h))
        h = _norm_silu(h, "norm_out", self.dtype)
        # One or three channels divide over no mesh: this kernel stays whole.
        return _conv(self.channels, 3, "conv_out", self.dtype, shard=False)(h)


def upsample(x_byxd: jax.Array) -> jax.Array:
    """Doubles height and width by repeating each pixel: (B, H, W, D) to (B, 2H, 2W, D)."""
    b, y, x, d = x_byxd.shape
    doubled = jnp.broadcast_to(x_byxd[:, :, None, :, None, :], (b, y, 2, x, 2, d))
    return doubled.reshape(b, 2 * y, 2 * x, d)
