"""What keeps a bad batch from ruining a training: bad updates are left out, and many in a row send the training back.

An update is bad if the loss or the norm of its gradient is not finite, or if one of them is a spike: so many standard deviations
above the mean of the last WINDOW. It is judged in graph, from numbers that are the same on every device, so that all of them
leave it out, and nothing waits for the host. What the rule remembers is part of the train state:

    guard = {"history": float32 (2, WINDOW), "seen": int32, "in_a_row": int32, "skipped": int32, "rewinds": int32, "data_offset": int32}

history: of loss and gradient norm, the last `seen` modulo WINDOW. in_a_row: bad updates without a good one. skipped: bad updates
in all. rewinds: how often the training was sent back. data_offset: batches that were passed over, so that step k trains on batch
k + data_offset of the stream. All is a function of the data: two runs, killed or not, leave out the same updates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Guard = dict[str, jax.Array]

WATCHED = ("loss", "grad_norm")
WINDOW = 128
# A history that hardly moves would make a spike of a rounding error: the deviation counts as this share of the mean at least.
LEAST_DEVIATION = 0.01


def init() -> Guard:
    """The guard of a training that has not begun."""
    zeros = {name: jnp.zeros((), jnp.int32) for name in ("seen", "in_a_row", "skipped", "rewinds", "data_offset")}
    return {"history": jnp.zeros((len(WATCHED), WINDOW), jnp.float32), **zeros}


def judge(guard: Guard, metrics: dict[str, jax.Array], *, sigmas: float) -> tuple[jax.Array, Guard]:
    """Whether an update is bad, a bool scalar, and the guard after it. Traceable.

    Only finite values enter the history (one NaN in a mean, and every later step would be judged by NaN), and a spike enters as
    the limit that it broke: it does not raise the limit by its height, and where the level has changed for good, the limit
    follows.

    Args:
      metrics: with all of WATCHED. sigmas: standard deviations above the mean that make a spike; 0 looks for none.
    """
    values = jnp.stack([metrics[name].astype(jnp.float32) for name in WATCHED])
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
        "in_a_row": jnp.where(bad, guard["in_a_row"] + 1, 0),
        "skipped": guard["skipped"] + bad,
    }


def unless(bad: jax.Array, new: Any, old: Any) -> Any:
    """The new tree, or where the update is bad the old one to the bit. Traceable."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)


def sent_back(guard: Guard, now: Guard, *, steps: int) -> Guard:
    """The guard of an earlier state to which a training is sent back, which `steps` later had the guard `now`.

    The batches of those steps are passed over; what was counted stays counted.
    """
    return {
        **guard,
        "in_a_row": jnp.zeros_like(guard["in_a_row"]),
        "skipped": now["skipped"],
        "rewinds": now["rewinds"] + 1,
        "data_offset": now["data_offset"] + steps,
    }
