"""The stream of batches is a function of (seed, step) alone."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from typing import Any

import grain
import numpy as np
import pytest
from digests import batch_digest

from rar_jax.data.loader import Batch, batches, draw_bits, sequential_batches, shuffle_positions
from rar_jax.data.sources import ImageSource, load_source
from rar_jax.errors import ConfigError
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter

BATCH = 48  # 360 held-out digits: 7.5 batches an epoch, so that epochs are straddled


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return load_source("digits", "heldout")


def take(stream: grain.DatasetIterator[Batch], count: int) -> list[Batch]:
    with contextlib.closing(stream):
        return list(itertools.islice(stream, count))


def stream(source: ImageSource, count: int, **changes: Any) -> list[Batch]:
    return take(batches(source, **{"global_batch": BATCH, "seed": 3, "start_step": 0, **changes}), count)


def shares(process_count: int) -> np.ndarray:
    """The rows of each process where they are neighbours."""
    return np.arange(BATCH).reshape(process_count, -1)


def ids(stream: list[Batch]) -> np.ndarray:
    return np.concatenate([batch["ids"] for batch in stream])


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batch_is_the_same_for_any_number_of_processes(source: ImageSource, process_count: int) -> None:
    parts = [stream(source, 10, rows=rows) for rows in shares(process_count)]
    for k, whole in enumerate(stream(source, 10)):
        assert all(len(part[k]["ids"]) == BATCH // process_count for part in parts)
        joined = {key: np.concatenate([part[k][key] for part in parts]) for key in whole}
        assert batch_digest(joined) == batch_digest(whole), f"global batch {k}"


def test_any_rows_of_the_batch(source: ImageSource) -> None:
    """A process need not hold neighbours: those of every other device, and some that another process holds too."""
    rows = np.array([1, 2, 9, 30, 47])
    for part, whole in zip(stream(source, 9, rows=rows, start_step=3), stream(source, 9, start_step=3), strict=True):
        assert batch_digest(part) == batch_digest({key: value[rows] for key, value in whole.items()})


def test_global_batch_is_the_same_for_any_number_of_workers(source: ImageSource) -> None:
    here, there = stream(source, 7, start_step=5), stream(source, 7, start_step=5, num_workers=2)
    assert [batch_digest(b) for b in here] == [batch_digest(b) for b in there]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """371 records in 9 shards of up to 48; every fifth could not be decoded, so that shards differ in length."""
    folder = tmp_path_factory.mktemp("tokens") / "store"
    card = {
        "spec": {"shape": [5], "dtype": "uint32", "vocab": 70_000},
        "num_classes": 3,
        "class_names": list("abc"),
        "crops": ["whole"],
    }
    card |= {"source": "made up", "tokenizer_sha256": None}
    writer = TokenStoreWriter(folder, card, source_records=464, shard_records=53)
    rng = np.random.default_rng(0)
    for j in writer.missing():
        begin, end = writer.span(j)
        columns = rng.integers(0, 70_000, (end - begin, 5)), rng.integers(0, 3, end - begin), np.arange(begin, end)
        with writer.shard(j) as shard:
            shard.append(*columns, np.zeros(end - begin, int), np.arange(begin, end) % 5 == 0)
    assert writer.finish()
    return TokenStore(folder)


@pytest.mark.parametrize(("process_count", "num_workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_tokens_are_the_same_for_any_number_of_processes_and_workers(
    tokens: TokenStore, process_count: int, num_workers: int
) -> None:
    def streams(**changes: Any) -> list[Batch]:
        return take(batches(tokens, global_batch=BATCH, seed=3, start_step=6, **changes), 9)

    whole = streams()
    parts = [streams(rows=rows, num_workers=num_workers) for rows in shares(process_count)]
    joined = [{key: np.concatenate([part[k][key] for part in parts]) for key in whole[0]} for k in range(9)]
    assert [batch_digest(batch) for batch in joined] == [batch_digest(batch) for batch in whole]
    assert len(tokens) == 371 and not np.any(ids(whole) % 5 == 0)
    # By the definition: record shuffle_positions(place) of the file.
    places = np.arange(6 * BATCH, 15 * BATCH)
    records = np.concatenate([np.load(path) for path in sorted(tokens.folder.glob("*.npy"))])
    expected = records[shuffle_positions(places, size=371, seed=3)]
    np.testing.assert_array_equal(np.concatenate([batch["tokens"] for batch in whole]), expected["tokens"])
    np.testing.assert_array_equal(ids(whole), expected["source_id"])


@pytest.mark.parametrize("start_step", [1, 7, 8, 15])
def test_resume_equals_a_straight_run(source: ImageSource, start_step: int) -> None:
    straight = [batch_digest(b) for b in stream(source, 18)]
    assert [batch_digest(b) for b in stream(source, 18 - start_step, start_step=start_step)] == straight[start_step:]


def test_every_record_once_an_epoch_in_another_order(source: ImageSource) -> None:
    epochs = ids(stream(source, 30)).reshape(4, 360)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(epochs[0]))
        assert len(np.unique(epoch)) == 360
    for a, b in itertools.combinations(epochs, 2):
        assert np.sum(a == b) < 10  # 1 is expected of two random orders


def test_seeds_give_unrelated_streams(source: ImageSource) -> None:
    """Also across epochs: a stream keyed by seed + epoch would repeat seed 4's first epoch as seed 3's second."""
    three, four = (ids(stream(source, 30, seed=seed)).reshape(4, 360) for seed in (3, 4))
    for a, b in itertools.product(three, four):
        assert np.sum(a == b) < 10


def test_the_stream_is_frozen() -> None:
    """A run resumed by a newer version must see the same data: never update these numbers."""
    np.testing.assert_array_equal(shuffle_positions(np.arange(98, 104), size=100, seed=7), [9, 53, 0, 89, 2, 41])
    far = 10**15 + np.arange(4)
    np.testing.assert_array_equal(shuffle_positions(far, size=12_811_670, seed=7), [10826404, 6064605, 6233756, 850466])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1437])
def test_shuffle_is_a_permutation(size: int) -> None:
    for epoch in range(3):
        order = shuffle_positions(np.arange(size) + epoch * size, size=size, seed=0)
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_shuffle_is_uniform() -> None:
    """Over many epochs: each record equally often at each place, and each pair equally often side by side."""
    size, epochs = 23, 8000
    orders = shuffle_positions(np.arange(size * epochs), size=size, seed=1).reshape(epochs, size)
    at_place = np.stack([np.bincount(orders[:, i], minlength=size) for i in range(size)])
    pairs = np.bincount((orders[:, :-1] * size + orders[:, 1:]).ravel(), minlength=size**2).reshape(size, size)
    off_diagonal = pairs[~np.eye(size, dtype=bool)]
    for counts in (at_place.ravel(), off_diagonal):
        freedom = counts.size - 1
        chi2 = np.sum((counts - counts.mean()) ** 2) / counts.mean()
        assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("global_batch", [48, 360, 720, 4])
def test_sequential_gives_each_record_once_in_order(source: ImageSource, global_batch: int) -> None:
    whole = list(sequential_batches(source, global_batch=global_batch, spans=[(0, 360)]))
    assert all(len(batch["ids"]) == global_batch for batch in whole)
    weights = np.concatenate([batch["weights"] for batch in whole])
    assert (weights.dtype, weights.sum()) == (np.float32, 360)
    np.testing.assert_array_equal(ids(whole)[weights == 1], source.gather(np.arange(360))["ids"])
    assert np.all(ids(whole)[weights == 0] == source[0]["ids"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_spans_are_cut_into_batches_of_their_own(source: ImageSource, num_workers: int) -> None:
    spans = [(0, 5), (100, 148), (300, 300), (200, 297)]
    rows = take(sequential_batches(source, global_batch=BATCH, spans=spans, num_workers=num_workers), 99)
    everything = source.gather(np.arange(360))["ids"]
    seen = [batch["ids"][batch["weights"] > 0].tolist() for batch in rows]
    expected = [(0, 5), (100, 148), (200, 248), (248, 296), (296, 297)]
    assert seen == [everything[begin:end].tolist() for begin, end in expected]
    assert all(len(batch["ids"]) == BATCH for batch in rows)


def test_digest_sees_everything() -> None:
    base = {"a": np.arange(6, dtype=np.int32), "b": np.zeros(2, np.float32)}
    others = [
        {**base, "a": base["a"][::-1]},
        {**base, "a": base["a"].reshape(2, 3)},
        {**base, "a": base["a"].view(np.uint32)},
        {"c": base["a"], "b": base["b"]},
    ]
    assert batch_digest(dict(reversed(base.items()))) == batch_digest(base)
    assert len({batch_digest(batch) for batch in [base, *others]}) == 5


def test_wrong_sizes_are_refused(source: ImageSource) -> None:
    for wrong in ([0, 48], [-1], []):
        with pytest.raises(ConfigError, match="are not in a global batch of 48"):
            batches(source, global_batch=48, seed=0, start_step=0, rows=np.array(wrong))
    with pytest.raises(ConfigError, match="must be positive"):
        batches(source, global_batch=0, seed=0, start_step=0)
    with pytest.raises(ConfigError, match="negative"):
        batches(source, global_batch=48, seed=0, start_step=-1)


class Draws(ImageSource):
    """A source of random views that shows what it was told to draw from."""

    random_views = True

    def __init__(self) -> None:
        super().__init__(image_shape=(1, 1, 1), class_names=("x",))

    def __len__(self) -> int:
        return 100

    def gather(self, indices: np.ndarray, *, draws: np.ndarray | None = None) -> Batch:
        assert draws is not None and draws.dtype == np.uint64
        return {"ids": indices, "draws": draws}


def murmur(value: int) -> int:
    """MurmurHash3's finaliser for 64 bits, in Python's integers."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 1):
        value = (value ^ value >> 33) * factor % 2**64
    return value


def test_draws_are_frozen_and_a_function_of_seed_and_place() -> None:
    """A run resumed by a newer version must see the same views: never update these numbers."""
    keys = hashlib.blake2b(b"7/draws", digest_size=16).digest()
    first, second = int.from_bytes(keys[:8], "little"), int.from_bytes(keys[8:], "little")
    places = [0, 1, 2, 10**15]
    expected = [murmur(murmur((place + first) % 2**64) ^ second) for place in places]
    assert draw_bits(np.array(places), seed=7).tolist() == expected
    assert expected == [12697684617053300935, 1330543431561303779, 5780856732798935061, 17953029480037002238]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_draws_are_the_same_for_any_number_of_processes(process_count: int) -> None:
    source = Draws()
    parts = [stream(source, 6, start_step=2, rows=rows) for rows in shares(process_count)]
    for k in range(6):
        found = np.concatenate([part[k]["draws"] for part in parts])
        place = (2 + k) * BATCH + np.arange(BATCH)
        np.testing.assert_array_equal(found, draw_bits(place, seed=3))
        np.testing.assert_array_equal(
            np.concatenate([p[k]["ids"] for p in parts]), shuffle_positions(place, size=100, seed=3)
        )


def test_a_record_is_drawn_differently_each_epoch_and_by_each_seed() -> None:
    every = np.concatenate([batch["draws"] for seed in (3, 4) for batch in stream(Draws(), 50, seed=seed)])
    assert len(np.unique(every)) == 2 * 50 * BATCH
    high = np.histogram(every.astype(np.float64) / 2**64, bins=10, range=(0, 1))[0] / len(every)
    assert np.abs(high - 0.1).max() < 0.02
