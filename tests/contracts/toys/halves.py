"""A tokenizer of factorised ids (n, 2): of each patch of pixels, the nearest code of its upper and of its lower half.

Shape suffixes: b batch, n patches, t halves, p pixels of a half, v codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.models import Aux, TokenSpec

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """patch: an even number of pixels along its side."""

    image_size: int = 8
    channels: int = 1
    patch: int = 2
    codebook_size: int = 16
    dtype: str = "float32"

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch


TINY = Config()


def token_spec(config: Config) -> TokenSpec:
    """Ids (n, 2)."""
    return TokenSpec((config.grid**2, 2), "int32", config.codebook_size)


def image_spec(config: Config) -> jax.ShapeDtypeStruct:
    """One image: float32 (h, w, c)."""
    return jax.ShapeDtypeStruct((config.image_size, config.image_size, config.channels), jnp.float32)


def init(config: Config, key: jax.Array) -> Params:
    """Return a codebook for each half."""
    return {"codes": jax.random.uniform(key, (2, config.codebook_size, config.patch**2 // 2 * config.channels))}


def axes(config: Config) -> dict[str, Any]:
    """Logical axes."""
    return {"codes": (None, None, None)}


def decay_mask(config: Config) -> dict[str, bool]:
    """No weight decay."""
    return {"codes": False}


def encode(config: Config, params: Params, images: jax.Array) -> jax.Array:
    """Return ids (b, n, 2) int32 of images, float in [0, 1] or uint8."""
    return jnp.argmin(_distances(config, params, images), axis=-1).astype(jnp.int32)


def decode(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """Return images (b, h, w, c) in [0, 1]."""
    g, p = config.grid, config.patch
    halves = jnp.stack([params["codes"][t][tokens[..., t]] for t in range(2)], axis=2)
    patches = halves.reshape(-1, g, g, p, p, config.channels).transpose(0, 1, 3, 2, 4, 5)
    return jnp.clip(patches.reshape(-1, g * p, g * p, config.channels), 0.0, 1.0)


def loss(config: Config, params: Params, batch: Mapping[str, jax.Array], **_: Any) -> tuple[jax.Array, Aux]:
    """Return the mean squared distance to the nearest code."""
    value = jnp.mean(jnp.min(_distances(config, params, batch["images"]), axis=-1))
    return value, Aux({"loss": value})


def _distances(config: Config, params: Params, images: jax.Array) -> jax.Array:
    """Squared (b, n, t, v)."""
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    g, p = config.grid, config.patch
    patches = (images.astype(jnp.float32) / scale).reshape(-1, g, p, g, p, config.channels).transpose(0, 1, 3, 2, 4, 5)
    halves_bntp = patches.reshape(-1, g * g, 2, p * p // 2 * config.channels)
    return jnp.sum(jnp.square(halves_bntp[:, :, :, None] - params["codes"][None, None]), axis=-1)
