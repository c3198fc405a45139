"""The restricted reader of torch files."""

import collections
import io
import os
import pathlib
import pickle
import random
import re
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_files import Call, Storage, dumps, read_tensors, tensor, write_stream, write_zip

from rar_jax.errors import WeightsError
from rar_jax.weights.torch_file import open_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "maskgit_vq" / "maskgit_vq_tiny.bin"


WEIGHT = np.arange(12, dtype=np.float32)
COUNTS = np.arange(5, dtype=np.int64)


def example():
    """Two tensors in one storage, one of them transposed, a parameter, and one in another dtype."""
    shared = Storage("FloatStorage", "0", 12)
    return {
        "a": tensor(shared, (2, 3), (3, 1)),
        "b": tensor(shared, (2, 3), (1, 2), 6),
        "c": Call("torch._utils", "_rebuild_parameter", tensor(shared, (12,), (1,)), True, None),
        "d": tensor(Storage("LongStorage", "1", 5), (), (), 4),
    }


def check_example(state):
    np.testing.assert_array_equal(state["a"], WEIGHT[:6].reshape(2, 3))
    np.testing.assert_array_equal(state["b"], WEIGHT[6:].reshape(3, 2).T)
    np.testing.assert_array_equal(state["c"], WEIGHT)
    assert state["d"] == 4 and state["d"].dtype == np.int64 and state["d"].shape == ()


# ---------------------------------------------------------------- right files


def test_zip_respects_strides_offsets_and_dtypes(tmp_path):
    check_example(read_tensors(write_zip(tmp_path / "w.bin", example(), {"0": WEIGHT, "1": COUNTS})))


@pytest.mark.parametrize("member", ["byteorder", "data/0"])
def test_a_bomb_is_not_unpacked(tmp_path, member):
    path = write_zip(tmp_path / "w.bin", example(), {"1": COUNTS} if member == "data/0" else {"0": WEIGHT, "1": COUNTS})
    whole = zipfile.ZipFile(path)
    bomb = tmp_path / "bomb.bin"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            if name != f"archive/{member}":
                archive.writestr(name, whole.read(name))
        archive.writestr(f"archive/{member}", bytes(2**26))
    assert bomb.stat().st_size < 2**17
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=re.escape(str(bomb))):
            read_tensors(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_stream_format(tmp_path):
    check_example(read_tensors(write_stream(tmp_path / "w.pth", example(), {"1": COUNTS, "0": WEIGHT})))


def test_stream_format_with_a_view_of_a_storage(tmp_path):
    view = Storage("FloatStorage", "0", 12, ("v", 4, 6))
    state = read_tensors(write_stream(tmp_path / "w", {"a": tensor(view, (2, 2), (2, 1), 1)}, {"0": WEIGHT}))
    np.testing.assert_array_equal(state["a"], WEIGHT[5:9].reshape(2, 2))


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_unwraps_a_nested_state_dict(tmp_path, write):
    storages = {"0": WEIGHT, "1": COUNTS, "2": COUNTS}
    other = {"m": tensor(Storage("LongStorage", "2", 5), (5,), (1,))}
    check_example(read_tensors(write(tmp_path / "a", {"model": example(), "epoch": 3, "optimizer": other}, storages)))
    storages.pop("2")
    check_example(read_tensors(write(tmp_path / "b", {"anything": {"state_dict": example()}}, storages)))


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_the_average_is_read_before_the_raw_weights(tmp_path, write):
    """Beside arguments of the script and numbers, which are no tensors."""
    storages = {"0": np.array([1.0], np.float32), "1": np.array([2.0], np.float32)}
    raw, average = ({"module._orig_mod.w": tensor(Storage("FloatStorage", key, 1), (1,), (1,))} for key in storages)
    content = {"model": raw, "ema": {"state_dict": average}, "epoch": 3, "args": Call("argparse", "Namespace")}
    path = write(tmp_path / "w", content, storages)
    assert {name: x.tolist() for name, x in read_tensors(path).items()} == {"w": [2.0]}
    assert {name: x.tolist() for name, x in read_tensors(path, ema=False).items()} == {"w": [1.0]}


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    names = ("module.a._fsdp_wrapped_module.w", "module._fsdp_wrapped_module.b")
    safetensors.numpy.save_file({name: COUNTS for name in names}, tmp_path / "w.safetensors")
    assert sorted(read_tensors(tmp_path / "w.safetensors")) == ["a.w", "b"]
    safetensors.numpy.save_file({"module.a": COUNTS, "b": COUNTS}, tmp_path / "v.safetensors")  # no wrapper's
    assert sorted(read_tensors(tmp_path / "v.safetensors")) == ["b", "module.a"]


@pytest.mark.parametrize(
    "kind", ["Half", "BFloat16", "Double", "Float", "Long", "Int", "Short", "Char", "Byte", "Bool"]
)
def test_every_storage(tmp_path, kind):
    dtype = {"Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Double": "f8", "Float": "f4", "Long": "i8", "Int": "i4"}
    dtype |= {"Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
    values = np.array([0, 1, 1, 0]).astype(dtype[kind])
    path = write_zip(tmp_path / "w", {"a": tensor(Storage(f"{kind}Storage", "0", 4), (4,), (1,))}, {"0": values})
    state = read_tensors(path)
    assert state["a"].dtype == values.dtype
    np.testing.assert_array_equal(state["a"], values)


def test_untyped_storage_and_empty_tensor(tmp_path):
    untyped = Storage("UntypedStorage", "0", 3, module="torch.storage")
    content = {"a": tensor(untyped, (3,), (1,)), "b": tensor(untyped, (0, 7), (7, 1))}
    state = read_tensors(write_zip(tmp_path / "w", content, {"0": np.array([1, 2, 255], np.uint8)}))
    assert state["a"].tolist() == [1, 2, 255] and state["b"].shape == (0, 7)


def test_arrays_are_read_only(tmp_path):
    for write in (write_zip, write_stream):
        state = read_tensors(write(tmp_path / "w", example(), {"0": WEIGHT, "1": COUNTS}))
        assert not state["a"].flags.writeable


def test_safetensors(tmp_path):
    tensors = {"a": WEIGHT.reshape(3, 4), "h": WEIGHT.astype(np.float16), "b": WEIGHT.astype(ml_dtypes.bfloat16)}
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(tensors, path)
    for name, value in read_tensors(path).items():
        assert value.dtype == tensors[name].dtype
        np.testing.assert_array_equal(value, tensors[name])
    path.rename(tmp_path / "renamed.bin")
    np.testing.assert_array_equal(read_tensors(tmp_path / "renamed.bin")["a"], tensors["a"])
    for cut in (4, 40, 250):
        path.write_bytes((tmp_path / "renamed.bin").read_bytes()[:cut])
        with pytest.raises(WeightsError, match=r"w\.safetensors"):
            read_tensors(path)


def test_shards_are_read_by_their_index(tmp_path):
    index, shard = tmp_path / "w.safetensors.index.json", tmp_path / "w-1.safetensors"
    safetensors.numpy.save_file({"module.a": WEIGHT, "module.other": WEIGHT}, shard)
    index.write_text('{"metadata": {}, "weight_map": {"module.a": "w-1.safetensors", "module.b": "w-2.safetensors"}}')
    with pytest.raises(WeightsError, match=r"shard w-2\.safetensors is missing: download it into"):
        read_tensors(index)
    safetensors.numpy.save_file({"module.b": COUNTS}, tmp_path / "w-2.safetensors")
    tensors = open_tensors(index)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (12,), "b": (5,)}
    shard.unlink()  # nothing was read yet, and b is in the other shard
    np.testing.assert_array_equal(tensors["b"].read(), COUNTS)
    with pytest.raises(WeightsError, match=r"w-1\.safetensors"):
        tensors["a"].read()
    for text, message in (
        ('{"weight_map": {"a": "w-2.safetensors"}}', r"'a' is not in its shard w-2\.safetensors"),
        ('{"weight_map": {"a": "../w-2.safetensors"}}', "is not a .safetensors file beside its index"),
        ('{"weight_map": {"a": "w.safetensors.index.json"}}', "is not a .safetensors file beside its index"),
        ('{"weight_map": 3}', r"index\.json is truncated or damaged"),
        ('{"error": "not found"}', r"index\.json is truncated or damaged"),
        ('{"weight', r"index\.json is truncated or damaged"),
    ):
        index.write_text(text)
        with pytest.raises(WeightsError, match=message):
            read_tensors(index)


@pytest.mark.parametrize("length", [0x4B50, 0x0280])
def test_safetensors_whose_header_length_looks_like_another_format(tmp_path, length):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = tmp_path / "w.bin"
    path.write_bytes(length.to_bytes(8, "little") + header + np.float32(3).tobytes())
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02") and read_tensors(path)["a"] == 3


# ---------------------------------------------------------------- dangerous files


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, write, protocol):
    body = pickle.dumps({"a": Evil(tmp_path / "pwned")}, protocol)
    if write is write_zip:
        write_zip(tmp_path / "w", body, {})
    else:
        (tmp_path / "w").write_bytes(dumps(0x1950A86A20F9469CFC6C) + dumps(1001) + dumps({}) + body)
    with pytest.raises(WeightsError, match=r"posix\.mkdir" if write is write_zip or protocol == 2 else "posix|neither"):
        read_tensors(tmp_path / "w")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "Counter"),
        ("numpy", "load"),
        ("torch.jit", "ScriptModule"),
    ],
)
def test_every_other_name_is_refused_by_name(tmp_path, module, name):
    path = write_zip(tmp_path / "w", {"a": Call(module, name, "1")}, {})
    with pytest.raises(WeightsError, match=f"{module}.{name}"):
        read_tensors(path)


def test_a_pickle_cannot_change_the_reader(tmp_path):
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    body = b"\x80\x02" + function + b"N" + dumps({"__call__": 1, "__class__": 2})[2:-1] + b"\x86b."
    with pytest.raises(WeightsError):
        read_tensors(write_zip(tmp_path / "w", body, {}))
    check_example(read_tensors(write_zip(tmp_path / "good", example(), {"0": WEIGHT, "1": COUNTS})))


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2^31 slots
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x00s.",  # a key nested deeper than the stack can hash
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b".",  # bytes of 2^63
        b"\x80\x02Q.",
        b"\x80\x02}" + b"(" * 1000 + b".",
        b"\x80\x02K\x01Q.",
        b"garbage",
        b"",
    ],
)
def test_hostile_pickles_end_in_a_weights_error(tmp_path, body):
    with pytest.raises(WeightsError):
        read_tensors(write_zip(tmp_path / "w", body, {}))


# ---------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "count"),
    [
        ((13,), (1,), 0, 12),
        ((12,), (1,), 1, 12),
        ((2, 3), (6, 3), 1, 12),
        ((13,), (1,), 0, 13),  # the storage itself is too short
        ((1 << 60,), (0,), 0, 12),
        ((1 << 70,), (1 << 70,), 0, 12),
        ((3,), (-1,), 5, 12),
        ((3,), (1, 1), 0, 12),
        ((True,), (1,), 0, 12),
        (("3",), (1,), 0, 12),
        ((1,) * 70, (1,) * 70, 0, 12),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_tensors_outside_their_storage_are_refused(tmp_path, write, shape, strides, offset, count):
    content = {"a": tensor(Storage("FloatStorage", "0", count), shape, strides, offset)}
    with pytest.raises(WeightsError):
        read_tensors(write(tmp_path / "w", content, {"0": WEIGHT}))


@pytest.mark.parametrize("content", [{}, [], 3, {"a": 1}, {"a": WEIGHT.tolist()}, {3: tensor(None, (), ())}])
@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_content_that_is_no_state_dict_is_refused(tmp_path, write, content):
    with pytest.raises(WeightsError):
        read_tensors(write(tmp_path / "w", content, {}))


def test_a_mixed_state_dict_names_what_is_no_tensor(tmp_path):
    with pytest.raises(WeightsError, match="'steps' is no tensor but int"):
        read_tensors(write_zip(tmp_path / "w", {**example(), "steps": 3}, {"0": WEIGHT, "1": COUNTS}))


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "w.bin"
    with pytest.raises(WeightsError, match="cannot read"):
        read_tensors(path)
    with pytest.raises(WeightsError, match="cannot read"):
        read_tensors(tmp_path)
    for data, message in [
        (b"", "empty"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'{"error": "not found"}', "an error message"),
        (b"something else", "no weights file"),
        (b"version https://git-lfs", "git lfs pull"),
    ]:
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(WeightsError, match="not one of torch"):
        read_tensors(path)


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9, 0.999, 0.99999])
def test_a_truncated_zip_is_refused(tmp_path, share):
    data = GOLDEN.read_bytes()
    (tmp_path / "w.bin").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match="download it again"):
        read_tensors(tmp_path / "w.bin")


def test_a_truncated_stream_is_refused_at_every_byte(tmp_path):
    data = write_stream(tmp_path / "w", example(), {"0": WEIGHT, "1": COUNTS}).read_bytes()
    for cut in range(len(data)):
        (tmp_path / "w").write_bytes(data[:cut])
        in_last_storage = cut >= len(data) - COUNTS.nbytes
        with pytest.raises(WeightsError, match="truncated within storage 1" if in_last_storage else None):
            read_tensors(tmp_path / "w")


def test_a_flipped_bit_in_a_storage_is_seen(tmp_path):
    path = write_zip(tmp_path / "w", example(), {"0": WEIGHT, "1": COUNTS})
    data = path.read_bytes()
    place = data.index(WEIGHT.tobytes()) + 5
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(WeightsError, match=r"is truncated or damaged .*data/0"):
        read_tensors(path)


@pytest.mark.parametrize("write", [write_zip, write_stream])
def test_random_damage_gives_weights_or_a_weights_error(tmp_path, write):
    data = write(tmp_path / "w", example(), {"0": WEIGHT, "1": COUNTS}).read_bytes()
    generator = random.Random(0)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(2, len(data))] = generator.randrange(256)
        (tmp_path / "w").write_bytes(damaged)
        try:
            state = read_tensors(tmp_path / "w")
        except WeightsError:
            continue
        assert all(isinstance(value, np.ndarray) for value in state.values())


def test_the_writer_of_these_tests_writes_what_pickle_does():
    value = {"a": [1, 2.5, None, True], "b": ("x", (), {}), "c": 1 << 70}
    assert pickle.load(io.BytesIO(dumps(value))) == value
    assert pickle.loads(dumps(Call("collections", "OrderedDict"))) == collections.OrderedDict()
