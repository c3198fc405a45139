"""Detect non-finite and spiking updates, skip them, and count what a rollback is decided by.

An update is bad if its loss or gradient norm is not finite, or a spike: more than `spike_sigmas` standard deviations
above the mean of the last WINDOW. The compiled step judges it, so that nothing waits for the host. The guard is part of
the train state, so that a resumed run skips the same updates:

    history      float32 (2, WINDOW)   loss and gradient norm of the last updates, at `seen` modulo WINDOW
    seen         int32                 finite updates so far
    consecutive  int32                 bad updates since the last good one
    skipped      int32                 bad updates in all
    rollbacks    int32
    data_offset  int32                 batches that rollbacks skipped: step k trains on batch k + data_offset
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Guard = dict[str, Any]

MONITORED = ("loss", "grad_norm")
WINDOW = 128
# The least deviation as a share of the mean: a history that hardly changes would make a spike of a rounding error.
LEAST_DEVIATION = 0.01


def init() -> Guard:
    """Create the guard of a new training."""
    zeros = {name: jnp.zeros((), jnp.int32) for name in ("seen", "consecutive", "skipped", "rollbacks", "data_offset")}
    return {"history": jnp.zeros((len(MONITORED), WINDOW), jnp.float32), **zeros}


def judge(guard: Guard, metrics: Mapping[str, jax.Array], *, sigmas: float) -> tuple[jax.Array, Guard]:
    """Return whether an update is bad, a bool scalar, and the guard after it. Traceable.

    Only finite values enter the history: one NaN in the mean would condemn every later step. A spike enters as the
    limit that it exceeded, so that the limit follows a level that has changed for good.

    Args:
      metrics: with all of MONITORED. sigmas: 0 accepts spikes.
    """
    values = jnp.stack([metrics[name].astype(jnp.float32) for name in MONITORED])
    history, seen = guard["history"], guard["seen"]
    known = jnp.arange(WINDOW) < seen
    count = jnp.maximum(jnp.minimum(seen, WINDOW), 1)
    mean = jnp.where(known, history, 0).sum(axis=1) / count
    deviation = jnp.sqrt(jnp.where(known, jnp.square(history - mean[:, None]), 0).sum(axis=1) / count)
    limit = mean + sigmas * jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(mean))
    limit = jnp.where((seen >= WINDOW // 2) & (sigmas > 0), limit, jnp.inf)
    finite = jnp.isfinite(values).all()
    bad = ~finite | (values > limit).any()
    entered = history.at[:, seen % WINDOW].set(jnp.minimum(values, limit))
    return bad, {
        **guard,
        "history": jnp.where(finite, entered, history),
        "seen": seen + finite,
        "consecutive": jnp.where(bad, guard["consecutive"] + 1, 0),
        "skipped": guard["skipped"] + bad,
    }


def select_if(condition: jax.Array, then: Any, otherwise: Any) -> Any:
    """Select one of two trees, bitwise. Traceable."""
    return jax.tree.map(lambda t, o: jnp.where(condition, t, o), then, otherwise)


def after_rollback(restored: Guard, current: Guard, *, num_steps: int) -> Guard:
    """Return the guard after rolling back `num_steps` steps; skip their batches."""
    return {
        **restored,
        "consecutive": restored["consecutive"] * 0,
        "skipped": current["skipped"],
        "rollbacks": current["rollbacks"] + 1,
        "data_offset": current["data_offset"] + num_steps,
    }
