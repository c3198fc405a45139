"""What an evaluation keeps of its images: sums of Inception features, small enough to leave the devices.

Float32 (float64 if the features are) within a chunk, in graph; float64 over chunks, on the host. Shapes: b batch, f pool3 features, s spatial features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rar_jax.metrics import inception_score, moments
from rar_jax.metrics.inception_score import SplitSums
from rar_jax.metrics.moments import Moments

POOL3, SPATIAL, CLASSES = 2048, 2023, 1008


class Shift(NamedTuple):
    """The points about which sums are taken, near the means: the reference's."""

    pool3: Any  # (f,)
    spatial: Any  # (s,)


class Sums(NamedTuple):
    """Of any number of images."""

    pool3: Moments
    spatial: Moments
    split: SplitSums


def zero(dtype: Any = np.float32) -> Sums:
    """Sums of no images, in the dtype of the features."""
    return Sums(moments.zero(POOL3, dtype), moments.zero(SPATIAL, dtype), inception_score.zero(CLASSES, dtype))


def add(sums: Sums, features: Mapping[str, jax.Array], weights_b: jax.Array, shift: Shift) -> Sums:
    """Adds a batch; jittable, and right under a sharded batch axis.

    Args:
      features: of `features.features`. weights_b: (b,) 1 for an image, 0 for padding.
    """
    return Sums(
        moments.update(sums.pool3, features["pool3"], weights_b, shift.pool3),
        moments.update(sums.spatial, features["spatial"], weights_b, shift.spatial),
        jax.tree.map(jax.numpy.add, sums.split, inception_score.split_sums(features["logits"], weights_b)),
    )


class Totals:
    """Sums over chunks, float64 on the host, and those of each split of the Inception Score by itself."""

    def __init__(self, split_size: int = inception_score.SPLIT_SIZE) -> None:
        self.done: int = 0
        self.split_size: int = split_size
        self._moments: tuple[Moments, Moments] | None = None
        self.splits: list[SplitSums] = []

    def add(self, chunk: Sums, images: int) -> None:
        """Adds the chunk of the next `images` images, all of one split."""
        chunk = jax.tree.map(lambda x: np.asarray(x, np.float64), chunk)
        old = self._moments
        self._moments = (
            (moments.merge(old[0], chunk.pool3), moments.merge(old[1], chunk.spatial))
            if old
            else (chunk.pool3, chunk.spatial)
        )
        if self.done % self.split_size == 0:
            self.splits.append(chunk.split)
        else:
            self.splits[-1] = SplitSums(*(a + b for a, b in zip(self.splits[-1], chunk.split, strict=True)))
        self.done += images

    @property
    def pool3(self) -> Moments:
        """Of the pool3 features. Raises: ValueError if nothing was added."""
        return self._added()[0]

    @property
    def spatial(self) -> Moments:
        """Of the spatial features. Raises: ValueError if nothing was added."""
        return self._added()[1]

    def _added(self) -> tuple[Moments, Moments]:
        if self._moments is None:
            raise ValueError("there are no sums: no chunk was added")
        return self._moments

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for a .npz; `restore` is the way back."""
        named = {f"pool3_{k}": v for k, v in self.pool3._asdict().items()}
        named |= {f"spatial_{k}": v for k, v in self.spatial._asdict().items()}
        named |= {f"split_{k}": np.stack([getattr(s, k) for s in self.splits]) for k in SplitSums._fields}
        return named | {"done": np.asarray(self.done), "split_size": np.asarray(self.split_size)}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> Totals:
        """From `arrays`."""
        totals = cls(int(arrays["split_size"]))
        totals.done = int(arrays["done"])
        pool3, spatial = (Moments(*(arrays[f"{name}_{k}"] for k in Moments._fields)) for name in ("pool3", "spatial"))
        totals._moments = pool3, spatial
        columns = [arrays[f"split_{k}"] for k in SplitSums._fields]
        totals.splits = [SplitSums(*row) for row in zip(*columns, strict=True)]
        return totals
