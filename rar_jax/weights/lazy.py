"""Parameters that are read from a file when they are put on devices, each device's shard by itself."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rar_jax.errors import WeightsError


class LazyArray:
    """A float32 array that is read when it is indexed: `array[slices]`, or `array[...]` for all of it.

    Attributes:
      shape, dtype: known without reading.
    """

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Callable[[], np.ndarray]], *, stacked: bool) -> None:
        """parts: read the array itself or, if `stacked`, each row along the first dimension."""
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = np.dtype(np.float32)
        self._parts, self._stacked = parts, stacked

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read into a new array. Raises: WeightsError for damaged data."""
        slices = (slice(None),) * len(self.shape) if index is ... else index
        sizes = [len(range(*s.indices(size))) for s, size in zip(slices, self.shape, strict=True)]
        out = np.empty(sizes, np.float32)
        if self._stacked:
            for row, read in enumerate(self._parts[slices[0]]):
                out[row] = read()[slices[1:]]
        else:
            out[...] = self._parts[0]()[slices]
        return out


def check_finite(path: str | pathlib.Path, name: str, value: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Return the value in a float dtype. Raises: WeightsError if it is not floating point, or not finite in it."""
    if value.dtype.kind in "biuc":
        raise WeightsError(f"{path}: '{name}' is {value.dtype}: weights are floating point numbers")
    with np.errstate(over="ignore"):  # overflow gives infinity, an error below
        value = value.astype(dtype, copy=False)
    if not np.isfinite(value).all():
        raise WeightsError(f"{path}: '{name}' holds numbers that are not finite: download it again")
    return value


def put_on_devices(lazy: Any, shardings: Any) -> Any:
    """Read a tree of LazyArrays into jax.Arrays. Each process reads what its own devices hold, one array at a time.

    Args:
      shardings: a tree of the same structure.
    """

    def put(leaf: LazyArray, sharding: jax.sharding.Sharding) -> jax.Array:
        array = jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__, dtype=leaf.dtype)
        return jax.block_until_ready(array)  # bounds the memory: the next array is read after this one is copied

    return jax.tree.map(put, lazy, shardings)
