"""array_record:PATH, records of a label (4 bytes, little-endian, signed) and an encoded image.

A classes.txt in the folder names the classes, one per line. tfds:NAME reads TFDS datasets prepared as ArrayRecord.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import find_data_files, read_class_names, split_files
from rar_jax.errors import ConfigError, DecodeError

_MISSING = "ArrayRecord files need a package: pip install array_record"


class ArrayRecordSource(EncodedSource):
    """Labels are known only by reading: a held-out share is one of all records. Raises: ConfigError."""

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"array_record:{argument}"
        found = find_data_files(spec, argument, (".array_record", ".arrayrecord"))
        paths, _, hold_out = split_files(spec, found, split)
        if (names := read_class_names(found[0].parent)) is None:
            raise ConfigError(f"{spec}: no classes.txt beside {found[0].name}: write one class name per line")
        try:
            from array_record.python import array_record_data_source
        except ImportError:
            raise ConfigError(f"{spec}: {_MISSING}") from None
        try:
            # Each process opens the files itself, when it reads them.
            self._data: Any = array_record_data_source.ArrayRecordDataSource([str(path) for path in paths])
            length = len(self._data)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{spec}: no whole ArrayRecord files ({str(error).splitlines()[0]})") from None
        super().__init__(spec, view, length=length, labels=None, class_names=names, hold_out=hold_out)

    def _name(self, row: int) -> str:
        return f"record {row}"

    def _record(self, row: int) -> tuple[bytes, int]:
        try:
            record: bytes = self._data[row]
        except (RuntimeError, IndexError) as error:
            raise DecodeError(f"unreadable record: {str(error).splitlines()[0]}") from None
        return record[4:], int.from_bytes(record[:4], "little", signed=True)


def write_array_record(path: pathlib.Path, images: Iterable[tuple[bytes, int]], *, class_names: Sequence[str]) -> int:
    """Write (encoded image, label) pairs and classes.txt; return how many. Raises: ConfigError."""
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError:
        raise ConfigError(_MISSING) from None
    count = 0
    # One record per group, for random access; uncompressed, since images are compressed.
    writer: Any = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    with contextlib.closing(writer):
        for data, label in images:
            require(0 <= label < len(class_names), f"label {label} of image {count} has no class name")
            writer.write(label.to_bytes(4, "little", signed=True) + data)
            count += 1
    (path.parent / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    return count
