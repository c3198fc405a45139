"""Parameters that are read from a file at the moment they are placed, each device's shard by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rar_jax.errors import WeightsError


class LazyArray:
    """A float32 array whose parts are read when it is indexed: `array[index]`, or all of it by `array[...]`.

    Attributes:
      shape, dtype: known without reading.
    """

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Callable[[], np.ndarray]], *, stacked: bool) -> None:
        """parts: read the array itself or, if `stacked`, each row along the first dimension."""
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = np.dtype(np.float32)
        self._parts, self._stacked = parts, stacked

    def __getitem__(self, index: Any) -> np.ndarray:
        """A new float32 array. Raises: WeightsError if what is read is damaged."""
        slices = (slice(None),) * len(self.shape) if index is ... else index
        sizes = [len(range(*s.indices(size))) for s, size in zip(slices, self.shape, strict=True)]
        out = np.empty(sizes, np.float32)
        if self._stacked:
            for row, read in enumerate(self._parts[slices[0]]):
                out[row] = read()[slices[1:]]
        else:
            out[...] = self._parts[0]()[slices]
        return out


def finite(path: Any, name: str, value: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """The value in a float dtype. Raises: WeightsError if it is no floating point, or holds what that dtype cannot."""
    if value.dtype.kind in "biuc":
        raise WeightsError(f"{path}: '{name}' is {value.dtype}: weights are floating point numbers")
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        value = value.astype(dtype, copy=False)
    if not np.isfinite(value).all():
        raise WeightsError(f"{path}: '{name}' holds numbers that are not finite: download it again")
    return value


def materialize(lazy: Any) -> Any:
    """The tree as NumPy arrays."""
    return jax.tree.map(lambda leaf: leaf[...], lazy)


def place(lazy: Any, shardings: Any) -> Any:
    """The tree as jax.Arrays: each process reads what its own devices hold, one array after the other.

    Args:
      lazy: tree of LazyArray. shardings: the same tree of shardings, or one for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, lazy)

    def one(leaf: LazyArray, sharding: jax.sharding.Sharding) -> jax.Array:
        # Waited for, so that the next array is not read while this one is still being copied.
        return jax.block_until_ready(
            jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__, dtype=leaf.dtype)
        )

    return jax.tree.map(one, lazy, shardings)
