"""The chunks of an evaluation: computed one after the other, added up in float64, and kept on disk.

A killed evaluation goes on behind its last chunk and ends in the same bits, since everything that the sums depend on is in
the name of the folder: what is measured, and how it is cut into chunks and batches. Every process has the sums; process 0 writes.

    <folder>/<hash>/evaluation.json     what the hash is of, for a person
    <folder>/<hash>/totals.npz          sums of the chunks that are done
    <folder>/<hash>/pool3_00000.npy     features of a chunk, if they are asked for
    <folder>/<hash>/images_00000.npy    its images, if they are asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rar_jax.errors import ProcessError
from rar_jax.metrics.sums import Sums, Totals
from rar_jax.parallel.processes import barrier, from_main, is_main
from rar_jax.runs.manifest import write_json
from rar_jax.runs.progress import track_progress


class Chunk(NamedTuple):
    """What `compute` gives for a span of images: sums, and arrays that are kept (pool3 (n, f), images (n, y, x, 3))."""

    sums: Sums
    kept: dict[str, Any]


class ChunkStore:
    """Where the chunks of one evaluation are."""

    def __init__(self, folder: pathlib.Path, what: dict[str, Any], keep: tuple[str, ...] = ()) -> None:
        """what: everything that the sums depend on, as JSON. keep: names of the arrays that every chunk leaves here."""
        self.keep = keep
        self.starts: range = range(0)  # of the chunks
        text = json.dumps({**what, "keep": keep}, sort_keys=True)
        self.folder: pathlib.Path = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

        def make() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "evaluation.json", what)

        from_main(make)

    def load(self, split_size: int) -> Totals:
        """The sums so far; empty if there are none, or the file is damaged."""
        try:
            with open(self.folder / "totals.npz", "rb") as stream, np.load(stream, allow_pickle=False) as file:
                return Totals.restore(dict(file))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return Totals(split_size)

    def whole(self, images: int, chunk: int, done: int) -> bool:
        """Whether all that the chunks of the first `done` images have left is here, and of the right length."""
        for start in range(0, done, chunk):
            for name in self.keep:
                try:
                    rows = len(np.load(self._path(name, start), mmap_mode="r", allow_pickle=False))
                except (OSError, ValueError, EOFError):
                    return False
                if rows != min(chunk, images - start):
                    return False
        return True

    def save(self, totals: Totals, start: int, kept: dict[str, np.ndarray]) -> None:
        """Writes what is kept of the chunk that starts at image `start`, and then the sums, which make it count."""
        for name, array in kept.items():
            self._write(self._path(name, start).name, lambda file, array=array: np.save(file, array))
        self._write("totals.npz", lambda file: np.savez(file, allow_pickle=False, **totals.arrays()))

    def kept(self, name: str) -> Iterator[np.ndarray]:
        """What was kept of each chunk that `accumulate` went through, in order. By name: another process's folder may be stale."""
        for start in self.starts:
            yield np.load(self._path(name, start), allow_pickle=False)

    def _path(self, name: str, start: int) -> pathlib.Path:
        return self.folder / f"{name}_{start:08d}.npy"

    def _write(self, name: str, write: Callable[[Any], None]) -> None:
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / name)


def accumulate(
    store: ChunkStore,
    compute: Callable[[int, int], Chunk],
    *,
    images: int,
    chunk: int,
    split_size: int,
    description: str,
    quiet: bool = False,
) -> Totals:
    """Sums over `images` images: those of the chunks that are done, and then of the others. Damaged ones are made anew.

    Args:
      compute: function (start, count) -> Chunk of the images start .. start + count - 1.
    """
    totals, store.starts = store.load(split_size), range(0, images, chunk)
    done = from_main(lambda: totals.done if store.whole(images, chunk, totals.done) else 0)
    if not done:
        totals = Totals(split_size)
    if totals.done != done:
        raise ProcessError(
            f"{store.folder}: process 0 finds {done} images done, process {jax.process_index()} {totals.done}: give a path on "
            "storage that all hosts share"
        )
    spans = [(start, min(chunk, images - start)) for start in store.starts if start >= totals.done]
    sizes = [count for _, count in spans]
    for start, count in track_progress(spans, images, description, "images", quiet, sizes=sizes, done=totals.done):
        sums, kept = compute(start, count)
        totals.add(sums, count)
        if is_main():
            store.save(totals, start, {name: np.asarray(array)[:count] for name, array in kept.items()})
    barrier(f"{description}: all chunks written")  # what is kept is read by all
    return totals
