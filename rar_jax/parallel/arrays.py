"""Arrays over the devices of all processes: each process gives its own part, whatever the mesh."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding

# What a source says of its records that no loss reads.
_NOT_FOR_THE_DEVICE = ("ids", "crops", "bad")


def place(tree: Any, sharding: Sharding) -> Any:
    """jax.Arrays of a tree of NumPy arrays, which every process holds alike; each copies only what its devices keep."""

    def one(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(one, tree)


def local_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """Which rows, int64 ascending, of a global batch this process's devices hold: all of them on one process.

    By the mesh and not by the process's number: a mesh axis that is not the batch's may reach over processes, which then hold
    the same rows, and on a TPU the devices of a process need not be neighbours in the mesh.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((global_batch,))
    rows = [np.arange(*index[0].indices(global_batch)) for index in places.values() if index is not None]
    return np.unique(np.concatenate(rows)).astype(np.int64)


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays (b, ...), split over (data, fsdp), from this process's `local_rows` of each."""
    sharding, parts = batch_sharding(mesh), batch_divisor(mesh)
    here = local_rows(mesh, parts)  # which parts of the batch, as if each were of one row

    def one(given: np.ndarray) -> jax.Array:
        given = np.asarray(given)
        size, rest = divmod(len(given), len(here))
        if rest:
            raise ValueError(f"{len(given)} rows do not divide into the {len(here)} parts that lie on this process")

        def part(index: Any) -> np.ndarray:
            begin = int(np.searchsorted(here, (index[0].start or 0) // size)) * size
            return given[begin : begin + size][(slice(None), *index[1:])]

        return jax.make_array_from_callback((parts * size, *given.shape[1:]), sharding, part)

    return {name: one(array) for name, array in rows.items()}


def for_devices(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A source's records without what no loss reads."""
    return {name: array for name, array in rows.items() if name not in _NOT_FOR_THE_DEVICE}


def on_devices(
    stream: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, *, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """`global_batch` of each batch of a stream, in order, with `ahead` more on their way to the devices.

    A transfer does not wait: while the device computes on one batch, the next ones are copied.
    """
    placed = (global_batch(for_devices(rows), mesh) for rows in stream)
    waiting = collections.deque(itertools.islice(placed, ahead))
    for batch in placed:
        waiting.append(batch)
        yield waiting.popleft()
    yield from waiting
