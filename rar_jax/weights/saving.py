"""Writes weights: safetensors, or the zip that `torch.save` makes, without torch.

The torch file is a zip of stored (not compressed) members, `<name>/data.pkl` and one `<name>/data/<key>` a tensor. The
pickle is a dict of calls `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`; since
Python's own pickler would have to import torch to write that name, its few opcodes are written here by hand
(pickletools documents them).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from rar_jax.errors import WeightsError

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
}
_SAFETENSORS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64"}


def write(path: str | pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name; the suffix says how: .safetensors, or .bin / .pth / .pt for torch.

    The file is whole or not there. Tensors are made contiguous one at a time, so that views cost no second copy.
    Raises: WeightsError for another suffix or dtype.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".safetensors", ".bin", ".pth", ".pt"):
        raise WeightsError(f"{path}: weights are written as .safetensors, .bin or .pth; choose one of these suffixes")
    for key, value in state.items():
        if value.dtype not in _STORAGES:
            raise WeightsError(f"'{key}' is {value.dtype}: weights are written as float32, float16 or int64")
    partial = path.with_name(f".{path.name}.rar_jax_partial")
    try:
        if path.suffix == ".safetensors":
            _write_safetensors(partial, state)
        else:
            _write_torch(partial, state, path.stem)
        os.replace(partial, path)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise WeightsError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error


def _bytes(value: np.ndarray) -> memoryview:
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _write_safetensors(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """The format (8 bytes of length, a JSON header, the tensors) by hand: the library takes all tensors at once."""
    header, end = {}, 0
    for key, value in state.items():
        start, end = end, end + value.nbytes
        header[key] = {
            "dtype": _SAFETENSORS[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in state.values():
            file.write(_bytes(value))


def _write_torch(path: pathlib.Path, state: Mapping[str, np.ndarray], name: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{name}/data.pkl", _pickle(state))
        archive.writestr(f"{name}/byteorder", "little")
        for number, value in enumerate(state.values()):
            with archive.open(f"{name}/data/{number}", "w", force_zip64=True) as member:
                member.write(_bytes(value))
        archive.writestr(f"{name}/version", "3\n")


def _pickle(state: Mapping[str, np.ndarray]) -> bytes:
    out = [pickle.PROTO, b"\x02", _name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.MARK]
    for number, (key, value) in enumerate(state.items()):
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim)]
        storage = [_text("storage"), _name("torch", _STORAGES[value.dtype]), _text(str(number)), _text("cpu")]
        out += [_text(key), _name("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        out += [pickle.MARK, *storage, _int(value.size), pickle.TUPLE, pickle.BINPERSID]
        out += [_int(0), _ints(value.shape), _ints(strides), pickle.NEWFALSE]
        out += [_name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.TUPLE, pickle.REDUCE]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if number < 2**31:
        return pickle.BININT + struct.pack("<i", number)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", number)


def _ints(numbers: list[int] | tuple[int, ...]) -> bytes:
    return b"".join([pickle.MARK, *map(_int, numbers), pickle.TUPLE])
