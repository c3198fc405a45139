"""A small convolutional classifier for images of 8x8 to 64x64 pixels with 1 or 3 channels.

Its pooled features carry `fd_classifier`, the Frechet distance used where Inception's weights are not available.
It is never called FID. Every part is smooth: gelu, mean pools, and normalisation per image (no batch statistics).

Logical axis names (of these, parallel/rules.py cuts conv_out over fsdp and no other):
  kernel_y, kernel_x, conv_in, conv_out   the four axes of a convolution kernel
  classifier_in                           features entering the linear layer to the classes (its other axis has no name)
Biases and normalisation scales have the one axis None.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rar_jax.config import require
from rar_jax.networks.boxes import logical_axes, unbox

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


@dataclasses.dataclass(frozen=True)
class Config:
    """A classifier and the augmentation that it is trained with.

    image_size: pixels of the square image's side.  channels: 1 or 3.  num_classes: classes.
    widths: channels of the residual stages; each after the first halves the resolution.
    features: width of the pooled features, at most 64: a covariance of them needs more samples than that.
    dropout: share of features dropped in training.  label_smoothing: share of the target spread over all classes.
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
        require(self.num_classes >= 2, f"num_classes is {self.num_classes}: it must be at least 2")
        require(len(self.widths) >= 1, "widths is empty: give one width a stage, as (32, 64)")
        for width in (*self.widths, self.features):
            require(
                width > 0 and width % NORM_GROUPS == 0,
                f"width {width} does not divide by the {NORM_GROUPS} normalisation groups",
            )
        require(self.features <= 64, f"features is {self.features}: at most 64, or the distance needs too many samples")
        require(
            0 <= self.shift < self.image_size,
            f"shift {self.shift} is outside 0..{self.image_size - 1} (image_size - 1)",
        )
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}: it must be in [0, 1)")
        require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}: it must be in [0, 1)")


TINY = Config(image_size=8, channels=1, num_classes=10, widths=(8, 8), features=8)


def init(config: Config, key: jax.Array) -> Params:
    """Float32 parameters as a nested dict of plain arrays."""
    return unbox(_boxed(config, key))


def axes(config: Config) -> Params:
    """The tree of `init` with a tuple of logical axis names for each array (see above)."""
    return logical_axes(functools.partial(_boxed, config))


def decay_mask(config: Config) -> Params:
    """The tree of `init` with True for what weight decay applies to: kernels, not biases or scales."""
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: x.ndim > 1, shapes)


def loss(
    config: Config, params: Params, batch: Mapping[str, jax.Array], *, key: jax.Array | None, step: jax.Array | int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats, mean over the batch.

    Args:
      params: from `init`.
      batch: "images" (b, y, x, c) uint8, or float in [0, 1]; "labels" (b,) int32.
      key: for augmentation and dropout; None evaluates without either and without label smoothing.
      step: not used; part of the contract of the training loop.

    Returns: the () float32 loss, and {"loss", "accuracy"}, each () float32.
    """
    del step
    images_byxc = _to_float(batch["images"])
    if key is None:
        _, logits_bc = _network(config).apply({"params": params}, images_byxc, deterministic=True)
    else:
        augment_key, dropout_key = jax.random.split(key)
        images_byxc = _augment(config, images_byxc, augment_key)
        _, logits_bc = _network(config).apply(
            {"params": params}, images_byxc, deterministic=False, rngs={"dropout": dropout_key}
        )
    smoothing = 0.0 if key is None else config.label_smoothing
    target_bc = jax.nn.one_hot(batch["labels"], config.num_classes) * (1 - smoothing) + smoothing / config.num_classes
    value = -(target_bc * jax.nn.log_softmax(logits_bc)).sum(axis=-1).mean()
    accuracy = (logits_bc.argmax(axis=-1) == batch["labels"]).mean(dtype=jnp.float32)
    return value, {"loss": value, "accuracy": accuracy}


def features(config: Config, params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """What evaluation asks for: images (b, y, x, c) uint8 -> {"features": (b, f), "logits": (b, classes)}, float32."""
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
    """Shifts each image by up to `shift` pixels either way, zeros (black) coming in, and mirrors half if asked."""
    shift_key, flip_key = jax.random.split(key)
    if config.shift:
        s = config.shift
        # The images are in [-1, 1] by now, so -1 is the pixel value 0.
        padded = jnp.pad(images_byxc, ((0, 0), (s, s), (s, s), (0, 0)), constant_values=-1.0)
        corners_b2 = jax.random.randint(shift_key, (images_byxc.shape[0], 2), 0, 2 * s + 1)

        def crop(image_yxc: jax.Array, corner_2: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image_yxc, (corner_2[0], corner_2[1], 0), images_byxc.shape[1:])

        images_byxc = jax.vmap(crop)(padded, corners_b2)
    if config.flip:
        flipped_b111 = jax.random.bernoulli(flip_key, shape=(images_byxc.shape[0], 1, 1, 1))
        images_byxc = jnp.where(flipped_b111, images_byxc[:, :, ::-1, :], images_byxc)
    return images_byxc
