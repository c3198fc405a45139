"""parquet:PATH, as the Hugging Face hub keeps image sets: columns image {bytes, path} and label."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import data_files, heldout_mask, split_files
from rar_jax.errors import ConfigError, DecodeError

# A process keeps as many row groups as fit, and always one.
CACHE_BYTES = 256 * 2**20


class ParquetSource(EncodedSource):
    """One file, a folder or a glob of .parquet files; `splits.split_files` says which are held out.

    The smallest piece of Parquet that can be read is a row group, commonly 100 to 1000 images. Rows in order read each
    group once; a shuffled stream reads a group for nearly every image: tokenize in order, or unpack to folder:.

    Classes are named by the Hugging Face metadata of the schema, else by their numbers.

    Raises: ConfigError for a missing or damaged file, columns of another kind, or pyarrow not installed.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"parquet:{argument}"
        found = data_files(spec, argument, (".parquet",))
        self._paths, train, share = split_files(spec, found, split)
        opened = [_open(spec, path) for path in self._paths]
        names = _class_names(opened[0].schema_arrow.metadata)
        sizes = [[f.metadata.row_group(g).num_rows for g in range(f.metadata.num_row_groups)] for f in opened]
        self._groups = [(file, group) for file, rows in enumerate(sizes) for group in range(len(rows))]
        self._ends = np.cumsum([n for rows in sizes for n in rows], dtype=np.int64)
        self._file_ends = np.cumsum([sum(rows) for rows in sizes], dtype=np.int64)
        labels = np.concatenate([_labels(spec, path, file) for path, file in zip(self._paths, opened, strict=True)])
        if names is None:
            # From the training labels in both splits: held-out files may lack the last class.
            every = [labels] if self._paths == train else [_labels(spec, path, _open(spec, path)) for path in train]
            names = tuple(str(c) for c in range(max(int(n.max(initial=-1)) for n in every) + 1))
        self._rows = np.arange(len(labels))
        if share:
            mask = heldout_mask(
                labels, [self._row_name(row).encode("utf-8", "surrogateescape") for row in range(len(labels))]
            )
            self._rows = np.flatnonzero(mask == (split == "heldout"))
            labels = labels[self._rows]
        self._forget()
        super().__init__(spec, view, length=len(labels), labels=labels, class_names=names)

    def _forget(self) -> None:
        self._open_files: dict[int, Any] = {}
        self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the files for itself.
        return {**self.__dict__, "_open_files": {}, "_cache": collections.OrderedDict()}

    def _row_name(self, row: int) -> str:
        file = int(np.searchsorted(self._file_ends, row, side="right"))
        return f"{self._paths[file].name}:{row - (self._file_ends[file - 1] if file else 0)}"

    def _name(self, image: int) -> str:
        return self._row_name(int(self._rows[image]))

    def _record(self, image: int) -> tuple[bytes, int]:
        row = int(self._rows[image])
        place = int(np.searchsorted(self._ends, row, side="right"))
        value = self._group(place)[row - int(self._ends[place - 1] if place else 0)].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise DecodeError("no bytes: the row is empty or names a file elsewhere")
        return data, self.label(image)

    def _group(self, place: int) -> Any:
        """The image column of a row group, from the cache or read; the least recently used go first."""
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        file, group = self._groups[place]
        if file not in self._open_files:
            self._open_files = {file: _open(self.spec, self._paths[file])}  # one: its footer may be large
        # Room first, by the size that the footer tells, so that the bound holds while reading, too.
        coming = self._open_files[file].metadata.row_group(group).total_byte_size
        while self._cache and coming + sum(column.nbytes for column in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        self._cache[place] = self._open_files[file].read_row_group(group, columns=["image"])["image"]
        return self._cache[place]


def _open(spec: str, path: pathlib.Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{spec}: Parquet is read by pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{spec}: {path.name} is no whole Parquet file ({str(error).splitlines()[0]})") from None
    columns = file.schema_arrow.names
    require({"image", "label"} <= set(columns), f"{spec}: {path.name} has columns {columns}, not 'image' and 'label'")
    return file


def _labels(spec: str, path: pathlib.Path, file: Any) -> np.ndarray:
    column = file.read(columns=["label"])["label"]
    require(column.null_count == 0, f"{spec}: {path.name} has {column.null_count} rows without a label")
    labels = column.to_numpy()
    require(
        np.issubdtype(labels.dtype, np.integer),
        f"{spec}: the labels of {path.name} are {column.type}, not whole numbers: give each class its number",
    )
    return labels.astype(np.int64)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """From the features that the datasets library writes into the schema; None if they are not there."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None
