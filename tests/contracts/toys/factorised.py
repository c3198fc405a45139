"""A generator of factorised ids (n, T): each sub-code is predicted from the class, its position and the two before it.

Shape suffixes: b batch, n tokens, s sub-codes of an image (n * T, in raster order), d width, v codes of a sub-code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.models import Aux, TokenSpec
from rar_jax.objectives.classes import cross_entropy, drop_labels
from rar_jax.sampling import SamplingSettings, draw_ids, guide, keep_top_k, keep_top_p, weigh_guidance


@dataclasses.dataclass(frozen=True)
class Config:
    num_classes: int = 10
    num_tokens: int = 16
    subcodes: int = 2
    vocab: int = 4
    width: int = 32
    label_dropout: float = 0.1
    dtype: str = "float32"


TINY = Config()


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    scale: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False


def token_spec(config: Config) -> TokenSpec:
    return TokenSpec((config.num_tokens, config.subcodes), "int32", config.vocab)


def init(config: Config, key: jax.Array) -> dict[str, jax.Array]:
    d, v = config.width, config.vocab
    rows = {"classes": config.num_classes + 1, "positions": config.num_tokens * config.subcodes}
    rows |= {"previous": 2 * (v + 1)}  # id v: before the first
    keys = jax.random.split(key, len(rows) + 1)
    tables = {name: 0.1 * jax.random.normal(keys[i], (size, d)) for i, (name, size) in enumerate(rows.items())}
    return tables | {"head": 0.1 * jax.random.normal(keys[-1], (d, v))}


def axes(config: Config) -> dict[str, Any]:
    return dict.fromkeys(("classes", "positions", "previous"), (None, "width")) | {"head": ("width", "codes")}


def decay_mask(config: Config) -> dict[str, bool]:
    return {name: name == "head" for name in axes(config)}


def _predict(params: Any, ids_bs2: jax.Array, places_s: jax.Array, labels_b: jax.Array) -> jax.Array:
    """Return logits (b, s, v). ids_bs2: the two sub-codes before each."""
    offsets = jnp.arange(2) * (params["previous"].shape[0] // 2)
    previous_bsd = params["previous"][ids_bs2 + offsets[None, None]].sum(axis=2)
    x_bsd = previous_bsd + params["positions"][places_s][None] + params["classes"][labels_b][:, None]
    return jax.nn.gelu(x_bsd) @ params["head"]


def logits(config: Config, params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Return teacher-forced logits, float32 (b, n, T, v)."""
    ids_bs = jnp.pad(tokens.reshape(len(tokens), -1), ((0, 0), (2, 0)), constant_values=config.vocab)
    pairs_bs2 = jnp.stack([ids_bs[:, 1:-1], ids_bs[:, :-2]], axis=-1)
    out_bsv = _predict(params, pairs_bs2, jnp.arange(pairs_bs2.shape[1]), labels)
    return out_bsv.reshape(*tokens.shape, config.vocab)


def loss(config: Config, params: Any, batch: Any, *, key: jax.Array, train: bool, **_: Any) -> tuple[jax.Array, Aux]:
    """Mean cross-entropy in nats per sub-code. batch: optionally "drop" (b,)."""
    labels_b = drop_labels(batch, key, rate=config.label_dropout if train else 0.0, null=config.num_classes)
    value = cross_entropy(logits(config, params, batch["tokens"], labels_b), batch["tokens"])
    return value, Aux({"loss": value, "bits": value / math.log(2)})


def sample(
    config: Config, params: Any, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, given: Any = None
) -> jax.Array:
    """Draw ids int32 (b, n, T), sub-code after sub-code. given: optionally "uniforms" (b, n, T)."""
    labels_b = jnp.asarray(labels, jnp.int32)
    uniforms_bs = jnp.asarray(given["uniforms"]).reshape(len(labels_b), -1) if given else None
    count = config.num_tokens * config.subcodes

    def step(pair_b2: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_bv = _predict(params, pair_b2[:, None], place[None], labels_b)[:, 0]
        if sampling.scale is not None:
            null_b = jnp.full_like(labels_b, config.num_classes)
            null_bv = _predict(params, pair_b2[:, None], place[None], null_b)[:, 0]
            logits_bv = guide(logits_bv, null_bv, weigh_guidance(sampling.scale, place / count))
        if sampling.greedy:
            ids_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        else:
            logits_bv = keep_top_p(keep_top_k(logits_bv / sampling.temperature, sampling.top_k), sampling.top_p)
            keys_b = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
            ids_b = draw_ids(logits_bv, keys_b, None if uniforms_bs is None else uniforms_bs[:, place])
        return jnp.stack([ids_b, pair_b2[:, 0]], axis=1), ids_b

    start_b2 = jnp.full((len(labels_b), 2), config.vocab, jnp.int32)
    ids_sb = jax.lax.scan(step, start_b2, jnp.arange(count))[1]
    return ids_sb.T.reshape(-1, config.num_tokens, config.subcodes)
