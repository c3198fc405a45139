"""A tokenizer of floats with a posterior: a patch of pixels to the mean and log variance of a few latents, and back.

Shape suffixes: b batch, y x places, p pixels of a patch, z latent width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.models import Aux, TokenSpec

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """kl_weight: of the KL divergence from the posterior to a standard normal."""

    image_size: int = 8
    channels: int = 1
    patch: int = 2
    latent_width: int = 4
    kl_weight: float = 1e-4
    dtype: str = "float32"

    @property
    def grid(self) -> int:
        """Places along one side."""
        return self.image_size // self.patch


TINY = Config()


def token_spec(config: Config) -> TokenSpec:
    """Latents (y, x, z)."""
    return TokenSpec((config.grid, config.grid, config.latent_width), "float32")


def store_spec(config: Config) -> TokenSpec:
    """The posterior (y, x, 2 z): mean and log variance."""
    return TokenSpec((config.grid, config.grid, 2 * config.latent_width), "float16")


def image_spec(config: Config) -> jax.ShapeDtypeStruct:
    """One image: float32 (h, w, c)."""
    return jax.ShapeDtypeStruct((config.image_size, config.image_size, config.channels), jnp.float32)


def init(config: Config, key: jax.Array) -> Params:
    """Return float32 parameters."""
    pixels, ins = config.patch**2 * config.channels, jax.random.split(key)
    encoder = jax.random.normal(ins[0], (pixels, 2 * config.latent_width)) / pixels**0.5
    decoder = jax.random.normal(ins[1], (config.latent_width, pixels)) / config.latent_width**0.5
    return {"encoder": encoder, "decoder": decoder, "bias": jnp.zeros(pixels)}


def axes(config: Config) -> dict[str, Any]:
    """Logical axes."""
    return {"encoder": (None, "width"), "decoder": ("width", None), "bias": (None,)}


def decay_mask(config: Config) -> dict[str, bool]:
    """Weight decay on the matrices."""
    return {"encoder": True, "decoder": True, "bias": False}


def encode(config: Config, params: Params, images: jax.Array) -> jax.Array:
    """Return the posterior (b, y, x, 2 z) of images, float in [0, 1] or uint8."""
    return _patches(config, images) @ params["encoder"]


def draw(config: Config, stored: jax.Array, *, key: jax.Array | None = None, given: Any = None) -> jax.Array:
    """Return latents of a posterior: the mean, or with a key, or given["noise"], a sample."""
    mean, log_variance = jnp.split(stored.astype(jnp.float32), 2, axis=-1)
    if key is None and given is None:
        return mean
    noise = given["noise"] if given else jax.random.normal(key, mean.shape)
    return mean + jnp.exp(0.5 * log_variance) * noise


def decode(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """Return images (b, h, w, c) of latents, nominally in [0, 1]."""
    g, p = config.grid, config.patch
    patches = tokens @ params["decoder"] + params["bias"][(None,) * 3]
    patches = patches.reshape(-1, g, g, p, p, config.channels).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, g * p, g * p, config.channels)


def known_tokens(config: Config, pixel_mask: np.ndarray) -> np.ndarray:
    """Return the places, bool (y, x), of which every pixel of a mask, bool (h, w), is known."""
    g, p = config.grid, config.patch
    return pixel_mask.reshape(g, p, g, p).all(axis=(1, 3))


def loss(
    config: Config, params: Params, batch: Mapping[str, jax.Array], *, key: jax.Array, train: bool, **_: Any
) -> tuple[jax.Array, Aux]:
    """Return the mean squared error of a drawn reconstruction, plus the weighted KL divergence."""
    stored = encode(config, params, batch["images"])
    given = {"noise": batch["noise"]} if "noise" in batch else None
    images = decode(config, params, draw(config, stored, key=key if train else None, given=given))
    mean, log_variance = jnp.split(stored, 2, axis=-1)
    error = jnp.mean(jnp.square(_patches(config, images) - _patches(config, batch["images"])))
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    value = error + config.kl_weight * divergence
    return value, Aux({"loss": value, "error": error, "divergence": divergence}, images)


def _patches(config: Config, images: jax.Array) -> jax.Array:
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    g, p = config.grid, config.patch
    patches = (images.astype(jnp.float32) / scale).reshape(-1, g, p, g, p, config.channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, g, g, p * p * config.channels)
