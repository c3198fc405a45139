"""Read .npz files from strangers, and write them as a stream.

Nothing in a file is executed and no size in it is believed: an array is read only if its header agrees with its size on
disk and with the shape that the caller expects. Written files are byte for byte what `np.savez` makes.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from rar_jax.errors import ReferenceFileError

IMAGES = "arr_0"  # ADM's name
_MAX_RATIO = 1100  # deflate compresses at most 1032 times
_MAX_ITEM = 1 << 18  # bytes of one number or string


class Member(NamedTuple):
    """An array in a file; `stream` is at the first byte of its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    stream: IO[bytes]  # raises BadZipFile with the last byte if the checksum differs


@contextlib.contextmanager
def open_npz(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """Open a .npz file; whatever fails in reading it becomes a ReferenceFileError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ReferenceFileError:
        raise
    except FileNotFoundError as error:
        raise ReferenceFileError(f"{path}: there is no such file, look for a mistyped path") from error
    except Exception as error:  # a damaged file may make zipfile, zlib and NumPy's parser of headers raise anything
        raise ReferenceFileError(f"{path} cannot be read as .npz ({error}): get it again from its source") from error


def list_arrays(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the arrays."""
    return [name.removesuffix(".npy") for name in archive.namelist()]


@contextlib.contextmanager
def open_array(archive: zipfile.ZipFile, key: str) -> Iterator[Member]:
    """Open an array after a check of its header. Raises: ReferenceFileError."""
    path, where = archive.filename or "", f"{archive.filename}, key '{key}'"
    if f"{key}.npy" not in archive.NameToInfo:
        raise ReferenceFileError(f"{path} lacks '{key}': it holds {', '.join(list_arrays(archive)) or 'nothing'}")
    info = archive.getinfo(f"{key}.npy")
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _MAX_RATIO}.get(info.compress_type, 0)
    if info.file_size > ratio * info.compress_size or info.compress_size > os.path.getsize(path):
        raise ReferenceFileError(f"{where} claims a size or a compression that NumPy does not write: do not trust it")
    with archive.open(info) as stream:
        if (version := np.lib.format.read_magic(stream)) != (1, 0):
            raise ReferenceFileError(f"{where} is in version {version} of NumPy's format, expected (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise ReferenceFileError(f"{where} holds pickled objects, which can run code: write plain numbers instead")
        expected = stream.tell() + math.prod(shape) * dtype.itemsize
        if expected != info.file_size or dtype.itemsize > _MAX_ITEM:
            raise ReferenceFileError(f"{where} has {info.file_size} bytes, but {dtype} {shape} takes {expected}")
        yield Member(shape, dtype, fortran_order, stream)


def read_array(archive: zipfile.ZipFile, key: str, *, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Read an array of this shape and kind of dtype ("f" or "U")."""
    with open_array(archive, key) as member:
        if member.shape != shape or member.dtype.kind != kind:
            raise ReferenceFileError(
                f"{archive.filename}, key '{key}' is {member.dtype} {member.shape}, expected kind '{kind}' {shape}: "
                "it is of another network. Make a reference with rar-jax evaluate --make-reference"
            )
        values = np.frombuffer(member.stream.read(math.prod(shape) * member.dtype.itemsize), member.dtype)
        return values.reshape(shape, order="F" if member.fortran_order else "C")


def write_npz(
    path: pathlib.Path,
    arrays: Mapping[str, npt.ArrayLike],
    images: tuple[tuple[int, ...], Iterable[np.ndarray]] | None = None,
) -> None:
    """Write arrays and, as `arr_0`, uint8 images, given by shape and batches.

    The file has its name only once it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for key, values in arrays.items():
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, np.asarray(values), allow_pickle=False)
                if images is not None:
                    with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as stream:
                        _write_images(stream, *images)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_images(stream: IO[bytes], shape: tuple[int, ...], batches: Iterable[np.ndarray]) -> None:
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    written = 0
    for batch in batches:
        if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
            raise ValueError(f"images are {batch.dtype} {batch.shape}, expected uint8 (b, *{shape[1:]})")
        stream.write(np.ascontiguousarray(batch).data)
        written += len(batch)
    if written != shape[0]:
        raise ValueError(f"{written} images were written, {shape[0]} were announced")
