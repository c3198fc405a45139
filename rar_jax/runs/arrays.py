"""The arrays of a checkpoint: zarr arrays in one OCDBT store, named "params.blocks.kernel".

On a disk Orbax writes them. Orbax 0.12.8 has no driver for s3:// and needs gcsfs for gs://: in a bucket the library
that it is built on, TensorStore, writes the same format. One function reads both. Every process writes its own shards
directly to their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

from rar_jax.parallel.processes import is_main
from rar_jax.runs.bucket import BucketPath, Path, kvstore_spec

FILE_BYTES = 2**28  # of a file in a bucket, at most: it is verified in memory


class DiskWriter:
    """Writes states to a disk in the background, by Orbax."""

    def __init__(self) -> None:
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._threads = ThreadPoolExecutor(1)
        self._saving: Future[None] = self._threads.submit(lambda: None)

    def start(self, state: Any, folder: Path, commit: Callable[[], None]) -> None:
        """Start writing. Once every process has written, process 0 calls `commit` in a background thread."""
        self._checkpointer.save(epath.Path(folder), args=ocp.args.PyTreeSave(state))
        self._saving = self._threads.submit(self._finish, commit)

    def _finish(self, commit: Callable[[], None]) -> None:
        self._checkpointer.wait_until_finished()
        if is_main():
            commit()

    def check(self) -> None:
        """Raise an error of the background thread."""
        if self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Return once `commit` has returned. Raises: errors of the background thread."""
        self._saving.result()


class BucketWriter:
    """Writes states to a bucket in the background, by TensorStore. The methods are those of DiskWriter."""

    def __init__(self) -> None:
        self._manager = GlobalAsyncCheckpointManager()

    def start(self, state: Any, folder: Path, commit: Callable[[], None]) -> None:
        names, arrays = _names(state), jax.tree.leaves(state)
        if (processes := jax.process_count()) == 1:
            specs = [_array_spec(folder, name) for name in names]
            _call_in_thread(self._manager.serialize, arrays, specs, on_commit_callback=commit)
            return
        part = folder / f"process_{jax.process_index()}"

        def merge_and_commit() -> None:
            _merge_parts(folder, processes)
            commit()

        specs = [_array_spec(part, name) for name in names]
        _call_in_thread(self._manager.serialize, arrays, specs, on_commit_callback=merge_and_commit)

    def check(self) -> None:
        self._manager.check_for_errors()

    def wait(self) -> None:
        self._manager.wait_until_finished()


def make_writer(folder: Path) -> DiskWriter | BucketWriter:
    """Return the writer for a folder."""
    return BucketWriter() if isinstance(folder, BucketPath) else DiskWriter()


def _call_in_thread(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call a function that runs an event loop. In the thread of a notebook one is running already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **keywords).result()


def _array_spec(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": _store_spec(folder, f"{name}/")}


def _store_spec(folder: Path, path: str = "") -> dict[str, Any]:
    base = kvstore_spec(folder)
    return {"driver": "ocdbt", "base": base, "path": path, "target_data_file_size": FILE_BYTES}


def _names(tree: Any) -> list[str]:
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def _merge_parts(folder: Path, processes: int) -> None:
    """Make one OCDBT store of those of all processes, by reference."""
    context, transaction = tensorstore.Context(), tensorstore.Transaction()  # copies need a common context
    merged = tensorstore.KvStore.open(_store_spec(folder), context=context).result()
    for process in range(processes):
        part = tensorstore.KvStore.open(_store_spec(folder / f"process_{process}"), context=context).result()
        part.experimental_copy_range_to(merged.with_transaction(transaction)).result()
    transaction.commit_async().result()


def read_array_names(folder: Path) -> list[str]:
    """Return the sorted names of the arrays in a folder."""
    keys = tensorstore.KvStore.open(_store_spec(folder)).result().list().result()
    return sorted(key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray"))


def load_arrays(folder: Path, names: list[str], shardings: list[Any] | None = None) -> list[Any]:
    """Read arrays: NumPy arrays, or with shardings jax.Arrays, of which each process reads its own shards."""
    specs = [_array_spec(folder, name) for name in names]
    if shardings is not None:
        return _call_in_thread(GlobalAsyncCheckpointManager().deserialize, shardings, specs)
    opened = [tensorstore.open(spec, open=True) for spec in specs]
    return [np.asarray(read.result()) for read in [array.result().read() for array in opened]]


def load_state(folder: Path, abstract_state: Any) -> Any:
    """Read a whole state, sharded as `abstract_state`: a tree of ShapeDtypeStructs."""
    leaves, tree = jax.tree.flatten(abstract_state)
    return jax.tree.unflatten(tree, load_arrays(folder, _names(abstract_state), [leaf.sharding for leaf in leaves]))


def load_tree(folder: Path, prefix: str, shardings: Any = None) -> dict[str, Any]:
    """Read the arrays whose names begin with a prefix, as a nested dict.

    Args:
      shardings: tree of shardings, or None for NumPy arrays.
    """
    if shardings is not None:
        names = [prefix + name for name in _names(shardings)]
        arrays = load_arrays(folder, names, jax.tree.leaves(shardings))
        return jax.tree.unflatten(jax.tree.structure(shardings), arrays)
    out: dict[str, Any] = {}
    names = [name for name in read_array_names(folder) if name.startswith(prefix)]
    for name, array in zip(names, load_arrays(folder, names), strict=True):
        *parents, last = name.removeprefix(prefix).split(".")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, out)[last] = array
    return out
