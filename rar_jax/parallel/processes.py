"""One program, one or many processes: who writes, and how each process's rows become a global array."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.parallel.rules import batch_sharding


def is_main() -> bool:
    """Whether this process writes what is one file (metrics, pictures, manifests)."""
    return jax.process_index() == 0


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split over (data, fsdp), from this process's rows of each global batch."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in rows.items()}


# What a source says of its records that no loss reads.
_NOT_FOR_THE_DEVICE = ("ids", "crops", "bad")


def on_devices(
    stream: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, *, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """`global_batch` of each batch of a stream, in order, with `ahead` more on their way to the devices.

    A transfer does not wait: while the device computes on one batch, the next ones are copied.
    """
    placed = (global_batch({k: v for k, v in rows.items() if k not in _NOT_FOR_THE_DEVICE}, mesh) for rows in stream)
    waiting = collections.deque(itertools.islice(placed, ahead))
    for batch in placed:
        waiting.append(batch)
        yield waiting.popleft()
    yield from waiting
