"""Several data sets as one stream, mixed by weight.

Integer arithmetic on the position alone says which data set a position draws from: proportions are exact over each
period, and never off by more than the number of data sets.
"""

from __future__ import annotations

import fractions
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from rar_jax.config import require
from rar_jax.data.loader import Batch, Source, shuffle_positions

# The largest period; products of a position in the period and a share stay within 40 bits.
_MAX_PERIOD = 2**20


class MixedSource:
    """Several sources as one; record i is record i of the concatenated sources.

    As a stream (`order_records`) each source is drawn from in proportion to its weight, and yields each of its records
    once per epoch of its own. weights: as in `period_shares`.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        require(len(sources) == len(weights) > 0, f"{len(sources)} data sets have {len(weights)} weights")
        self.sources: tuple[Source, ...] = tuple(sources)
        self.shares: tuple[int, ...] = period_shares(weights)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, indices: np.ndarray) -> Batch:
        """Records at `indices`, ints (b,); keys that only some sources have are dropped."""
        if (outside := indices[(indices < 0) | (indices >= len(self))]).size:
            raise IndexError(f"index {outside[0]}, the mix has 0..{len(self) - 1}")
        source_of = np.searchsorted(self._ends, indices, side="right")
        begins = self._ends - [len(source) for source in self.sources]
        used = np.unique(source_of) if indices.size else [0]
        parts = [self.sources[k].gather(indices[source_of == k] - begins[k]) for k in used]
        # From the order of sources back to that of `indices`.
        back = np.argsort(np.argsort(source_of, kind="stable"))
        common = set.intersection(*map(set, parts))
        return {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0] if key in common}

    def order_records(self, position: np.ndarray, *, seed: int) -> np.ndarray:
        """Return the record, int64 (b,), at each position of the endless stream."""
        source_of, draw = assign_sources(position, self.shares)
        record = np.empty_like(position)
        for k in np.unique(source_of):
            here = source_of == k
            size = len(self.sources[k])
            # Its own seed: data sets of one size would otherwise have the same order.
            own = int.from_bytes(hashlib.blake2b(f"{seed}/{k}".encode(), digest_size=8).digest(), "little")
            record[here] = shuffle_positions(draw[here], size=size, seed=own) + (self._ends[k] - size)
        return record


def period_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return positions per period: (0.7, 0.3) gives (7, 3). ConfigError for weights below 1e-6 of their sum."""
    require(all(w > 0 and math.isfinite(w) for w in weights), f"weights are {list(weights)}: each must be positive")
    # As text, so that 0.7 is seven tenths.
    exact = [fractions.Fraction(str(w)) for w in weights]
    exact = [w / sum(exact) for w in exact]
    period = min(math.lcm(*(w.denominator for w in exact)), _MAX_PERIOD)
    shares = [int(w * period) for w in exact]
    # Rounded by largest remainder, so that they fill the period.
    by_rest = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k] * period)
    for k in by_rest[: period - sum(shares)]:
        shares[k] += 1
    require(min(shares) > 0, f"weights are {list(weights)}: one is less than a millionth of their sum, remove it")
    return tuple(shares)


def assign_sources(position: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return each position's data set, and its draws before; both int64 (b,).

    The first data set takes the positions where floor(position * share / period) increases, the next from the rest.
    """
    source_of, draw = np.full(len(position), len(shares) - 1), np.asarray(position, np.int64).copy()
    undecided = np.arange(len(position))
    for k, share in enumerate(shares[:-1]):
        period = sum(shares[k:])
        here = draw[undecided]
        before, after = _multiply(here, share, period), _multiply(here + 1, share, period)
        taken = after > before
        source_of[undecided[taken]] = k
        draw[undecided] = np.where(taken, before, here - before)
        undecided = undecided[~taken]
    return source_of, draw


def _multiply(position: np.ndarray, share: int, period: int) -> np.ndarray:
    """floor(position * share / period) without overflow: exact for every int64."""
    whole, rest = np.divmod(position, period)
    return whole * share + rest * share // period
