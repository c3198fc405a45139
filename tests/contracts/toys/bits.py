"""A linear tokenizer of factorised ids (n, T): signs of `T * bits` latents, `bits` of them to a sub-code.

Shape suffixes: b batch, n tokens, p pixels of a patch, z signs of a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.models import Aux, TokenSpec

PATCH = 2  # pixels along one side of a token


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = 8
    channels: int = 1
    subcodes: int = 2
    bits: int = 2
    dtype: str = "float32"


TINY = Config()


def token_spec(config: Config) -> TokenSpec:
    return TokenSpec(((config.image_size // PATCH) ** 2, config.subcodes), "int32", 2**config.bits)


def image_spec(config: Config) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((config.image_size, config.image_size, config.channels), jnp.float32)


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    p, z = PATCH**2 * config.channels, config.subcodes * config.bits
    keys = jax.random.split(key)
    return {
        "encoder": {"kernel": jax.random.normal(keys[0], (p, z)), "bias": jnp.zeros((z,))},
        "decoder": {"kernel": 0.1 * jax.random.normal(keys[1], (z, p)), "bias": jnp.full((p,), 0.3)},
    }


def axes(config: Config) -> dict[str, Any]:
    return {name: {"kernel": (None, "conv_out"), "bias": ("conv_out",)} for name in ("encoder", "decoder")}


def decay_mask(config: Config) -> dict[str, Any]:
    return {name: {"kernel": True, "bias": False} for name in ("encoder", "decoder")}


def encode(config: Config, params: Any, images: jax.Array) -> jax.Array:
    """Return ids (b, n, T) int32 of images, float in [0, 1] or uint8."""
    latents_bnz = _latents(config, params, images)
    bits = (latents_bnz > 0).astype(jnp.int32).reshape(-1, *token_spec(config).shape, config.bits)
    return jnp.sum(bits << jnp.arange(config.bits)[None, None, None], axis=-1)


def decode(config: Config, params: Any, tokens: jax.Array) -> jax.Array:
    bits = (tokens[..., None] >> jnp.arange(config.bits)[None, None, None]) & 1
    return _reconstruct(config, params, 2.0 * bits.reshape(*tokens.shape[:2], -1) - 1.0)


def loss(config: Config, params: Any, batch: Any, **_: Any) -> tuple[jax.Array, Aux]:
    """Mean squared error; the gradient passes straight through the signs."""
    latents_bnz = _latents(config, params, batch["images"])
    signs_bnz = jnp.where(latents_bnz > 0, 1.0, -1.0)
    images = _reconstruct(config, params, latents_bnz + jax.lax.stop_gradient(signs_bnz - latents_bnz))
    value = jnp.mean((images - _unit(batch["images"])) ** 2)
    return value, Aux({"loss": value, "psnr": -10.0 * jnp.log10(value)})


def _latents(config: Config, params: Any, images: jax.Array) -> jax.Array:
    grid = config.image_size // PATCH
    patches = _unit(images).reshape(-1, grid, PATCH, grid, PATCH, config.channels).transpose(0, 1, 3, 2, 4, 5)
    patches_bnp = patches.reshape(len(images), grid**2, -1) - 0.3
    return jnp.einsum("bnp,pz->bnz", patches_bnp, params["encoder"]["kernel"]) + params["encoder"]["bias"][None, None]


def _reconstruct(config: Config, params: Any, signs_bnz: jax.Array) -> jax.Array:
    grid = config.image_size // PATCH
    pixels = jnp.einsum("bnz,zp->bnp", signs_bnz, params["decoder"]["kernel"]) + params["decoder"]["bias"][None, None]
    patches = pixels.reshape(-1, grid, grid, PATCH, PATCH, config.channels).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, *image_spec(config).shape)


def _unit(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images
