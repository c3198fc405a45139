"""Arrays in and out of .npz files that strangers made: nothing in a file is executed, and no number in it is believed.

`np.load` is not used: it trusts the header, so that a file of a few kilobytes can ask for all memory. Here every array
is read because the caller names its dtype and shape, and only as many bytes as these have; images come in batches.
Refused are pickled objects, members whose declared sizes do not fit, compression other than deflate, and encryption.
Written files are what `np.savez` makes, streamed: plain NumPy and ADM's evaluator.py read them.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from rar_jax.errors import ReferenceFileError

# Deflate cannot shrink more than 1032 times.
_MOST_COMPRESSION = 1100
_MOST_MEMBERS = 64
# Version 1.0 of the format: a header of at most 64 KB. Later ones, which NumPy writes only for giant structured dtypes,
# may ask for 4 GB of it.
_VERSION = (1, 0)


class Member(NamedTuple):
    """An array inside a file, its bytes not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    stream: IO[bytes]  # stands at the first byte of the values; `read_exactly` reads it

    def read_exactly(self, count: int) -> bytes:
        """The next `count` bytes. Raises: EOFError if there are fewer, BadZipFile if they are the last and the checksum differs."""
        data = self.stream.read(count)
        if len(data) != count:
            raise EOFError(f"{count - len(data)} bytes are missing")
        return data


class Npz:
    """An open .npz file: `with open_npz(path) as npz`. Raises ReferenceFileError for all that is wrong with it."""

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        infos = archive.infolist()
        if len(infos) > _MOST_MEMBERS:
            raise ReferenceFileError(f"{path} holds {len(infos)} members: this is no file of statistics or images")
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) != len(infos):
            raise ReferenceFileError(f"{path} holds two members of one name: write it anew")

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._infos)

    @contextlib.contextmanager
    def member(self, key: str) -> Iterator[Member]:
        """Opens an array after its header was checked: sizes that fit one another, and no objects."""
        if key not in self._infos:
            raise ReferenceFileError(f"{self.path} lacks '{key}': it holds {', '.join(self.keys) or 'nothing'}")
        info = self._infos[key]
        where = f"{self.path}, key '{key}'"
        if info.flag_bits & 1:
            raise ReferenceFileError(f"{where} is encrypted: write the file anew with np.savez")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ReferenceFileError(f"{where} is compressed in a way that NumPy does not write: use np.savez")
        most = (
            info.compress_size if info.compress_type == zipfile.ZIP_STORED else _MOST_COMPRESSION * info.compress_size
        )
        if info.file_size > most or info.compress_size > self.path.stat().st_size:
            raise ReferenceFileError(
                f"{where} claims {info.file_size} bytes out of {info.compress_size}: more than its compression, or "
                "the file, can hold. The file is damaged or hostile: get it again from its source"
            )
        with _one_error(where), self._archive.open(info) as stream:
            shape, fortran_order, dtype = _header(where, stream)
            if dtype.hasobject:
                raise ReferenceFileError(
                    f"{where} holds pickled objects, which can run code when they are read: refused. Write plain "
                    "numbers with np.savez"
                )
            expected = stream.tell() + math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or expected != info.file_size:
                raise ReferenceFileError(
                    f"{where} is {info.file_size} bytes long, but {dtype} {shape} takes {expected}: the file is "
                    "damaged or hostile, get it again from its source"
                )
            yield Member(shape, dtype, fortran_order, stream)

    def array(self, key: str, *, shape: tuple[int, ...]) -> np.ndarray:
        """A whole array of finite float32 or float64 numbers, given as float64 in C order. Nothing is read if the shape differs."""
        where = f"{self.path}, key '{key}'"
        with self.member(key) as member:
            if member.shape != shape:
                raise ReferenceFileError(
                    f"{where} has shape {member.shape}, expected {shape}: these are the statistics of another network. Give ADM's file, or make one: rar-jax evaluate --make-reference"
                )
            if member.dtype.kind != "f" or member.dtype.itemsize not in (4, 8):
                raise ReferenceFileError(f"{where} is {member.dtype}, expected float32 or float64")
            data = member.read_exactly(math.prod(shape) * member.dtype.itemsize)
            order = "F" if member.fortran_order else "C"
            values = np.frombuffer(data, member.dtype).reshape(shape, order=order).astype(np.float64, order="C")
        if not np.isfinite(values).all():
            raise ReferenceFileError(
                f"{where} holds {np.sum(~np.isfinite(values))} numbers that are not finite: make the file again"
            )
        return values

    def text(self, key: str, *, most: int = 65_536) -> str:
        """A string, stored as np.array("...") of no dimension, of at most `most` characters."""
        where = f"{self.path}, key '{key}'"
        with self.member(key) as member:
            if member.shape != () or member.dtype.kind != "U" or member.dtype.itemsize > 4 * most:
                raise ReferenceFileError(f"{where} is {member.dtype} {member.shape}, expected one string")
            data = member.read_exactly(member.dtype.itemsize)
            return str(np.frombuffer(data, member.dtype)[0])


@contextlib.contextmanager
def open_npz(path: pathlib.Path) -> Iterator[Npz]:
    """Opens a .npz file for reading. Raises: ReferenceFileError if there is none, or it is no whole zip file."""
    with contextlib.ExitStack() as stack:
        with _one_error(str(path)):
            archive = stack.enter_context(zipfile.ZipFile(path))
        yield Npz(path, archive)


@contextlib.contextmanager
def _one_error(where: str) -> Iterator[None]:
    """Turns what a damaged zip file makes zipfile, zlib and NumPy raise into one error that says where."""
    try:
        yield
    except ReferenceFileError:
        raise
    except FileNotFoundError as error:
        raise ReferenceFileError(f"{where}: there is no such file, look for a mistyped path") from error
    except zipfile.BadZipFile as error:
        raise ReferenceFileError(
            f"{where} is no whole npz file ({error}): if it was downloaded, compare its size and get it again"
        ) from error
    except (OSError, EOFError, ValueError, ArithmeticError, NotImplementedError, RuntimeError, zipfile.error) as error:
        raise ReferenceFileError(f"{where} cannot be read ({error}): get the file again from its source") from error
    except Exception as error:
        # zlib.error and struct.error derive from Exception itself.
        if type(error).__module__ not in ("zlib", "struct"):
            raise
        raise ReferenceFileError(f"{where} is damaged ({error}): get the file again from its source") from error


def _header(where: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version != _VERSION:
        raise ReferenceFileError(f"{where} is in version {version} of NumPy's format, expected {_VERSION}")
    try:
        return np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # a hostile header is Python text: what it makes the parser raise is anyone's guess
        raise ReferenceFileError(f"{where} has a header that cannot be read ({error}): get the file again") from error


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def new_npz(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """An archive that gets its name when the block ends well; after an error no file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                yield archive
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_member(archive: zipfile.ZipFile, key: str, *, shape: tuple[int, ...], dtype: Any) -> Iterator[IO[bytes]]:
    """A stream for the values, in C order, of an array whose header is written first."""
    # A fixed date, so that the same numbers give the same bytes and the same sha256.
    info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    with archive.open(info, "w", force_zip64=True) as stream:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream


def put(archive: zipfile.ZipFile, key: str, values: np.ndarray) -> None:
    """Writes a whole array."""
    values = np.ascontiguousarray(values).reshape(values.shape)  # ascontiguousarray makes () into (1,)
    with new_member(archive, key, shape=values.shape, dtype=values.dtype) as stream:
        stream.write(values.data if values.ndim else values.tobytes())
