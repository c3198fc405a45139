"""What class-conditional models of discrete tokens share: dropped labels and cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def drop_labels(batch: Mapping[str, jax.Array], key: jax.Array, *, rate: float, null: int) -> jax.Array:
    """Return batch["labels"], int32 (b,), of which a share becomes the null class: batch["drop"], or drawn ones."""
    labels_b, drop_b = batch["labels"].astype(jnp.int32), batch.get("drop")
    if drop_b is None:
        drop_b = jax.random.uniform(key, labels_b.shape) < rate
    return jnp.where(drop_b, null, labels_b)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean of -log softmax(logits)[target] in nats, a float32 scalar. logits (..., v), targets int (...)."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))
