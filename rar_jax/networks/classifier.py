"""A small convolutional classifier for images of 8x8 to 64x64 pixels with 1 or 3 channels.

Its pooled features carry `fd_classifier`, the Frechet distance used where Inception's weights are not available.
Every part is smooth: gelu, mean pools, and normalisation per image (no batch statistics).

Logical axis names: kernel_y, kernel_x, conv_in, conv_out of kernels; classifier_in, the input of the last linear layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rar_jax.config import require, require_at_least
from rar_jax.models import Aux
from rar_jax.networks.boxes import logical_axes

Params = dict[str, Any]
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
    """Residual stages, each after the first at half the resolution, then a global mean pool and a linear layer."""

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


@dataclasses.dataclass(frozen=True)
class Config:
    """A classifier and the augmentation that it is trained with.

    widths: channels of the residual stages.  features: width of the pooled features; dropout: of them, in training.
    label_smoothing: share of the target spread over all classes.
    shift: largest random translation in pixels.  flip: mirror half of the training images.
    """

    image_size: int
    channels: int
    num_classes: int
    widths: tuple[int, ...] = (32, 64)
    features: int = 64
    dropout: float = 0.1
    shift: int = 1
    flip: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), f"channels is {self.channels}: it must be 1 or 3")
        require_at_least(self, 2, "num_classes")
        require(len(self.widths) >= 1, "widths is empty: give one width a stage, as (32, 64)")
        for width in (*self.widths, self.features):
            divides = f"width {width} does not divide by the {NORM_GROUPS} normalisation groups"
            require(width > 0 and width % NORM_GROUPS == 0, divides)
        require(self.features <= 64, f"features is {self.features}: at most 64, or the distance needs too many samples")
        outside = f"shift {self.shift} is outside 0..{self.image_size - 1} (image_size - 1)"
        require(0 <= self.shift < self.image_size, outside)
        for name in ("dropout", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must be in [0, 1)")


TINY = Config(image_size=8, channels=1, num_classes=10, widths=(8, 8), features=8)


def init(config: Config, key: jax.Array) -> Params:
    """Return float32 parameters as a nested dict of plain arrays."""
    return nn.meta.unbox(_boxed(config, key))


def axes(config: Config) -> Params:
    """Return a tuple of logical axis names for each array of `init`."""
    return logical_axes(functools.partial(_boxed, config))


def decay_mask(config: Config) -> Params:
    """Return True where weight decay applies: on kernels, not biases or scales."""
    return jax.tree.map(lambda names: len(names) > 1, axes(config), is_leaf=lambda x: isinstance(x, tuple))


def loss(
    config: Config,
    params: Params,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array,
    step: jax.Array | int,
    train: bool,
    **_: Any,
) -> tuple[jax.Array, Aux]:
    """Return the mean cross-entropy of a batch in nats, and {"loss", "accuracy"}; float32 scalars.

    Args:
      batch: "images" (b, y, x, c) uint8, or float in [0, 1]; "labels" (b,) int32.
      key: for augmentation and dropout.
      train: False evaluates, without either and without label smoothing.
    """
    del step
    images_byxc, rngs, smoothing = _to_float(batch["images"]), None, 0.0
    if train:
        augment_key, dropout_key = jax.random.split(key)
        images_byxc, rngs = _augment(config, images_byxc, augment_key), {"dropout": dropout_key}
        smoothing = config.label_smoothing
    network = _network(config)
    _, logits_bc = network.apply({"params": params}, images_byxc, deterministic=not train, rngs=rngs)
    target_bc = jax.nn.one_hot(batch["labels"], config.num_classes) * (1 - smoothing) + smoothing / config.num_classes
    value = -(target_bc * jax.nn.log_softmax(logits_bc)).sum(axis=-1).mean()
    accuracy = (logits_bc.argmax(axis=-1) == batch["labels"]).mean(dtype=jnp.float32)
    return value, Aux({"loss": value, "accuracy": accuracy})


def features(config: Config, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """Return {"features": (b, f), "logits": (b, classes)}, float32, of images (b, y, x, c) uint8."""
    features_bf, logits_bc = _network(config).apply({"params": params}, _to_float(images), deterministic=True)
    return {"features": features_bf, "logits": logits_bc}


def _network(config: Config) -> Any:  # a Classifier; Any, since Flax types apply() with variables to pick apart
    return Classifier(config.num_classes, config.widths, config.features, config.dropout)


def _boxed(config: Config, key: jax.Array) -> Any:
    images_byxc = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    return _network(config).init(key, images_byxc, deterministic=True)["params"]


def _to_float(images_byxc: jax.Array) -> jax.Array:
    scale = 255.0 if images_byxc.dtype == jnp.uint8 else 1.0
    return images_byxc.astype(jnp.float32) * (2 / scale) - 1


def _augment(config: Config, images_byxc: jax.Array, key: jax.Array) -> jax.Array:
    """Shift each image by up to `shift` pixels, filling with black, and mirror half if `flip`."""
    shift_key, flip_key = jax.random.split(key)
    if config.shift:
        s = config.shift
        padded = jnp.pad(images_byxc, ((0, 0), (s, s), (s, s), (0, 0)), constant_values=-1.0)
        corners_b2 = jax.random.randint(shift_key, (images_byxc.shape[0], 2), 0, 2 * s + 1)

        def crop(image_yxc: jax.Array, corner_2: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image_yxc, (corner_2[0], corner_2[1], 0), images_byxc.shape[1:])

        images_byxc = jax.vmap(crop)(padded, corners_b2)
    if config.flip:
        flipped_b111 = jax.random.bernoulli(flip_key, shape=(images_byxc.shape[0], 1, 1, 1))
        images_byxc = jnp.where(flipped_b111, images_byxc[:, :, ::-1, :], images_byxc)
    return images_byxc
