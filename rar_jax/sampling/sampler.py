"""From labels to images in one traceable function: generator, tokenizer, rounding. Keys are per sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.config import build, find_module, require
from rar_jax.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class Model:
    """A module of generators/ or tokenizers/ with its Config: the two things that belong together."""

    module: ModuleType
    config: Any


def load_model(config: Mapping[str, Any], kind: str) -> Model:
    """The generator or tokenizer (kind "generators", "tokenizers") of a resolved experiment (config.json)."""
    section = config[kind[:-1]]
    module = find_module(kind, section["name"])
    return Model(module, build(module.Config, section, where=f"config.{kind[:-1]}", ignore=("name", "weights")))


def check_pair(generator: Model, tokenizer: Model) -> None:
    """Raises ConfigError unless the generator makes the tokens that the tokenizer decodes."""
    made = generator.module.token_spec(generator.config)
    read = tokenizer.module.token_spec(tokenizer.config)
    require(
        made.shape == read.shape and made.dtype == read.dtype,
        f"the generator makes {made.dtype}{list(made.shape)} an image, the tokenizer takes {read.dtype}{list(read.shape)}: "
        "set generator.num_tokens to the tokenizer's grid",
    )
    codes = [getattr(model.config, "codebook_size", None) for model in (generator, tokenizer)]
    require(
        codes[0] == codes[1],
        f"codebook_size is {codes[0]} in the generator and {codes[1]} in the tokenizer: make them equal",
    )


def sample_keys(seed: jax.Array | int, ids: jax.Array) -> jax.Array:
    """One threefry key a sample, (b,): fold_in(seed, id), so that sample i is the same in any batch and on any mesh."""
    root = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(ids)


ROUNDINGS = ("truncate", "round")


def to_uint8(images_byxc: jax.Array, rounding: str = "truncate") -> jax.Array:
    """Images in [0, 1] to uint8, by truncation as RAR's evaluation does, or to the nearest ("round")."""
    scaled_byxc = images_byxc * 255.0
    return (jnp.round(scaled_byxc) if rounding == "round" else scaled_byxc).astype(jnp.uint8)


def sample_images(
    generator: Model,
    tokenizer: Model,
    params: dict[str, Any],
    labels: jax.Array,
    keys: jax.Array,
    guidance: Guidance,
    *,
    rounding: str = "truncate",
) -> jax.Array:
    """uint8 images (b, y, x, c) of the given classes; traceable.

    Args:
      params: {"generator": of init or prepare, "tokenizer"}.
      labels: int (b,). keys: typed keys (b,), see `sample_keys`.
    """
    tokens_bn = generator.module.sample(generator.config, params["generator"], labels, keys=keys, guidance=guidance)
    return to_uint8(tokenizer.module.decode(tokenizer.config, params["tokenizer"], tokens_bn), rounding)
