"""Global batches as a function of (seed, step) alone, through Grain.

The stream is a Grain dataset over *steps*: element k is this process's rows of global batch k, fetched by one `gather`.
The shuffle is a keyed permutation of a whole batch: Grain's own is called record by record
(docs/measurements/token_store.md).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

import grain
import numpy as np
from absl import flags

from rar_jax.config import require

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """What the loader needs of an ImageSource, a TokenStore or anything like them.

    Optional: `order_records(position, *, seed)` for a stream of the source's own (see `MixedSource`), and
    `random_views` if `gather` takes `draws`.
    """

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> Batch:
        """Records at `indices` (int64 (b,)), each array with leading axis b."""
        ...


def batches(
    source: Source,
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    rows: np.ndarray | None = None,
    num_workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Iterate endlessly over global batches start_step, start_step + 1, ...

    Epochs are concatenated, each in its own order that holds every record once, and cut into batches: a batch may
    straddle two epochs, and no record is dropped.

    Args:
      rows: rows of the global batch to return, ints (r,), default all.
      seed, start_step: the stream is a function of these alone. To resume, give the step.
      num_workers: 0 prefetches in a thread; more start that many processes. `close()` the iterator to end them.
    """
    require(len(source) > 0, "the source holds no records")
    require(global_batch > 0, f"global batch is {global_batch}: it must be positive")
    rows = np.arange(global_batch, dtype=np.int64) if rows is None else np.asarray(rows, np.int64)
    fits = rows.size > 0 and rows.min() >= 0 and rows.max() < global_batch
    require(fits, f"rows {rows} are not in a global batch of {global_batch}")
    require(seed >= 0 and start_step >= 0, f"seed ({seed}) and start_step ({start_step}) must not be negative")
    order = getattr(source, "order_records", functools.partial(shuffle_positions, size=len(source)))
    random_views, gather = getattr(source, "random_views", False), cast(Any, source.gather)

    def batch(step: int) -> Batch:
        position = step * global_batch + rows
        records = order(position, seed=seed)
        return gather(records, draws=draw_bits(position, seed=seed)) if random_views else gather(records)

    # As many steps as keep a position within int64.
    return _stream(grain.MapDataset.range(start_step, sys.maxsize // global_batch - 1).map(batch), num_workers)


def sequential_batches(
    source: Source, *, global_batch: int, spans: Sequence[tuple[int, int]], num_workers: int = 0
) -> grain.DatasetIterator[Batch]:
    """Iterate once over spans [begin, end) of records, each in ceil((end - begin) / B) batches of its own.

    "weights", float32 (B,), is 1 for a record and 0 for the rows that fill up a span's last batch, which hold record 0.
    """
    first_steps = np.cumsum([0, *(-(-(end - begin) // global_batch) for begin, end in spans)])

    def batch(step: int) -> Batch:
        span = int(np.searchsorted(first_steps, step, side="right")) - 1
        begin, end = spans[span]
        position = begin + (step - int(first_steps[span])) * global_batch + np.arange(global_batch)
        real = position < end
        return {**source.gather(np.where(real, position, 0)), "weights": real.astype(np.float32)}

    return _stream(grain.MapDataset.range(int(first_steps[-1])).map(batch), num_workers)


def shuffle_positions(position: np.ndarray, *, size: int, seed: int) -> np.ndarray:
    """Return the record, int64 (b,), at each position of the shuffled stream.

    Each epoch is a permutation keyed by (seed, epoch): a Feistel network on the next power of two, iterated until it
    falls within the size (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Frozen.
    """
    epoch, place = np.divmod(position, size)
    record = np.empty_like(position)
    for e in np.unique(epoch):
        here = epoch == e
        keys = hashlib.blake2b(f"{seed}/{e}".encode(), digest_size=64).digest()  # no two epochs of two seeds agree
        record[here] = _permute(place[here], size, np.frombuffer(keys, "<u8"))
    return record


def draw_bits(position: np.ndarray, *, seed: int) -> np.ndarray:
    """Return random bits, uint64 (b,), for the view at each position; no two have the same. Frozen."""
    # Its own key: record order and views are independent.
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/draws".encode(), digest_size=16).digest(), "<u8")
    return _mix(_mix(position.astype(np.uint64) + keys[0]) ^ keys[1])


def _permute(place: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    bits = (size - 1).bit_length()
    value = place.astype(np.uint64)
    outside = np.arange(len(value))
    while outside.size:
        value[outside] = _feistel(value[outside], bits, keys)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute [0, 2**bits): each half is changed in turn by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    low, high = value & low_mask, value >> low_bits
    for i, key in enumerate(keys):
        if i % 2:
            low = low ^ (_mix(high ^ key) & low_mask)
        else:
            high = high ^ (_mix(low ^ key) & high_mask)
    return (high << low_bits) | low


def _mix(value: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of MurmurHash3: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


def _stream(steps: grain.MapDataset, num_workers: int) -> grain.DatasetIterator[Batch]:
    # One thread: a batch is one NumPy gather, and more threads would compete for the interpreter lock.
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if num_workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads absl's flags when it starts workers; outside absl.app they are not parsed.
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    return iter(dataset)
