"""Sums of Inception features: all that an evaluation keeps of its images.

In graph, sums have the dtype of the features and cover one chunk of images; `ScoreTotals` adds chunks in float64 on the
host. Shapes: b batch, f pool3 features, s spatial features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.metrics.inception_score import SPLIT_SIZE, SplitSums, init_split_sums, sum_split
from rar_jax.metrics.moments import Moments, add_in_float64, init_moments, update_moments

POOL3, SPATIAL, CLASSES = 2048, 2023, 1008


class Shift(NamedTuple):
    """The points about which sums are taken, near the means."""

    pool3: Any  # (f,)
    spatial: Any  # (s,)


class Sums(NamedTuple):
    """Sums over images; `split` over images of one split of the Inception Score.

    nonfinite: number of images with non-finite pixels.
    """

    pool3: Moments
    spatial: Moments
    split: SplitSums
    nonfinite: Any = 0.0


def init_sums(dtype: Any = np.float32) -> Sums:
    """Return the sums of no images, in the dtype of the features."""
    moments = init_moments(POOL3, dtype), init_moments(SPATIAL, dtype)
    return Sums(*moments, init_split_sums(CLASSES, dtype), jnp.zeros((), np.float32))


def update_sums(
    sums: Sums, features: Mapping[str, jax.Array], weights_b: jax.Array, shift: Shift, nonfinite_b: Any = 0
) -> Sums:
    """Add a batch; jittable. weights_b: (b,) 1 for an image, 0 for padding. nonfinite_b: bool, of images."""
    return Sums(
        update_moments(sums.pool3, features["pool3"], weights_b, shift.pool3),
        update_moments(sums.spatial, features["spatial"], weights_b, shift.spatial),
        jax.tree.map(jnp.add, sums.split, sum_split(features["logits"], weights_b)),
        sums.nonfinite + jnp.sum(weights_b * nonfinite_b, dtype=np.float32),
    )


class ScoreTotals:
    """Float64 sums over chunks, and of each split of the Inception Score."""

    def __init__(self, split_size: int = SPLIT_SIZE) -> None:
        self.done: int = 0  # images
        self.nonfinite: int = 0  # of them with non-finite pixels
        self.split_size: int = split_size
        self.pool3: Moments = Moments(0.0, 0.0, 0.0)
        self.spatial: Moments = Moments(0.0, 0.0, 0.0)
        self.splits: list[SplitSums] = []

    def add(self, chunk: Sums, images: int) -> None:
        """Add the chunk of the next `images` images, all of one split."""
        if self.done % self.split_size == 0:
            self.splits.append(SplitSums(0.0, 0.0, 0.0))
        self.pool3 = add_in_float64(self.pool3, chunk.pool3)
        self.spatial = add_in_float64(self.spatial, chunk.spatial)
        self.splits[-1] = add_in_float64(self.splits[-1], chunk.split)
        self.done += images
        self.nonfinite += int(chunk.nonfinite)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything as named arrays, for a .npz."""
        splits = SplitSums(*(np.stack(field) for field in zip(*self.splits, strict=True)))
        groups: dict[str, Any] = {"pool3": self.pool3, "spatial": self.spatial, "split": splits}
        named = {f"{name}_{field}": x for name, sums in groups.items() for field, x in sums._asdict().items()}
        return named | {name: np.asarray(getattr(self, name)) for name in ("done", "nonfinite", "split_size")}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ScoreTotals:
        """Undo `to_arrays`. Raises: KeyError, ValueError for other arrays."""
        totals = cls(int(arrays["split_size"]))
        totals.done, totals.nonfinite = int(arrays["done"]), int(arrays["nonfinite"])
        totals.pool3, totals.spatial = (
            Moments(*(arrays[f"{name}_{field}"] for field in Moments._fields)) for name in ("pool3", "spatial")
        )
        columns = [arrays[f"split_{field}"] for field in SplitSums._fields]
        totals.splits = [SplitSums(*row) for row in zip(*columns, strict=True)]
        return totals
