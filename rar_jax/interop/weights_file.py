"""Writes weights: safetensors, or the zip that `torch.save` makes, without torch.

The torch file is a zip of stored (not compressed) members, `<name>/data.pkl` and one `<name>/data/<key>` a tensor. The
pickle is a dict of calls `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`; since
Python's own pickler would have to import torch to write that name, its few opcodes are written here by hand
(pickletools documents them).
"""

from __future__ import annotations

import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import safetensors.numpy

from rar_jax.interop.torch_zip import WeightsError

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
}


def write(path: str | pathlib.Path, state: dict[str, np.ndarray]) -> None:
    """Writes tensors by name; the suffix says how: .safetensors, or .bin / .pth / .pt for torch.

    The file is whole or not there. Raises: WeightsError for another suffix or a dtype that torch's file has no name for.
    """
    path = pathlib.Path(path)
    state = {name: np.ascontiguousarray(value) for name, value in state.items()}
    partial = path.with_name(f"{path.name}.partial")
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(state, partial)
    elif path.suffix in (".bin", ".pth", ".pt"):
        _write_torch(partial, state, path.stem)
    else:
        raise WeightsError(f"{path}: weights are written as .safetensors, .bin or .pth; choose one of these suffixes")
    os.replace(partial, path)


def _write_torch(path: pathlib.Path, state: dict[str, np.ndarray], name: str) -> None:
    for key, value in state.items():
        if value.dtype not in _STORAGES:
            raise WeightsError(f"'{key}' is {value.dtype}: a torch file holds float32, float16 or int64")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{name}/data.pkl", _pickle(state))
        archive.writestr(f"{name}/byteorder", "little")
        for number, value in enumerate(state.values()):
            little = value.astype(value.dtype.newbyteorder("<"), copy=False)
            with archive.open(f"{name}/data/{number}", "w", force_zip64=True) as member:
                member.write(little.reshape(-1).view(np.uint8).data)
        archive.writestr(f"{name}/version", "3\n")


def _pickle(state: dict[str, np.ndarray]) -> bytes:
    out = [pickle.PROTO, b"\x02", _name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE, pickle.MARK]
    for number, (key, value) in enumerate(state.items()):
        strides = [stride // value.itemsize for stride in value.strides]
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
