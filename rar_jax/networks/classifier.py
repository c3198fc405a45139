"""A small convolutional classifier for small images (8x8 to 64x64, 1 or 3 channels).

Its pooled features carry a Frechet distance where no Inception weights can be had, so every part of it
is smooth: gelu, mean pools, and normalisation per image (no batch statistics).

Logical axis names (of these, parallel/rules.py cuts conv_out over fsdp and no other):
  kernel_y, kernel_x, conv_in, conv_out   the four axes of a convolution kernel
  classifier_in                           features entering the linear layer to the classes (its other axis has no name)
Biases and normalisation scales have the one axis None.
"""

from __future__ import annotations

import jax
from flax import linen as nn

NORM_GROUPS = 4  # every width must divide by it
_HIGHEST = jax.lax.Precision.HIGHEST  # the features must not depend on the device; the network is tiny

_conv_init = nn.with_logical_partitioning(
    nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal"), ("kernel_y", "kernel_x", "conv_in", "conv_out")
)
_dense_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("classifier_in", None))
_zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
_ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))


def _conv(width: int, size: int, name: str) -> nn.Conv:
    return nn.Conv(width, (size, size), precision=_HIGHEST, kernel_init=_conv_init, bias_init=_zeros, name=name)


def _norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, scale_init=_ones, bias_init=_zeros, name=name)


class Stage(nn.Module):
    """One residual block: (b, y, x, in) -> (b, y, x, width)."""

    width: int

    @nn.compact
    def __call__(self, x_byxd: jax.Array) -> jax.Array:
        h_byxd = _conv(self.width, 3, "conv1")(nn.gelu(_norm("norm1")(x_byxd)))
        h_byxd = _conv(self.width, 3, "conv2")(nn.gelu(_norm("norm2")(h_byxd)))
        if x_byxd.shape[-1] != self.width:
            x_byxd = _conv(self.width, 1, "shortcut")(x_byxd)
        return x_byxd + h_byxd


class Classifier(nn.Module):
    """Residual stages, each after the first at half the resolution, then a global mean pool and a linear layer.

    Fields: widths, one per stage; features, width of the pooled layer; num_classes; dropout of the features.
    """

    num_classes: int
    widths: tuple[int, ...]
    features: int
    dropout: float

    @nn.compact
    def __call__(self, images_byxc: jax.Array, *, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """images (b, y, x, c) float about [-1, 1] -> features (b, features), logits (b, num_classes), float32.

        Needs a "dropout" rng unless deterministic or dropout is 0.
        """
        x_byxd = _conv(self.widths[0], 3, "stem")(images_byxc)
        for i, width in enumerate(self.widths):
            if i > 0:
                # "SAME" keeps the odd last row of 7x7; the divisor counts its real pixels only.
                x_byxd = nn.avg_pool(x_byxd, (2, 2), (2, 2), padding="SAME", count_include_pad=False)
            x_byxd = Stage(width, name=f"stage{i}")(x_byxd)
        x_byxd = _conv(self.features, 1, "head")(nn.gelu(_norm("norm")(x_byxd)))
        features_bf = nn.gelu(_norm("head_norm")(x_byxd)).mean(axis=(1, 2))
        kept_bf = nn.Dropout(self.dropout, deterministic=deterministic)(features_bf)
        logits = nn.Dense(
            self.num_classes, precision=_HIGHEST, kernel_init=_dense_init, bias_init=_zeros, name="classes"
        )
        return features_bf, logits(kept_bf)
