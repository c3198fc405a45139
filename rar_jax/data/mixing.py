"""Several data sets as one stream, mixed by weight.

Which data set a place of the stream draws from is integer arithmetic on the place alone: proportions are exact over each
period, nowhere off by more than the number of data sets, and a start anywhere costs nothing. Random draws would be off by
the root of the number of draws, and a resumed run would have to replay them.
"""

from __future__ import annotations

import fractions
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from rar_jax.config import require
from rar_jax.data.loader import Batch, Source, shuffled

# The largest period: with it, products of a place in the period and a share stay within 40 bits.
_MAX_PERIOD = 2**20


class MixedSource:
    """One source of several; record i is record i of the sources laid end to end.

    As a stream (`places`, which `loader.batches` asks) each source is drawn from in proportion to its weight, and gives
    each of its records once in each epoch of its own.

    Args:
      sources: with the same keys and shapes from `gather`.
      weights: positive, of any sum; written as decimals (0.7, 0.3) they are taken exactly.

    Raises: ConfigError for weights that are not positive, as many as the sources, and at least 1e-6 of their sum.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        require(len(sources) == len(weights) > 0, f"{len(sources)} data sets have {len(weights)} weights")
        self.sources: tuple[Source, ...] = tuple(sources)
        self.shares: tuple[int, ...] = period_shares(weights)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, indices: np.ndarray) -> Batch:
        """Records at `indices`, ints (b,) in [0, len), as the sources give them; keys that only some have are left out.

        Raises: IndexError for an index outside.
        """
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"asked for {indices.min()}..{indices.max()}, the mix has 0..{len(self) - 1}")
        source_of = np.searchsorted(self._ends, indices, side="right")
        used = np.unique(source_of) if indices.size else [0]
        parts = {
            k: self.sources[k].gather(indices[source_of == k] - (self._ends[k] - len(self.sources[k]))) for k in used
        }
        first = next(iter(parts.values()))
        out = {
            key: np.empty((len(indices), *array.shape[1:]), array.dtype)
            for key, array in first.items()
            if all(key in part for part in parts.values())
        }
        for k, part in parts.items():
            for key, array in out.items():
                array[source_of == k] = part[key]
        return out

    def places(self, position: np.ndarray, *, seed: int) -> np.ndarray:
        """Which record, int64 (b,), stands at each place of the endless stream, int64 (b,)."""
        source_of, draw = draws(position, self.shares)
        record = np.empty_like(position)
        for k in np.unique(source_of):
            here = source_of == k
            size = len(self.sources[k])
            # A seed of its own: else two data sets of one size would go through their records in step.
            place = shuffled(draw[here], size=size, seed=_seed_of(seed, int(k)))
            record[here] = place + (self._ends[k] - size)
        return record


def period_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of each period of sum(shares) places each data set gets: (0.7, 0.3) gives (7, 3).

    Raises: ConfigError for a weight that is not positive, or too small to be met.
    """
    require(all(w > 0 and math.isfinite(w) for w in weights), f"weights are {list(weights)}: each must be positive")
    # Through the text, so that 0.7 is seven tenths.
    exact = [fractions.Fraction(str(w)) for w in weights]
    exact = [w / sum(exact) for w in exact]
    period = math.lcm(*(w.denominator for w in exact))
    if period > _MAX_PERIOD:
        # Rounded by largest remainder, so that they fill the period.
        period = _MAX_PERIOD
        shares = [int(w * period) for w in exact]
        by_rest = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k] * period)
        for k in by_rest[: period - sum(shares)]:
            shares[k] += 1
    else:
        shares = [int(w * period) for w in exact]
    require(min(shares) > 0, f"weights are {list(weights)}: one is less than a millionth of their sum, leave it out")
    return tuple(shares)


def draws(position: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which data set each place draws from, and how many draws that data set had before: both int64 (b,).

    The first data set takes the places at which floor(place * share / period) goes up; the others share what it leaves,
    in the same way.

    Args:
      position: places, int64 (b,), not negative. shares: of each period, see `period_shares`.
    """
    source_of, draw = np.full(len(position), len(shares) - 1), np.asarray(position, np.int64).copy()
    undecided = np.arange(len(position))
    for k, share in enumerate(shares[:-1]):
        period = sum(shares[k:])
        place = draw[undecided]
        before, after = _multiply(place, share, period), _multiply(place + 1, share, period)
        taken = after > before
        source_of[undecided[taken]] = k
        draw[undecided] = np.where(taken, before, place - before)
        undecided = undecided[~taken]
    return source_of, draw


def _multiply(place: np.ndarray, share: int, period: int) -> np.ndarray:
    """floor(place * share / period) without overflow: exact for every int64."""
    whole, rest = np.divmod(place, period)
    return whole * share + rest * share // period


def _seed_of(seed: int, source: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}".encode(), digest_size=8).digest(), "little")
