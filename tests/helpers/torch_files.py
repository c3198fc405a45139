"""PyTorch's file formats written by hand, since torch is not installed."""

import math
import pickle
import struct
import zipfile

from rar_jax.weights.torch_file import open_tensors


class Global:
    """Pickles as the global "module name", which need not exist here."""

    def __init__(self, module, name):
        self.reference = f"c{module}\n{name}\n".encode()


class Call:
    """Pickles as function(*arguments)."""

    def __init__(self, module, name, *arguments):
        self.function, self.arguments = Global(module, name), arguments


class Storage:
    def __init__(self, kind, key, count, *view, module="torch"):
        self.pid = ("storage", Global(module, kind), key, "cpu", count, *view)


def dumps(value):
    """A small pickle writer (protocol 2) that can write names this machine does not have."""

    def write(value):
        match value:
            case Global():
                return value.reference
            case Call():
                return write(value.function) + write(value.arguments) + b"R"
            case Storage():
                return write(value.pid) + b"Q"
            case tuple():
                return b"(" + b"".join(map(write, value)) + b"t"
            case list():
                return b"](" + b"".join(map(write, value)) + b"e"
            case dict():
                return b"}(" + b"".join(write(k) + write(v) for k, v in value.items()) + b"u"
            case _:
                return pickle.dumps(value, 2)[2:-1]

    return b"\x80\x02" + write(value) + b"."


def tensor(storage, shape, strides, offset=0):
    empty = Call("collections", "OrderedDict")
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, empty)


def write_zip(path, content, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content if isinstance(content, bytes) else dumps(content))
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_stream(path, content, storages, extra=()):
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [dumps(x) for x in (0x1950A86A20F9469CFC6C, 1001, machine, content, list(storages))]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    path.write_bytes(b"".join([*parts, *extra]))
    return path


def write_state_dict(path, state, ema=None):
    """Write arrays by name as `torch.save` writes a state dict: float32, float16, bfloat16 or int64.

    ema: arrays of the same names; then the file is {"model": state, "ema": ema}.
    """
    if ema is not None:
        state = {("model", name): x for name, x in state.items()} | {("ema", name): x for name, x in ema.items()}
    kinds = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage", "V2": "BFloat16Storage"}
    content = {}
    for key, (name, x) in enumerate(state.items()):
        strides = tuple(math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))
        content[name] = tensor(Storage(kinds[x.dtype.str[1:]], str(key), x.size), x.shape, strides)
    if ema is not None:
        content = {key: {name: x for (part, name), x in content.items() if part == key} for key in ("model", "ema")}
    return write_zip(path, content, {str(key): x for key, x in enumerate(state.values())})


def read_tensors(path, **options):
    """All tensors of a file by name."""
    return {name: tensor.read() for name, tensor in open_tensors(path, **options).items()}
