"""A linear tokenizer with a posterior: a store keeps mean and log variance, each training step draws float tokens.

Shape suffixes: b batch, y and x rows and columns of tokens, p pixels of a patch, z latent width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.models import Aux, TokenSpec

PATCH = 2  # pixels along one side of a token


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = 8
    channels: int = 1
    latent_width: int = 2
    kl_weight: float = 1e-4
    dtype: str = "float32"


TINY = Config()


def token_spec(config: Config) -> TokenSpec:
    grid = config.image_size // PATCH
    return TokenSpec((grid, grid, config.latent_width), "float32")


def store_spec(config: Config) -> TokenSpec:
    """Mean and log variance, side by side in the last axis."""
    grid = config.image_size // PATCH
    return TokenSpec((grid, grid, 2 * config.latent_width), "float16")


def image_spec(config: Config) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.image_size, config.image_size, config.channels), jnp.float32)


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    p, z = PATCH**2 * config.channels, config.latent_width
    keys = jax.random.split(key)
    return {
        "encoder": {"kernel": 0.5 * jax.random.normal(keys[0], (p, 2 * z)), "bias": jnp.full((2 * z,), -1.0)},
        "decoder": {"kernel": 0.5 * jax.random.normal(keys[1], (z, p)), "bias": jnp.full((p,), 0.5)},
    }


def axes(config: Config) -> dict[str, Any]:
    return {name: {"kernel": (None, "conv_out"), "bias": ("conv_out",)} for name in ("encoder", "decoder")}


def decay_mask(config: Config) -> dict[str, Any]:
    return {name: {"kernel": True, "bias": False} for name in ("encoder", "decoder")}


def encode(config: Config, params: Any, images: jax.Array) -> jax.Array:
    """Return moments (b, y, x, 2 z) of images, float in [0, 1] or uint8."""
    (grid, _, _), images = token_spec(config).shape, _unit(images)
    patches = images.reshape(-1, grid, PATCH, grid, PATCH, config.channels).transpose(0, 1, 3, 2, 4, 5)
    patches_byxp = patches.reshape(*patches.shape[:3], -1)
    return jnp.einsum("byxp,pz->byxz", patches_byxp, params["encoder"]["kernel"]) + _row(params["encoder"]["bias"])


def draw(config: Config, stored: jax.Array, *, key: Any = None, given: Any = None) -> jax.Array:
    """Draw from the posterior; the mean without a key. given: optionally "noise" (b, y, x, z)."""
    mean, log_variance = jnp.split(stored.astype(jnp.float32), 2, axis=-1)
    if given is None and key is None:
        return mean
    noise = given["noise"] if given else jax.random.normal(key, mean.shape)
    return mean + jnp.exp(0.5 * log_variance) * noise


def decode(config: Config, params: Any, tokens: jax.Array) -> jax.Array:
    grid = tokens.shape[1]
    pixels = jnp.einsum("byxz,zp->byxp", tokens, params["decoder"]["kernel"]) + _row(params["decoder"]["bias"])
    patches = pixels.reshape(-1, grid, grid, PATCH, PATCH, config.channels).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, *image_spec(config).shape)


def known_tokens(config: Config, pixel_mask: np.ndarray) -> np.ndarray:
    grid = config.image_size // PATCH
    return pixel_mask.reshape(grid, PATCH, grid, PATCH).all(axis=(1, 3))


def loss(config: Config, params: Any, batch: Any, *, key: jax.Array, train: bool, **_: Any) -> tuple[jax.Array, Aux]:
    """Mean squared error of a drawn reconstruction and the KL divergence to a unit Gaussian; batch: "noise"."""
    images, moments = _unit(batch["images"]), encode(config, params, batch["images"])
    given = {"noise": batch["noise"]} if "noise" in batch else None
    reconstruction = decode(config, params, draw(config, moments, key=key, given=given))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    kl = 0.5 * jnp.mean(jnp.sum(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance, axis=(1, 2, 3)))
    l2 = jnp.mean((reconstruction - images) ** 2)
    value = l2 + config.kl_weight * kl
    return value, Aux({"loss": value, "psnr": -10.0 * jnp.log10(l2), "kl": kl}, reconstruction)


def _unit(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images


def _row(bias: jax.Array) -> jax.Array:
    return bias[None, None, None]
