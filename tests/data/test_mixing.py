"""Mixed data sets: exact proportions, every record once an epoch of its own, the same for processes and workers."""

from __future__ import annotations

import contextlib
import fractions
import itertools
from typing import Any

import numpy as np
import pytest
from digests import batch_digest

from rar_jax.data.loader import Batch, batches
from rar_jax.data.mixing import MixedSource, assign_sources, period_shares
from rar_jax.errors import ConfigError

BATCH = 48


class Numbers:
    """Records whose label is their data set, and whose id is their place in it."""

    def __init__(self, size: int, label: int) -> None:
        self.size, self.label = size, label

    def __len__(self) -> int:
        return self.size

    def gather(self, indices: np.ndarray) -> Batch:
        assert indices.size == 0 or (indices.min() >= 0 and indices.max() < self.size)
        labels = np.full(len(indices), self.label, np.int32)
        return {"labels": labels, "ids": indices.astype(np.int64), "tokens": (indices[:, None] + np.arange(3)) * 2}


def mixed(*weights: float, sizes: tuple[int, ...] = (101, 37, 250)) -> MixedSource:
    return MixedSource([Numbers(size, k) for k, size in enumerate(sizes[: len(weights)])], weights)


def take(source: MixedSource, count: int, **changes: Any) -> list[Batch]:
    keywords = {"global_batch": BATCH, "seed": 3, "start_step": 0, **changes}
    with contextlib.closing(batches(source, **keywords)) as stream:
        return list(itertools.islice(stream, count))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((0.7, 0.3), (7, 3)), ((1, 1), (1, 1)), ((0.2, 0.3, 0.5), (2, 3, 5)), ((2.0, 6.0), (1, 3)), ((5.0,), (1,))],
)
def test_decimals_are_taken_exactly(weights: tuple[float, ...], shares: tuple[int, ...]) -> None:
    assert period_shares(weights) == shares


def test_weights_that_no_short_period_meets() -> None:
    weights = (0.123456789, 0.3, 0.500001, 1 / 3)
    shares = period_shares(weights)
    for weight, share in zip(weights, shares, strict=True):
        assert abs(share / sum(shares) - weight / sum(weights)) < 1e-6


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.2, 0.3, 0.5), (0.1, 0.2, 0.3, 0.15, 0.25), (1e-3, 1.0)])
def test_counts_by_hand(weights: tuple[float, ...]) -> None:
    """Against a simulation that counts one draw after the other: numbers before each draw, and exact proportions."""
    shares = period_shares(weights)
    period = sum(shares)
    places = np.arange(3 * period)
    source_of, draw = assign_sources(places, shares)
    seen = [0] * len(shares)
    for place, (k, number) in enumerate(zip(source_of.tolist(), draw.tolist(), strict=True)):
        assert number == seen[k], "each draw of a data set is the next of its stream"
        seen[k] += 1
        for k, share in enumerate(shares):
            assert abs(seen[k] - fractions.Fraction((place + 1) * share, period)) < len(shares)
    assert seen == [3 * share for share in shares]


def test_a_start_far_away_costs_nothing_and_is_exact() -> None:
    shares = period_shares((0.7, 0.2, 0.1))
    far = 2**62 + np.arange(1000)
    source_of, draw = assign_sources(far, shares)
    for k, share in enumerate(shares):
        mine = draw[source_of == k]
        assert len(mine) == 100 * share
        np.testing.assert_array_equal(np.diff(mine), 1)
        # By Python's integers, which do not overflow.
        assert abs(int(mine[0]) - fractions.Fraction(2**62 * share, 10)) < 3


def test_every_record_once_an_epoch_of_its_own() -> None:
    source = mixed(0.6, 0.1, 0.3)
    rows = take(source, 60)
    labels, ids = (np.concatenate([batch[key] for batch in rows]) for key in ("labels", "ids"))
    assert np.bincount(labels).tolist() == [1728, 288, 864]  # 60 * 48 = 2880 draws
    orders = []
    for k, size in enumerate((101, 37, 250)):
        mine = ids[labels == k]
        for epoch in range(len(mine) // size):
            order = mine[epoch * size : (epoch + 1) * size]
            np.testing.assert_array_equal(np.sort(order), np.arange(size))
            orders.append(order.tolist())
    assert len(orders) == 17 + 7 + 3 and len(set(map(tuple, orders))) == len(orders)


def test_two_data_sets_of_one_size_are_not_read_in_step() -> None:
    rows = take(mixed(1.0, 1.0, sizes=(200, 200)), 8)
    labels, ids = (np.concatenate([batch[key] for batch in rows]) for key in ("labels", "ids"))
    assert np.sum(ids[labels == 0] == ids[labels == 1]) < 10  # 1 is expected of two random orders


def test_records_are_the_sources() -> None:
    source = mixed(0.5, 0.3, 0.2)
    assert len(source) == 388
    rows = source.gather(np.array([387, 0, 101, 100, 138, 137]))
    np.testing.assert_array_equal(rows["labels"], [2, 0, 1, 0, 2, 1])
    np.testing.assert_array_equal(rows["ids"], [249, 0, 0, 100, 0, 36])
    np.testing.assert_array_equal(rows["tokens"][:, 1], (rows["ids"] + 1) * 2)
    assert len(source.gather(np.array([], np.int64))["labels"]) == 0
    for wrong in (-1, 388):
        with pytest.raises(IndexError, match=r"the mix has 0\.\.387"):
            source.gather(np.array([0, wrong]))


def digests(rows: list[Batch]) -> list[str]:
    return [batch_digest(batch) for batch in rows]


@pytest.mark.parametrize("process_count", [2, 4])
def test_digest_is_the_same_for_any_number_of_processes(process_count: int) -> None:
    source = mixed(0.6, 0.1, 0.3)
    shares = np.arange(BATCH).reshape(process_count, -1)
    parts = [take(source, 10, rows=rows) for rows in shares]
    joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in parts[0][0]} for i in range(10)]
    assert digests(joined) == digests(take(source, 10))


def test_digest_is_the_same_for_any_number_of_workers_and_any_start() -> None:
    source = mixed(0.6, 0.1, 0.3)
    expected = digests(take(source, 12))
    assert len(set(expected)) == 12
    assert digests(take(source, 7, start_step=5, num_workers=2)) == expected[5:]
    assert digests(take(source, 4, start_step=8)) == expected[8:]
    assert digests(take(source, 12, seed=4)) != expected


def test_the_stream_is_frozen() -> None:
    """A run resumed by a newer version must see the same data: never update these numbers."""
    places = mixed(0.6, 0.1, 0.3).order_records(np.arange(1000, 1010), seed=7)
    np.testing.assert_array_equal(places, [144, 49, 211, 53, 26, 253, 43, 101, 23, 64])


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.5, -1.0), (1.0, 1e-9), (float("nan"), 1.0)])
def test_wrong_weights(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="weights are"):
        mixed(*weights)
    with pytest.raises(ConfigError, match="2 data sets have 1 weights"):
        MixedSource([Numbers(3, 0), Numbers(3, 1)], [1.0])
