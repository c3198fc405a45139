"""Weights go from the file to where they lie, one array at a time: the same numbers, and no second copy in memory."""

import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from torch_files import write_state_dict

from rar_jax.errors import WeightsError
from rar_jax.generators.rar import TINY, Config, axes, init
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import param_shardings
from rar_jax.weights import maskgit_vq, rar
from rar_jax.weights.lazy import LazyArray, put_on_devices
from rar_jax.weights.mapping import param_shapes, released_shapes, to_released, write_safetensors

WRITERS = {".bin": write_state_dict, ".safetensors": write_safetensors}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 1, 4), (2, 2, 1)])
def test_placed_is_loaded(tmp_path: pathlib.Path, suffix: str, mesh: tuple[int, int, int]) -> None:
    params = init(TINY, jax.random.key(0))
    WRITERS[suffix](tmp_path / f"w{suffix}", to_released(rar.TABLE, params))
    devices = make_mesh(MeshConfig(*mesh))
    shardings = param_shardings(axes(TINY), params, devices)
    _, lazy = rar.open_params(tmp_path / f"w{suffix}")
    placed = put_on_devices(lazy, shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, params))


def test_a_tokenizer_is_placed_too(golden: pathlib.Path) -> None:
    _, params = maskgit_vq.load(golden / "maskgit_vq" / "maskgit_vq_tiny.bin", image_size=16)
    _, lazy = maskgit_vq.open_params(golden / "maskgit_vq" / "maskgit_vq_tiny.bin", image_size=16)
    everywhere = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
    placed = put_on_devices(lazy, jax.tree.map(lambda _: everywhere, lazy))
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, params))
    assert all(x.sharding == everywhere for x in jax.tree.leaves(placed))


def test_only_the_layers_that_are_asked_for_are_read() -> None:
    asked: list[int] = []
    layers = [lambda i=i: asked.append(i) or np.full((3, 4), i, np.float16) for i in range(5)]
    array = LazyArray((5, 3, 4), layers, stacked=True)  # pyright: ignore[reportArgumentType]
    part = array[slice(1, 3), slice(None), slice(0, 2)]
    assert asked == [1, 2] and part.dtype == np.float32
    np.testing.assert_array_equal(part, np.broadcast_to(np.array([1, 2])[:, None, None], (2, 3, 2)))
    np.testing.assert_array_equal(array[...][4], np.full((3, 4), 4))


def test_damage_that_is_found_while_placing_names_the_file_and_the_tensor(tmp_path: pathlib.Path) -> None:
    write_state_dict(tmp_path / "w.bin", to_released(rar.TABLE, init(TINY, jax.random.key(0))))
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    _, lazy = rar.open_params(tmp_path / "w.bin")  # only names and shapes are looked at here
    with pytest.raises(WeightsError, match=r"w\.bin is truncated or damaged .*data/\d+.*: download it again"):
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        put_on_devices(lazy, jax.tree.map(lambda _: one, lazy))


MEASURE = """
import re, sys, jax
from rar_jax.weights import rar
from rar_jax.weights.lazy import put_on_devices
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def put(path):
    lazy = rar.open_params(path)[1]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return put_on_devices(lazy, jax.tree.map(lambda _: one, lazy))
put(sys.argv[1])  # what the machinery itself takes
before = peak()
params = put(sys.argv[2])
print((peak() - before) / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("suffix", WRITERS)
def test_memory_never_holds_two_copies(tmp_path: pathlib.Path, suffix: str, parity: Any) -> None:
    """Peak resident memory. The largest array (adaLN, a third of all) is there twice for a moment."""
    config = Config(num_tokens=16, codebook_size=64, num_classes=10, width=512, depth=16, num_heads=8, mlp_width=2048)
    state = {n: np.zeros(s, np.float32) for n, s in released_shapes(rar.TABLE, param_shapes(init, config)).items()}
    WRITERS[suffix](tmp_path / f"big{suffix}", state)
    rar.save(tmp_path / "tiny.safetensors", TINY, init(TINY, jax.random.key(0)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny.safetensors"), str(tmp_path / f"big{suffix}")]
    done: Any = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    copies = float(done.stdout)
    assert copies > 0.9, done.stdout + done.stderr
    parity.check("loading, peak memory over the parameters' bytes", copies, 1.5)
