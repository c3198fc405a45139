"""array_record:PATH, our own simplest records: a label and an encoded image.

A record is the label, 4 bytes, a little-endian signed integer, and then the encoded image as it was. A classes.txt in
the folder has the names of the classes, one a line. (What TFDS has prepared as ArrayRecord is read by tfds:NAME.)
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import class_names_beside, data_files, heldout_mask, split_files
from rar_jax.errors import ConfigError, DecodeError

_MISSING = "ArrayRecord files are read and written by array_record: pip install array_record"
_LABEL_BYTES = 4


class ArrayRecordSource(EncodedSource):
    """One file, a folder, a glob or a brace range of .array_record files; `splits.split_files` says which are held out.

    Labels are known only by reading: a share to hold out is therefore one of all records, not of each class.

    Raises: ConfigError for a missing or damaged file, no classes.txt, or array_record not installed.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"array_record:{argument}"
        found = data_files(spec, argument, (".array_record", ".arrayrecord"))
        self._paths, _, share = split_files(spec, found, split)
        if (names := class_names_beside(found[0])) is None:
            raise ConfigError(f"{spec}: no classes.txt beside {found[0].name}: write the classes' names, one a line")
        try:
            from array_record.python import array_record_data_source
        except ImportError:
            raise ConfigError(f"{spec}: {_MISSING}") from None
        try:
            # Opens its files when read, in each process for itself.
            self._data: Any = array_record_data_source.ArrayRecordDataSource([str(path) for path in self._paths])
            length = len(self._data)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{spec}: no whole ArrayRecord files ({str(error).splitlines()[0]})") from None
        self._rows = np.arange(length)
        if share:
            mask = heldout_mask(np.zeros(length, int), [b"%d" % row for row in range(length)])
            self._rows = np.flatnonzero(mask == (split == "heldout"))
        super().__init__(spec, view, length=len(self._rows), labels=None, class_names=names)

    def _name(self, image: int) -> str:
        return f"record {self._rows[image]}"

    def _record(self, image: int) -> tuple[bytes, int]:
        try:
            record: bytes = self._data[int(self._rows[image])]
        except (RuntimeError, IndexError) as error:
            raise DecodeError(f"unreadable record: {str(error).splitlines()[0]}") from None
        if len(record) < _LABEL_BYTES:
            raise DecodeError(f"a record of {len(record)} bytes, of which the label needs {_LABEL_BYTES}")
        return record[_LABEL_BYTES:], int.from_bytes(record[:_LABEL_BYTES], "little", signed=True)


def write_array_record(
    path: str | pathlib.Path, images: Iterable[tuple[bytes, int]], *, class_names: Sequence[str]
) -> int:
    """Writes (encoded image, label) pairs into one file, and classes.txt beside it. Returns: how many.

    Raises: ConfigError if a label has no class, a name is not one line, or array_record is not installed.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError:
        raise ConfigError(_MISSING) from None
    for name in class_names:
        require(name.strip() == name != "" and "\n" not in name, f"class name {name!r} is not one line of text")
    path, count = pathlib.Path(path), 0
    # One record a group: read one by one; and uncompressed: images are compressed already.
    writer: Any = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    with contextlib.closing(writer):
        for data, label in images:
            require(0 <= label < len(class_names), f"label {label} of image {count} has no class name")
            writer.write(label.to_bytes(_LABEL_BYTES, "little", signed=True) + data)
            count += 1
    (path.parent / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    return count
