"""parquet:PATH, the Hugging Face hub's layout: image {bytes, path} and label."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import find_data_files, number_classes, split_files
from rar_jax.errors import ConfigError, DecodeError

# Each process caches as many row groups as fit, and at least one.
CACHE_BYTES = 256 * 2**20


class ParquetSource(EncodedSource):
    """Parquet files with columns "image" and "label"; class names come from the schema, else they are numbers.

    The smallest readable unit is a row group, commonly 100 to 1000 images. A shuffled stream of a large set reads one
    for nearly every image: tokenize in order, or unpack to folder:. Raises: ConfigError.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"parquet:{argument}"
        self._paths, train, hold_out = split_files(spec, find_data_files(spec, argument, (".parquet",)), split)
        opened = [_open_file(spec, path) for path in self._paths]
        names = _read_feature_names(opened[0].schema_arrow.metadata)
        sizes = [[f.metadata.row_group(g).num_rows for g in range(f.metadata.num_row_groups)] for f in opened]
        self._groups = [(file, group) for file, rows in enumerate(sizes) for group in range(len(rows))]
        self._ends = np.cumsum([0, *(n for rows in sizes for n in rows)], dtype=np.int64)
        self._file_ends = np.cumsum([0, *(sum(rows) for rows in sizes)], dtype=np.int64)
        labels = np.concatenate([_read_labels(spec, path) for path in self._paths])
        names = names or number_classes(np.concatenate([_read_labels(spec, path) for path in train]))
        self._open_files: dict[int, Any] = {}
        self._cache: dict[int, Any] = {}
        length = int(self._ends[-1])
        super().__init__(spec, view, length=length, labels=labels, class_names=names, hold_out=hold_out)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself.
        return {**self.__dict__, "_open_files": {}, "_cache": {}}

    def _name(self, row: int) -> str:
        file = int(np.searchsorted(self._file_ends, row, side="right")) - 1
        return f"{self._paths[file].name}:{row - self._file_ends[file]}"

    def _record(self, row: int) -> tuple[bytes, int]:
        group = int(np.searchsorted(self._ends, row, side="right")) - 1
        value = self._read_group(group)[row - int(self._ends[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise DecodeError("no bytes: the row is empty or names a file elsewhere")
        return data, -1

    def _read_group(self, index: int) -> Any:
        """Return the image column of a row group, through the cache."""
        if index not in self._cache:
            file, group = self._groups[index]
            if file not in self._open_files:
                self._open_files = {file: _open_file(self.spec, self._paths[file])}  # one: footers may be large
            # Make room first, by the size in the footer, so that the bound holds while reading too.
            coming = self._open_files[file].metadata.row_group(group).total_byte_size
            while self._cache and coming + sum(column.nbytes for column in self._cache.values()) > CACHE_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = self._open_files[file].read_row_group(group, columns=["image"])["image"]
        return self._cache[index]


def _open_file(spec: str, path: pathlib.Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{spec}: Parquet files need a package: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{spec}: {path.name} is no whole Parquet file ({str(error).splitlines()[0]})") from None
    columns = file.schema_arrow.names
    require({"image", "label"} <= set(columns), f"{spec}: {path.name} has columns {columns}, not 'image' and 'label'")
    return file


def _read_labels(spec: str, path: pathlib.Path) -> np.ndarray:
    column = _open_file(spec, path).read(columns=["label"])["label"]
    require(column.null_count == 0, f"{spec}: {path.name} has {column.null_count} rows without a label")
    labels = column.to_numpy()
    require(labels.dtype.kind in "iu", f"{spec}: labels of {path.name} are {column.type}, expected integers")
    return labels.astype(np.int64)


def _read_feature_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """Return the class names that the datasets library wrote into the schema, or None."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None
