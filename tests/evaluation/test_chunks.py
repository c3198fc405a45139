"""Sums of chunks: added up, split, kept on disk, taken up again."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rar_jax.evaluation.chunks import Chunk, ChunkStore, accumulate_chunks
from rar_jax.evaluation.program import Settings
from rar_jax.metrics.inception_score import SplitSums
from rar_jax.metrics.moments import Moments
from rar_jax.metrics.sums import ScoreTotals, Sums
from rar_jax.runs.progress import show_progress_in_files

SETTINGS = Settings(seed=3, batch_size=8, chunk=20)  # 20 is 8 + 8 + 4: the last batch of a chunk is filled up
NUM, REFERENCE_NUM = 40, 30


def _random_sums(seed: int, count: int) -> Sums:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 3)).astype(np.float32)
    split = SplitSums(np.float32(count), rng.standard_normal(dtype=np.float32), rng.random(4, np.float32))
    return Sums(
        Moments(np.float32(count), x.sum(0), x.T @ x),
        Moments(np.float32(count), x[:, :2].sum(0), x[:, :2].T @ x[:, :2]),
        split,
    )


def equal(a: ScoreTotals, b: ScoreTotals) -> bool:
    left, right = a.to_arrays(), b.to_arrays()
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def test_totals_there_and_back_and_splits_are_counted() -> None:
    totals = ScoreTotals(split_size=20)
    for i, count in enumerate((10, 10, 10, 10, 3)):
        totals.add(_random_sums(i, count), count)
        restored = ScoreTotals.from_arrays(totals.to_arrays())
        assert equal(restored, totals) and restored.done == totals.done and restored.split_size == 20
    assert totals.done == 43
    assert [float(s.count) for s in totals.splits] == [20, 20, 3]
    np.testing.assert_allclose(
        totals.splits[1].p, sum(_random_sums(i, 10).split.p.astype(np.float64) for i in (2, 3)), rtol=1e-15
    )
    assert totals.pool3 is not None and totals.pool3.count == 43 and totals.pool3.outer.dtype == np.float64

    straight = ScoreTotals(split_size=20)
    for i, count in enumerate((10, 10, 10, 10, 3)):
        straight.add(_random_sums(i, count), count)
        straight = ScoreTotals.from_arrays(straight.to_arrays())  # as after a kill at every chunk
    assert equal(straight, totals)


@pytest.fixture
def shown() -> Iterator[None]:
    """Progress lines are printed, although stderr is no terminal."""
    show_progress_in_files(True)
    yield
    show_progress_in_files(False)


@pytest.mark.usefixtures("shown")
def test_accumulate_goes_on_behind_the_last_chunk(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []

    def compute(start: int, count: int) -> Chunk:
        calls.append((start, count))
        return Chunk(_random_sums(start, count), {"pool3": np.full((count, 2), start)})

    def run(folder: str, images: int, **keywords: Any) -> ScoreTotals:
        store = ChunkStore(tmp_path / folder, {"a": 1})
        return accumulate_chunks(store, compute, images=images, chunk=10, split_size=20, description="d", **keywords)

    straight = run("straight", 25)
    assert calls == [(0, 10), (10, 10), (20, 5)]
    assert "d  25/25 images" in capsys.readouterr().err
    run("resumed", 20, quiet=True)
    calls.clear()
    assert capsys.readouterr().err == ""
    resumed = run("resumed", 25)
    assert calls == [(20, 5)] and equal(resumed, straight) and resumed.done == 25
    err = capsys.readouterr().err
    assert "20/25 images" in err and "25/25 images" in err
    store = ChunkStore(tmp_path / "resumed", {"a": 1})
    (store.folder / "pool3_00000099.npy").write_text("of nobody")  # by the totals, and not by what a folder shows
    accumulate_chunks(store, compute, images=25, chunk=10, split_size=20, description="d", quiet=True)
    assert [len(x) for x in store.load_kept("pool3")] == [10, 10, 5]
    assert ChunkStore(tmp_path / "resumed", {"a": 2}).load_totals(20).done == 0, "something else is measured"
    calls.clear()
    assert equal(run("resumed", 25), straight) and calls == []


@pytest.mark.parametrize("damage", ["empty", "text", "first half", "bit", "without end", "other arrays"])
def test_damaged_totals_are_no_totals(tmp_path: pathlib.Path, damage: str) -> None:
    store = ChunkStore(tmp_path, {})
    totals = ScoreTotals(20)
    totals.add(_random_sums(0, 10), 10)
    store.save(totals, 0, {})
    assert equal(store.load_totals(20), totals)
    path = store.folder / "totals.npz"
    data = path.read_bytes()
    at = data.index(b"\x93NUMPY") + 130  # in the numbers of the first array
    changed = {
        "empty": b"",
        "text": b"hello",
        "first half": data[: len(data) // 2],
        "bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "without end": data[:-30],
        "other arrays": b"",
    }[damage]
    path.write_bytes(changed)
    if damage == "other arrays":
        np.savez(path, done=np.asarray(10))
    assert store.load_totals(20).done == 0
