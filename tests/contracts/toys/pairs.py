"""Factorised ids (n, 2), drawn position by position: the first id of each from what is before it, then the second.

Shape suffixes: b batch, n positions, d width, v codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.models import Aux, TokenSpec
from rar_jax.objectives.classes import cross_entropy, drop_labels
from rar_jax.sampling import SamplingSettings, draw_ids, guide, keep_top_k, keep_top_p

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Label `num_classes` is the null class."""

    num_tokens: int = 16
    codebook_size: int = 16
    num_classes: int = 10
    width: int = 32
    label_dropout: float = 0.1
    dtype: str = "float32"


TINY = Config()


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    """Guidance and what is kept of the distribution of each id."""

    scale: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False


def token_spec(config: Config) -> TokenSpec:
    """Ids (n, 2)."""
    return TokenSpec((config.num_tokens, 2), "int32", config.codebook_size)


def init(config: Config, key: jax.Array) -> Params:
    """Return float32 parameters."""
    shapes = {
        "classes": (config.num_classes + 1, config.width),
        "places": (config.num_tokens, config.width),
        "before": (2, config.codebook_size, config.width),
        "first": (config.codebook_size, config.width),
        "heads": (2, config.width, config.codebook_size),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: 0.3 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def axes(config: Config) -> dict[str, Any]:
    """Logical axes."""
    tables = {"classes": (None, None), "places": (None, None), "before": (None, None, None), "first": (None, None)}
    return tables | {"heads": (None, "width", "codes")}


def decay_mask(config: Config) -> dict[str, bool]:
    """Weight decay on the heads."""
    return {name: name == "heads" for name in axes(config)}


def _see_before(params: Params, ids: jax.Array) -> jax.Array:
    """Embed both ids (..., 2) of the position before: (..., d)."""
    return params["before"][0][ids[..., 0]] + params["before"][1][ids[..., 1]]


def _predict(params: Params, x: jax.Array, t: int) -> jax.Array:
    return jax.nn.gelu(x) @ params["heads"][t]


def logits(config: Config, params: Params, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Return teacher-forced logits, float32 (b, n, 2, v)."""
    before_bnd = jnp.pad(_see_before(params, tokens)[:, :-1], ((0, 0), (1, 0), (0, 0)))
    x_bnd = params["classes"][labels][:, None] + params["places"][None] + before_bnd
    with_first_bnd = x_bnd + params["first"][tokens[..., 0]]
    return jnp.stack([_predict(params, x_bnd, 0), _predict(params, with_first_bnd, 1)], axis=2)


def loss(
    config: Config, params: Params, batch: Mapping[str, jax.Array], *, key: jax.Array, train: bool, **_: Any
) -> tuple[jax.Array, Aux]:
    """Return the mean cross-entropy, nats an id."""
    labels_b = drop_labels(batch, key, rate=config.label_dropout if train else 0.0, null=config.num_classes)
    tokens = batch["tokens"].astype(jnp.int32)
    value = cross_entropy(logits(config, params, tokens, labels_b), tokens)
    return value, Aux({"loss": value})


def sample(
    config: Config, params: Params, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, given: Any = None
) -> jax.Array:
    """Draw ids (b, n, 2)."""
    labels_b = jnp.asarray(labels, jnp.int32)
    classes = [labels_b] if sampling.scale is None else [labels_b, jnp.full_like(labels_b, config.num_classes)]

    def draw(hidden: list[jax.Array], t: int, place: jax.Array) -> jax.Array:
        logits_bv = _predict(params, hidden[0], t)
        if sampling.scale is not None:
            logits_bv = guide(logits_bv, _predict(params, hidden[1], t), sampling.scale)
        if sampling.greedy:
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        logits_bv = keep_top_p(keep_top_k(logits_bv / sampling.temperature, sampling.top_k), sampling.top_p)
        return draw_ids(logits_bv, jax.vmap(lambda key: jax.random.fold_in(key, 2 * place + t))(keys))

    def advance(before_bd: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = [params["classes"][c] + params["places"][place][None] + before_bd for c in classes]
        first_b = draw(hidden, 0, place)
        second_b = draw([x + params["first"][first_b] for x in hidden], 1, place)
        ids_bt = jnp.stack([first_b, second_b], axis=-1)
        return _see_before(params, ids_bt), ids_bt

    _, ids_nbt = jax.lax.scan(advance, jnp.zeros((len(labels_b), config.width)), jnp.arange(config.num_tokens))
    return ids_nbt.swapaxes(0, 1)
