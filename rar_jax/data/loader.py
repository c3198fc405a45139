"""Global batches as a function of (seed, step) alone, through Grain.

The stream is a Grain dataset over *steps*: element k is this process's rows of global batch k, fetched by
one `gather`. So position is step, a start anywhere costs nothing, and neither the number of processes nor of
workers can change what a batch holds. Records are shuffled by a keyed permutation computed for a whole
batch at once: Grain's own shuffle is called record by record (docs/measurements/token_store.md).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import grain
import numpy as np
from absl import flags

from rar_jax.config import require

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """What the loader needs: an ImageSource, a TokenStore, or anything like them."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> Batch:
        """Records at `indices` (int64 (b,)), each array with leading axis b."""
        ...


@runtime_checkable
class OrderedSource(Source, Protocol):
    """A source that says itself what an endless shuffled stream of it is, such as a mix of several."""

    def places(self, position: np.ndarray, *, seed: int) -> np.ndarray:
        """Which record, int64 (b,), stands at each place of the stream, int64 (b,); as `shuffled`."""
        ...


def batches(
    source: Source,
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    rows: np.ndarray | None = None,
    num_workers: int = 0,
    epochs_shuffled: bool = True,
) -> grain.DatasetIterator[Batch]:
    """Endless batches k = start_step, start_step + 1, ...: these rows of global batch k.

    Epoch after epoch is laid end to end, each in an order of its own that holds every record once, and cut
    into batches: one may straddle two epochs, and no record is dropped.

    Returns: an iterator of {name: array (r, ...)}. With workers, `close()` it when done: they end with it.

    Args:
      global_batch: B, rows over all processes.
      rows: which of them this process takes, ints (r,) in [0, B); by default all.
      seed, start_step: what the stream is a function of. To resume, give the step: there is no other state.
      num_workers: 0 prefetches in a thread; more start that many processes, for sources slow to decode.
      epochs_shuffled: False takes the records in the source's order in every epoch.

    Raises: ConfigError for sizes that do not fit.
    """
    rows = _rows(source, global_batch, rows)
    require(seed >= 0 and start_step >= 0, f"seed ({seed}) and start_step ({start_step}) must not be negative")
    size = len(source)
    # A source of random views (an ImageSource says so itself) is told what to draw them from.
    random_views, gather = getattr(source, "random_views", False), cast(Any, source.gather)

    def batch(step: int) -> Batch:
        position = step * global_batch + rows
        if not epochs_shuffled:
            records = position % size
        elif isinstance(source, OrderedSource):
            records = source.places(position, seed=seed)
        else:
            records = shuffled(position, size=size, seed=seed)
        return gather(records, draws=draws(position, seed=seed)) if random_views else gather(records)

    # As many steps as keep a position within int64.
    return _stream(grain.MapDataset.range(start_step, sys.maxsize // global_batch - 1).map(batch), num_workers)


def sequential_batches(
    source: Source,
    *,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    spans: Sequence[tuple[int, int]] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Every record exactly once, in order: this process's rows of ceil(n / B) global batches, for evaluation.

    Every batch is whole. "weights", float32 (B/P,), is 1 for a record and 0 for the rows that fill the last
    batch up, which hold record 0.

    Args:
      num_workers: as in `batches`.
      spans: only these records, each [begin, end) cut into ceil((end - begin) / B) batches of its own.

    Raises: ConfigError for sizes that do not fit.
    """
    rows = _process_rows(source, global_batch, process_index, process_count)
    spans = [(0, len(source))] if spans is None else spans
    first_steps = np.cumsum([0, *(-(-(end - begin) // global_batch) for begin, end in spans)])

    def batch(step: int) -> Batch:
        span = int(np.searchsorted(first_steps, step, side="right")) - 1
        begin, end = spans[span]
        position = begin + (step - int(first_steps[span])) * global_batch + rows
        real = position < end
        return {**source.gather(np.where(real, position, 0)), "weights": real.astype(np.float32)}

    return _stream(grain.MapDataset.range(int(first_steps[-1])).map(batch), num_workers)


def steps_per_epoch(num_records: int, global_batch: int) -> float:
    """Batches in an epoch; not whole in general, since batches straddle epochs."""
    return num_records / global_batch


def batch_digest(batch: Batch) -> str:
    """sha256, in hex, over the names, dtypes, shapes and bytes of a batch."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()


def shuffled(position: np.ndarray, *, size: int, seed: int) -> np.ndarray:
    """Which record, int64 (b,) in [0, size), stands at each place of the endless shuffled stream, int64 (b,).

    Each epoch is a permutation keyed by (seed, epoch): a Feistel network on the next power of two, walked until
    it falls within the size (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). A place costs
    the same anywhere and no table is kept. Checkpoints rely on it: a changed constant changes every run's data.
    """
    epoch, place = np.divmod(position, size)
    record = np.empty_like(position)
    for e in np.unique(epoch):
        here = epoch == e
        record[here] = _permute(place[here], size, _round_keys(seed, int(e)))
    return record


def draws(position: np.ndarray, *, seed: int) -> np.ndarray:
    """Random bits, uint64 (b,), of each place of the endless stream, int64 (b,): what a random view is drawn from.

    A function of seed and place alone, so neither processes, workers nor a resumed run change a view; no two places
    have the same bits. Frozen as `shuffled` is.
    """
    # A key of its own: the order of records and their views have nothing to do with each other.
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/draws".encode(), digest_size=16).digest(), "<u8")
    return _mix(_mix(position.astype(np.uint64) + keys[0]) ^ keys[1])


_ROUNDS = 8


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 (_ROUNDS,). By a hash of both: with seed + epoch, seed 1's epoch 0 would be seed 0's epoch 1."""
    return np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest(), "<u8")


def _permute(place: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    bits = (size - 1).bit_length()
    value = place.astype(np.uint64)
    outside = np.arange(len(value))
    while outside.size:
        value[outside] = _feistel(value[outside], bits, keys)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2**bits): the two halves take turns in being changed by a hash of the other."""
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


def _rows(source: Source, global_batch: int, rows: np.ndarray | None) -> np.ndarray:
    everything = _process_rows(source, global_batch, 0, 1)
    if rows is None:
        return everything
    rows = np.asarray(rows, np.int64)
    require(
        rows.size > 0 and rows.min() >= 0 and rows.max() < global_batch,
        f"rows {rows.min(initial=0)}..{rows.max(initial=0)} of a global batch of {global_batch} cannot be: they are 0..{global_batch - 1}",
    )
    return rows


def _process_rows(source: Source, global_batch: int, process_index: int, process_count: int) -> np.ndarray:
    require(len(source) > 0, "the source holds no records")
    require(
        global_batch > 0 and global_batch % process_count == 0,
        f"a global batch of {global_batch} cannot be shared evenly by {process_count} processes",
    )
    require(0 <= process_index < process_count, f"process {process_index} of {process_count} cannot be")
    rows = global_batch // process_count
    return np.arange(process_index * rows, (process_index + 1) * rows, dtype=np.int64)


def _stream(steps: grain.MapDataset, num_workers: int) -> grain.DatasetIterator[Batch]:
    # One thread: a batch is one NumPy gather, and more threads would only fight over the interpreter lock.
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if num_workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads absl's flags when it starts workers, and outside absl.app nobody has parsed them.
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    return iter(dataset)
