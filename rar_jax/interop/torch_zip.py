"""The one reader of PyTorch weight files: no torch, and nothing in a file is ever executed.

Two formats of `torch.save`, told apart by their first bytes:
  zip (PyTorch >= 1.6)   <name>/data.pkl is a pickle of the dict whose tensors point into members <name>/data/<key>
  stream (before)        pickles one after another (magic, version, machine, dict, list of keys), then each storage's
                         number of elements (int64) and bytes, in the order of the list
The pickle is read by an Unpickler that knows a few names and refuses all others. It makes records of where each
tensor lies; the arrays are then views of the memory-mapped file, read when they are used.
"""

from __future__ import annotations

import collections
import io
import math
import mmap
import pathlib
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

_DTYPES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
_STREAM_MAGIC, _STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
# The largest RAR has a pickle of 0.1 MB with 3000 tuples.
_PICKLE_LIMIT, _TUPLE_LIMIT = 1 << 28, 20_000  # bytes; tuples

Reader = Callable[[str], np.ndarray]  # key of a storage -> its bytes, uint8


class WeightsError(ValueError):
    """A weight file is damaged, dangerous or not what it should be: the message says which and where."""


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors by name of a .safetensors, torch zip or torch stream file; the content decides, then the suffix.

    Raises: WeightsError, for anything wrong with the file.
    """
    head = _head(path)
    if head[8:9] == b"{" or (pathlib.Path(path).suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")):
        return load_safetensors(path)
    return load_state_dict(path)


def load_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors by name of a safetensors file. Raises: WeightsError, for anything wrong with the file."""
    _head(path)
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def load_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors by name of a file written by `torch.save`, zip or stream format.

    A dict inside one of the keys "state_dict", "model", "model_state_dict", "module", or alone under any key, is
    unwrapped.

    Returns: read-only arrays of the stored dtypes (bfloat16 by ml_dtypes), views of the mapped file where they can be.
    Raises: WeightsError, for anything wrong with the file; nothing in the file is executed.
    """
    head = _head(path)
    load = _load_zip if head[:2] == b"PK" else _load_stream if head[:2] == b"\x80\x02" else None
    if load is None:
        raise WeightsError(f"{path} is not a torch file (neither a zip nor a pickle): it begins with {head[:8]!r}")
    try:
        return load(pathlib.Path(path))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    # A hostile file can raise nearly anything in pickle, zipfile and zlib; all of it means the same.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise WeightsError(f"{path} is truncated or damaged ({reason}): download it again") from error


def _head(path: str | pathlib.Path) -> bytes:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise WeightsError(f"{path} is empty: download it again")
    return head


# ---------------------------------------------------------------- the two containers


def _load_zip(path: pathlib.Path) -> dict[str, np.ndarray]:
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError("a zip file, but not one of torch: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise WeightsError("written on a big-endian machine, which is not supported")
        if members[pickles[0]].file_size > _PICKLE_LIMIT:
            raise WeightsError("its data.pkl is too large for a state dict")

        def storage(key: str) -> np.ndarray:
            info = members.get(f"{root}data/{key}")
            if info is None:
                raise WeightsError(f"storage {key} is missing: download it again")
            if info.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(archive.read(info), np.uint8)
            # The local header repeats the name, and its extra field (torch pads there) has its own length.
            header = mapped[info.header_offset : info.header_offset + 30].tobytes()
            start = info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            data = mapped[start : start + info.file_size]
            if header[:4] != b"PK\x03\x04" or data.size != info.file_size or zlib.crc32(data.data) != info.CRC:
                raise WeightsError(f"storage {key} is damaged: download it again")
            return data

        content = _next_pickle(io.BytesIO(archive.read(pickles[0])), {})
        return _arrays(_tensors(content), storage)


def _load_stream(path: pathlib.Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        dtypes: dict[str, np.dtype] = {}
        magic, version, machine, content, keys = (_next_pickle(stream, dtypes) for _ in range(5))
        position = stream.tell()
    if magic != _STREAM_MAGIC or version != _STREAM_VERSION or not isinstance(keys, list):
        raise WeightsError("a pickle, but not a torch file")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise WeightsError("written on a big-endian machine, which is not supported")
    tensors = _tensors(content)
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
    storages: dict[str, np.ndarray] = {}
    for key in keys:
        if key not in dtypes:
            raise WeightsError(f"storage {key} belongs to no tensor, so that its size is unknown")
        end = position + 8 + int.from_bytes(mapped[position : position + 8].tobytes(), "little") * dtypes[key].itemsize
        if end > mapped.size:
            raise WeightsError(f"truncated within storage {key}: download it again")
        storages[key] = mapped[position + 8 : end]
        position = end
    return _arrays(tensors, storages.__getitem__)


# ---------------------------------------------------------------- the pickle


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    start: int  # of a view into another storage, in elements
    size: int  # in elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands for torch's function of the same task. No attributes: a pickle's BUILD finds nothing to set."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise WeightsError("a tensor is not described by a storage and numbers")
        if len(shape) != len(strides):
            raise WeightsError(f"a tensor has shape {shape} and strides {strides}")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Same:
    """Stands for `_rebuild_parameter`: a parameter is its tensor."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, dtypes: dict[str, np.dtype]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._dtypes = dtypes

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return collections.OrderedDict
        if full == "torch._utils._rebuild_tensor_v2":
            return _Rebuild()
        if full == "torch._utils._rebuild_parameter":
            return _Same()
        if full in _DTYPES:
            return full  # its name is enough, and text cannot be called
        raise WeightsError(f"refused: the file asks for {full}, which is no part of a state dict of tensors")

    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), _, int(count), *view) if kind in _DTYPES and count >= 0:
                self._dtypes[key] = _DTYPES[kind]
            case _:
                raise WeightsError("refused: a storage is described in an unknown way")
        match view:
            case [] | [None]:
                return _Storage(key, _DTYPES[kind], 0, count)
            case [(str(), int(start), int(size))] if start >= 0 and size >= 0 and start + size <= count:
                return _Storage(key, _DTYPES[kind], start, size)
        raise WeightsError(f"storage {key} is an unknown kind of view")


def _next_pickle(stream: io.BytesIO | mmap.mmap, dtypes: dict[str, np.dtype]) -> Any:
    """Reads one pickle and leaves the stream behind it; adds the dtypes of the storages it names, by key."""
    start, tuples = stream.tell(), 0
    # The C unpickler trusts numbers and nesting with its memory and its stack, so they are looked at first.
    for opcode, argument, _ in pickletools.genops(stream):  # pyright: ignore[reportArgumentType]
        tuples += opcode.name.startswith("TUPLE")
        memo_too_far = "PUT" in opcode.name and argument is not None and argument > stream.tell()
        if memo_too_far or tuples > _TUPLE_LIMIT or stream.tell() - start > _PICKLE_LIMIT:
            raise WeightsError("refused: its pickle is larger or more nested than that of a state dict")
    end = stream.tell()
    stream.seek(start)
    return _Unpickler(stream.read(end - start), dtypes).load()


# ---------------------------------------------------------------- tensors


def _tensors(content: Any) -> dict[str, _Tensor]:
    """The state dict of a pickle's content, unwrapped if it lies in another dict."""
    for _ in range(4):
        if not isinstance(content, dict) or any(isinstance(v, _Tensor) for v in content.values()):
            break
        wrapper = next((k for k in _WRAPPERS if isinstance(content.get(k), dict)), None)
        if wrapper is None and len(content) != 1:
            break
        content = content[wrapper] if wrapper else next(iter(content.values()))
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"holds no state dict of tensors but {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise WeightsError(f"'{key}' is no tensor but {type(value).__name__}: not a state dict")
    return dict(content)


def _arrays(tensors: dict[str, _Tensor], reader: Reader) -> dict[str, np.ndarray]:
    storages: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        key, dtype, start, count = tensor.storage
        if key not in storages:
            storages[key] = reader(key)
        if (start + count) * dtype.itemsize > storages[key].size:
            raise WeightsError(f"'{name}': storage {key} is shorter than it should be: download it again")
        elements = math.prod(tensor.shape)
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        # More elements than the storage has is a file that unpacks to any size.
        if elements > 0 and (last >= count or elements > count):
            raise WeightsError(f"'{name}' of shape {tensor.shape} lies outside of its storage of {count} elements")
        if elements == 0:
            arrays[name] = np.zeros(tensor.shape, dtype)
            continue
        flat = storages[key][start * dtype.itemsize : (start + count) * dtype.itemsize].view(dtype)[tensor.offset :]
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        arrays[name] = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    return arrays
