"""The one reader of PyTorch weight files: no torch, and nothing in a file is ever executed.

Two formats of `torch.save`, told apart by their first bytes:
  zip (PyTorch >= 1.6)   <name>/data.pkl is a pickle of the dict whose tensors point into members <name>/data/<key>
  stream (before)        pickles one after another (magic, version, machine, dict, list of keys), then each storage's
                         number of elements (int64) and bytes, in the order of the list
The Unpickler knows a few names and refuses all others. It only records where each tensor is stored. Each tensor is read
when it is needed, so that a model is never in memory twice.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import json
import math
import mmap
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
import safetensors

from rar_jax.errors import WeightsError

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
INDEX_SUFFIX = ".safetensors.index.json"
_STREAM_HEADER = (0x1950A86A20F9469CFC6C, 1001)
# Keys under which training scripts put a state dict, and what their wrappers put before its names.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_EMA_WRAPPERS = ("model_ema", "ema", "ema_state_dict", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
# What checkpoints hold beside tensors, such as the arguments of the script: read as nothing.
_HARMLESS = (
    "argparse.Namespace", "types.SimpleNamespace", "torch.Size", "torch.device", "numpy.dtype", "_codecs.encode",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
)  # fmt: skip
# The largest RAR has a pickle of 0.1 MB with 3000 tuples.
_PICKLE_LIMIT, _TUPLE_LIMIT = 1 << 28, 20_000  # bytes; tuples

# Finds a storage by its key: number of bytes, and a function that reads them.
Locate = Callable[[str], tuple[int, Callable[[], bytes]]]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weights file. `read` may return a read-only array, and raises WeightsError for damaged bytes."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_tensors(path: str | pathlib.Path, *, ema: bool = True) -> dict[str, StoredTensor]:
    """Open a .safetensors, torch zip or torch stream file; the content decides, then the suffix.

    A .safetensors.index.json opens the shards beside it.

    A torch file's dict inside a key such as "state_dict" or "model", or alone under any key, is unwrapped. Prefixes of
    wrappers, such as "module.", are taken off the names.

    Args:
      ema: where a torch file has raw weights and their moving average, open the average.

    Returns: tensors by name, of the stored shapes and dtypes (bfloat16 by ml_dtypes). Their values are not read yet.
    Raises: WeightsError for anything wrong with the file; nothing in the file is executed.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise WeightsError(f"cannot read {path} ({error.strerror}): give the path of a file of weights") from error
    if not head:
        raise WeightsError(f"{path} is empty: download it again")
    if head.startswith(b"version https:"):
        raise WeightsError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`")
    is_index = path.name.endswith(INDEX_SUFFIX)
    if head.lstrip()[:1] in (b"<", b"{") and not is_index:
        raise WeightsError(f"{path} is a web page or an error message ({head[:12]!r}...): download the file itself")
    formats = {b"PK": _open_zip, b"\x80\x02": _open_stream}
    # The length of a safetensors header may begin with the same two bytes.
    open_file = _open_safetensors if head[8:9] == b"{" else formats.get(head[:2])
    if open_file is None and path.suffix == ".safetensors":
        open_file = _open_safetensors
    open_file = _open_index if is_index else open_file
    if open_file is None:
        raise WeightsError(f"{path} is no weights file (safetensors, or torch's zip or pickle): it starts {head[:8]!r}")
    wrappers = (*_EMA_WRAPPERS, *_WRAPPERS) if ema else _WRAPPERS
    tensors = _name_errors(path, lambda: _strip_prefixes(open_file(path, wrappers)))
    read = functools.partial(functools.partial, _name_errors, path)
    return {name: StoredTensor(tensor.shape, read(tensor.read)) for name, tensor in tensors.items()}


def find_shards(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that hold the tensors: the shards of a .safetensors.index.json, or the path itself.

    Raises: WeightsError if a shard is missing or not beside its index.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    names = _name_errors(path, lambda: sorted(set(json.loads(path.read_text())["weight_map"].values())))
    for name in names:
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{path}: shard '{name}' is not a .safetensors file beside its index")
        if not path.with_name(name).is_file():
            raise WeightsError(f"{path}: shard {name} is missing: download it into {path.parent}")
    return [path.with_name(name) for name in names]


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """Return the texts in the header of a .safetensors file; other files have none."""
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}


def _strip_prefixes(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    tensors = {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in tensors.items()}
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


T = TypeVar("T")


def _name_errors(path: pathlib.Path, action: Callable[[], T]) -> T:
    """Call the action. Whatever goes wrong in it becomes a WeightsError that names the file."""
    try:
        return action()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    # A hostile file can raise nearly anything in pickle, zipfile and zlib; all of it means the same.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise WeightsError(f"{path} is truncated or damaged ({reason}): download it again") from error


# ---------------------------------------------------------------- the containers


def _open_safetensors(path: pathlib.Path, _: Sequence[str]) -> dict[str, StoredTensor]:
    def read(name: str) -> np.ndarray:
        # Opened for each tensor: an open map would keep all that was read in memory.
        with safetensors.safe_open(path, "np") as file:
            return file.get_tensor(name)

    with safetensors.safe_open(path, "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    return {name: StoredTensor(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def _open_index(path: pathlib.Path, _: Sequence[str]) -> dict[str, StoredTensor]:
    shards = {file.name: functools.partial(_open_safetensors, file, ()) for file in find_shards(path)}
    files = {name: _name_errors(path.with_name(name), open_shard) for name, open_shard in shards.items()}
    weight_map = json.loads(path.read_text())["weight_map"]
    if absent := next((name for name, file in weight_map.items() if name not in files[file]), None):
        raise WeightsError(f"'{absent}' is not in its shard {weight_map[absent]}: download both again")
    return {name: files[file][name] for name, file in weight_map.items()}


def _open_zip(path: pathlib.Path, wrappers: Sequence[str]) -> dict[str, StoredTensor]:
    archive = zipfile.ZipFile(path)  # open as long as its tensors are: each read checks the member's CRC
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError("a zip file, but not one of torch: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and (order.file_size != len(b"little") or archive.read(order) != b"little"):
        raise WeightsError("written on a big-endian machine, which is not supported")
    if members[pickles[0]].file_size > _PICKLE_LIMIT:
        raise WeightsError("its data.pkl is too large for a state dict")

    def locate(key: str) -> tuple[int, Callable[[], bytes]]:
        info = members.get(f"{root}data/{key}")
        if info is None:
            raise WeightsError(f"storage {key} is missing: download it again")
        if info.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"refused: storage {key} is compressed, which torch.save does not do")
        return info.file_size, functools.partial(archive.read, info)

    content = _next_pickle(io.BytesIO(archive.read(pickles[0])), {})
    return _locate_tensors(_find_state_dict(content, wrappers), locate)


def _open_stream(path: pathlib.Path, wrappers: Sequence[str]) -> dict[str, StoredTensor]:
    def read(start: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        dtypes: dict[str, np.dtype] = {}
        magic, version, machine, content, keys = (_next_pickle(stream, dtypes) for _ in range(5))
        if (magic, version) != _STREAM_HEADER or not isinstance(machine, dict) or not isinstance(keys, list):
            raise WeightsError("a pickle, but not a torch file")
        if machine.get("little_endian") is not True:
            raise WeightsError("written on a big-endian machine, which is not supported")
        start = stream.tell()
        storages: dict[str, tuple[int, Callable[[], bytes]]] = {}
        for key in keys:
            if key not in dtypes:
                raise WeightsError(f"storage {key} belongs to no tensor, so that its size is unknown")
            size = int.from_bytes(stream[start : start + 8], "little") * dtypes[key].itemsize
            if start + 8 + size > len(stream):
                raise WeightsError(f"truncated within storage {key}: download it again")
            storages[key] = size, functools.partial(read, start + 8, size)
            start += 8 + size
    return _locate_tensors(_find_state_dict(content, wrappers), storages.__getitem__)


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
    """Stands for torch's `_rebuild_tensor_v2` and `_rebuild_parameter`: a parameter is its tensor.

    Without attributes, so that a pickle's BUILD finds nothing to set.
    """

    __slots__ = ()

    def __call__(self, stored: Any, offset: Any, shape: Any = (), strides: Any = (), *_: Any) -> _Tensor:
        if isinstance(stored, _Tensor):
            return stored
        numbers = (offset, *shape, *strides)
        if not isinstance(stored, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise WeightsError("a tensor is not described by a storage and numbers")
        if len(shape) != len(strides):
            raise WeightsError(f"a tensor has shape {shape} and strides {strides}")
        return _Tensor(stored, offset, tuple(shape), tuple(strides))


class _Nothing:
    """Stands for a harmless object that is no tensor: takes any arguments and keeps none."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Discard what a pickle would set."""
        del state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, dtypes: dict[str, np.dtype]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._dtypes = dtypes

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return collections.OrderedDict
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"):
            return _Rebuild()
        if full in _DTYPES:
            return full  # its name is enough, and text cannot be called
        if full in _HARMLESS:
            return _Nothing
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
    """Read one pickle of a stream; adds the dtypes of the storages it names, by key, to `dtypes`."""
    start, tuples = stream.tell(), 0
    # The C unpickler trusts numbers and nesting with its memory and its stack, so check them first.
    for opcode, argument, _ in pickletools.genops(stream):  # pyright: ignore[reportArgumentType]
        tuples += opcode.name.startswith("TUPLE")
        memo_too_far = "PUT" in opcode.name and argument is not None and argument > stream.tell()
        if memo_too_far or tuples > _TUPLE_LIMIT or stream.tell() - start > _PICKLE_LIMIT:
            raise WeightsError("refused: its pickle is larger or more nested than that of a state dict")
    end = stream.tell()
    stream.seek(start)
    return _Unpickler(stream.read(end - start), dtypes).load()


# ---------------------------------------------------------------- tensors


def _find_state_dict(content: Any, wrappers: Sequence[str]) -> dict[str, _Tensor]:
    """Return the state dict of a pickle's content, unwrapped from other dicts by these keys: the first one wins."""
    for _ in range(4):
        if not isinstance(content, dict) or any(isinstance(v, _Tensor) for v in content.values()):
            break
        wrapper = next((k for k in wrappers if isinstance(content.get(k), dict)), None)
        if wrapper is None and len(content) != 1:
            break
        content = content[wrapper] if wrapper else next(iter(content.values()))
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"holds no state dict of tensors but {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise WeightsError(f"'{key}' is no tensor but {type(value).__name__}: not a state dict")
    return dict(content)


def _locate_tensors(tensors: dict[str, _Tensor], locate: Locate) -> dict[str, StoredTensor]:
    located: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        key, dtype, start, count = tensor.storage
        size, read = locate(key)
        if (start + count) * dtype.itemsize > size:
            raise WeightsError(f"'{name}': storage {key} is shorter than it should be: download it again")
        elements = math.prod(tensor.shape)
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((extent - 1) * stride for extent, stride in steps)
        # More elements than the storage has is a file that unpacks to any size.
        if elements > 0 and (last >= count or elements > count):
            raise WeightsError(f"'{name}' of shape {tensor.shape} is outside its storage of {count} elements")
        located[name] = StoredTensor(tensor.shape, functools.partial(_read_tensor, tensor, read))
    return located


def _read_tensor(tensor: _Tensor, read: Callable[[], bytes]) -> np.ndarray:
    _, dtype, start, count = tensor.storage
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, dtype)
    # frombuffer raises if the file became shorter.
    flat = np.frombuffer(read(), dtype, count, start * dtype.itemsize)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
