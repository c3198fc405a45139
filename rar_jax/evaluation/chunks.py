"""The chunks of an evaluation, added up in float64 and stored on a disk or in a bucket.

Rerun after an interruption, an evaluation continues after its last finished chunk, with bitwise identical results. All
that the sums depend on is in the name of the folder. Every process has the sums; process 0 writes.

    <folder>/<hash>/evaluation.json     what the hash is of, for a person
    <folder>/<hash>/totals.npz          sums of the finished chunks
    <folder>/<hash>/pool3_00000.npy     an array of a chunk, if it is to be kept
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rar_jax.errors import ProcessError
from rar_jax.metrics.sums import ScoreTotals, Sums
from rar_jax.parallel.processes import barrier, from_main, is_main
from rar_jax.runs.bucket import BucketPath, Path, write_file
from rar_jax.runs.manifest import write_json
from rar_jax.runs.progress import track_progress


class Chunk(NamedTuple):
    """Sums of a span of images, and arrays (n, ...) to keep."""

    sums: Sums
    kept: dict[str, Any]


class ChunkStore:
    """The folder of one evaluation.

    made_from: all that the sums depend on, as JSON. keep: names of the arrays that every chunk stores.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
        self.keep = keep
        self.starts: range = range(0)  # of the chunks
        text = json.dumps({**made_from, "keep": keep}, sort_keys=True)
        self.folder: Path = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

        from_main(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        from_main(lambda: write_json(self.folder / "evaluation.json", made_from))

    def load_totals(self, split_size: int) -> ScoreTotals:
        """Load the sums so far; empty if there are none, or the file is damaged."""
        try:
            content = io.BytesIO((self.folder / "totals.npz").read_bytes())
            with np.load(content, allow_pickle=False) as file:
                return ScoreTotals.from_arrays(dict(file))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return ScoreTotals(split_size)

    def is_complete(self, images: int, chunk: int, done: int) -> bool:
        """Return whether the arrays of the first `done` images are whole."""
        try:
            return all(
                len(self._load(name, start)) == min(chunk, images - start)
                for start in range(0, done, chunk)
                for name in self.keep
            )
        except (OSError, ValueError, EOFError):
            return False

    def save(self, totals: ScoreTotals, start: int, kept: dict[str, np.ndarray]) -> None:
        """Write the arrays of a chunk, then the sums, which make the chunk count."""
        for name, array in kept.items():
            np.save(content := io.BytesIO(), array)
            write_file(self._path(name, start), content.getvalue())
        np.savez(content := io.BytesIO(), allow_pickle=False, **totals.to_arrays())
        write_file(self.folder / "totals.npz", content.getvalue())

    def load_kept(self, name: str) -> Iterator[np.ndarray]:
        """Yield the array of each chunk, by name: a listing of the folder may be stale."""
        for start in self.starts:
            yield self._load(name, start)

    def concatenate(self, name: str) -> np.ndarray:
        """Return the array of all chunks."""
        return np.concatenate(list(self.load_kept(name)))

    def _path(self, name: str, start: int) -> Path:
        return self.folder / f"{name}_{start:08d}.npy"

    def _load(self, name: str, start: int) -> np.ndarray:
        path = self._path(name, start)
        if isinstance(path, BucketPath):
            return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        return np.load(path, mmap_mode="r", allow_pickle=False)


def accumulate_chunks(
    store: ChunkStore,
    compute: Callable[[int, int], Chunk],
    *,
    images: int,
    chunk: int,
    split_size: int,
    description: str,
    quiet: bool = False,
) -> ScoreTotals:
    """Sum over `images` images: load the finished chunks and compute the others.

    compute: function (start, count) -> Chunk of the images start .. start + count - 1.
    """
    totals, store.starts = store.load_totals(split_size), range(0, images, chunk)
    done = from_main(lambda: totals.done if store.is_complete(images, chunk, totals.done) else 0)
    if not done:
        totals = ScoreTotals(split_size)
    if totals.done != done:
        raise ProcessError(
            f"{store.folder}: process 0 finds {done} images done, process {jax.process_index()} {totals.done}: give a "
            "path on storage that all hosts share"
        )
    spans = [(start, min(chunk, images - start)) for start in store.starts if start >= totals.done]
    sizes = [count for _, count in spans]
    for start, count in track_progress(spans, images, description, "images", quiet, sizes=sizes, done=totals.done):
        sums, kept = compute(start, count)
        totals.add(sums, count)
        if is_main():
            store.save(totals, start, kept)
    barrier(f"{description}: all chunks written")  # all processes read what is kept
    return totals
