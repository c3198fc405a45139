"""Global arrays over the devices of all processes, made from each process's rows."""

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

# Metadata of records that no loss reads.
_HOST_ONLY = ("ids", "crops", "bad")


def put_on_mesh(tree: Any, sharding: Sharding) -> Any:
    """Make global arrays of a tree of NumPy arrays that is equal on all processes."""

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, tree)


def local_rows(mesh: Mesh, global_batch: int) -> np.ndarray:
    """Return the rows of a global batch on this process's devices, int64 ascending.

    By the mesh and not by the process index: processes along a tensor axis hold the same rows, and on a TPU the devices
    of a process need not be neighbours in the mesh.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((global_batch,))
    rows = [np.arange(*index[0].indices(global_batch)) for index in indices.values() if index is not None]
    return np.unique(np.concatenate(rows)).astype(np.int64)


def make_global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make arrays (b, ...), sharded along (data, fsdp), of each `local_rows`."""
    sharding, parts = batch_sharding(mesh), batch_divisor(mesh)
    here = local_rows(mesh, parts)  # parts of the batch, as if each had one row

    def put(given: np.ndarray) -> jax.Array:
        given = np.asarray(given)
        size, rest = divmod(len(given), len(here))
        if rest:
            raise ValueError(f"{len(given)} rows do not divide into the {len(here)} parts of this process")

        def part(index: Any) -> np.ndarray:
            begin = int(np.searchsorted(here, (index[0].start or 0) // size)) * size
            return given[begin : begin + size][(slice(None), *index[1:])]

        return jax.make_array_from_callback((parts * size, *given.shape[1:]), sharding, part)

    return {name: put(array) for name, array in rows.items()}


def drop_metadata(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop what no loss reads from a source's records."""
    return {name: array for name, array in rows.items() if name not in _HOST_ONLY}


def prefetch_batches(
    stream: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, *, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Yield `make_global_batch` of each batch; `ahead` more are being copied."""
    batches = (make_global_batch(drop_metadata(rows), mesh) for rows in stream)
    waiting = collections.deque(itertools.islice(batches, ahead))
    for batch in batches:
        waiting.append(batch)
        yield waiting.popleft()
    yield from waiting
