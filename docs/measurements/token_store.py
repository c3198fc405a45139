"""Measures the two candidates for the token store, .npy memory maps and ArrayRecord, read through Grain.

    python docs/measurements/token_store.py

Writes 200,000 records of 256 tokens in both formats, then reads random batches of 256 from each in turn, five
times, and prints the rates and their ratio; then the same for the two ways to shuffle. About a minute.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from rar_jax.data import loader
from rar_jax.models import TokenSpec
from rar_jax.tokens import store as token_store
from rar_jax.tokens import writer as token_writer

RECORDS, TOKENS, BATCH, SHARDS, ROUNDS = 200_000, 256, 256, 4, 5
CODEBOOK, CLASSES = 1024, 1000


class ArrayRecordSource:
    """The store's `gather` over ArrayRecord files, at their best: one batched read, uncompressed (half the time)."""

    def __init__(self, paths: list[str], dtype: np.dtype) -> None:
        self._source: Any = grain.sources.ArrayRecordDataSource(paths)
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._source)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        records = np.frombuffer(b"".join(self._source.__getitems__(indices.tolist())), self._dtype)
        return {"tokens": records["tokens"].astype(np.int32), "labels": records["label"].astype(np.int32)}


def write(folder: pathlib.Path) -> tuple[token_store.TokenStore, ArrayRecordSource]:
    rng = np.random.default_rng(0)
    card: dict[str, Any] = dict.fromkeys(token_store.CARD_KEYS, "")
    spec = TokenSpec((TOKENS,), "uint16", CODEBOOK)
    card |= {"spec": dataclasses.asdict(spec), "num_classes": CLASSES, "crops": ["whole image"]}
    card |= {"class_names": [str(c) for c in range(CLASSES)]}
    dtype = token_store.record_dtype(spec)
    paths = [str(folder / f"{j}.array_record") for j in range(SHARDS)]
    array_writers = [ArrayRecordWriter(path, "group_size:1,uncompressed") for path in paths]
    shard_records = RECORDS // SHARDS
    writer = token_writer.TokenStoreWriter(folder / "npy", card, source_records=RECORDS, shard_records=shard_records)
    for j in writer.missing():
        with writer.shard(j) as shard:
            for start in range(*writer.span(j), 10_000):
                ids = np.arange(start, start + 10_000)
                tokens, labels = rng.integers(0, CODEBOOK, (10_000, TOKENS)), rng.integers(0, CLASSES, 10_000)
                shard.append(tokens, labels, ids, np.zeros(10_000, int))
                records = np.zeros(10_000, dtype)
                records["tokens"], records["label"], records["source_id"] = tokens, labels, ids
                for record in records:
                    array_writers[j].write(record.tobytes())
    writer.finish()
    for array_writer in array_writers:
        array_writer.close()
    return token_store.TokenStore(folder / "npy"), ArrayRecordSource(paths, dtype)


def rate(stream: Iterator[object], records: int) -> float:
    next(stream)
    start = time.perf_counter()
    for _ in range(records // BATCH):
        next(stream)
    return records // BATCH * BATCH / (time.perf_counter() - start)


def compare(title: str, ways: dict[str, Callable[[int], float]]) -> None:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_index in range(ROUNDS):
        for name, way in ways.items():
            rates[name].append(way(round_index))
    first, *others = ways
    print(f"\n{title}, thousand records/s in {ROUNDS} rounds")
    for name, values in rates.items():
        print(
            f"| {name} | "
            + " | ".join(f"{v / 1e3:.0f}" for v in values)
            + f" | {statistics.median(values) / 1e3:.0f} |"
        )
    for other in others:
        ratios = [a / b for a, b in zip(rates[first], rates[other], strict=True)]
        print(
            f"| {first} / {other} | " + " | ".join(f"{r:.1f}" for r in ratios) + f" | {statistics.median(ratios):.1f} |"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        store, array_record = write(folder)
        sizes = [sum(f.stat().st_size for f in folder.glob(g)) / 2**20 for g in ("npy/*.npy", "*.array_record")]
        print(f"size: .npy {sizes[0]:.0f} MiB, ArrayRecord {sizes[1]:.0f} MiB")

        def through_loader(source: loader.Source, records: int) -> Callable[[int], float]:
            return lambda k: rate(loader.batches(source, global_batch=BATCH, seed=k, start_step=0), records)

        def with_threads(k: int) -> float:
            def batch(step: int) -> dict[str, np.ndarray]:
                place = np.arange(step * BATCH, (step + 1) * BATCH)
                return array_record.gather(loader.shuffle_positions(place, size=RECORDS, seed=k))

            options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)
            return rate(iter(grain.MapDataset.range(10**9).map(batch).to_iter_dataset(options)), 40_000)

        compare(
            "random batches of 256",
            {
                ".npy": through_loader(store, 200_000),
                "ArrayRecord": through_loader(array_record, 20_000),
                "ArrayRecord, 4 threads": with_threads,
            },
        )

        def with_grain_shuffle(k: int) -> float:
            order = grain.MapDataset.range(RECORDS).seed(k).shuffle().repeat()
            ids = order.batch(BATCH, batch_fn=np.array).map(store.gather)
            return rate(iter(ids.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))), 40_000)

        compare(
            "the same .npy store, shuffled in two ways",
            {"loader.shuffle_positions": through_loader(store, 200_000), "MapDataset.shuffle": with_grain_shuffle},
        )


if __name__ == "__main__":
    main()
