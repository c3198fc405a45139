"""Saving RAR's parameters, and clear errors for files that are not right."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from torch_files import read_tensors

from rar_jax.errors import WeightsError
from rar_jax.generators.rar import TINY, init, prepare
from rar_jax.weights import rar
from tests.golden import count_different


@pytest.fixture(scope="module")
def released(golden: pathlib.Path) -> dict[str, np.ndarray]:
    return read_tensors(golden / "rar" / "rar_tiny.bin")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_ours_to_released_and_back(tmp_path: pathlib.Path, dtype: str | None, parity: Any) -> None:
    """Also of parameters in bfloat16: a released file is float32."""
    params = jax.tree.map(lambda x: x.astype(dtype or x.dtype), init(TINY, jax.random.key(0)))
    rar.save(tmp_path / "ours.safetensors", TINY, params)
    assert {x.dtype for x in read_tensors(tmp_path / "ours.safetensors").values()} == {np.dtype(np.float32)}
    config, again = rar.load(tmp_path / "ours.safetensors")
    assert (config.num_heads, config.num_tokens) == (TINY.num_heads, TINY.num_tokens)
    for ours, back in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        parity.check("ours -> saved -> loaded, numbers that differ", count_different(back, ours), 0)


def test_parameters_for_decoding_are_not_saved(tmp_path: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match=r"has shape .*, expected"):
        rar.save(tmp_path / "ours.safetensors", TINY, prepare(TINY, init(TINY, jax.random.key(0))))


def test_torch_makes_the_authors_file_of_ours(golden: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The two lines of docs/released_weights.md."""
    torch: Any = pytest.importorskip("torch", reason="torch is not one of our packages")
    rar.save(tmp_path / "ours.safetensors", *rar.load(golden / "rar" / "rar_tiny.bin"))
    ours = read_tensors(tmp_path / "ours.safetensors")
    torch.save({name: torch.from_numpy(x.copy()) for name, x in ours.items()}, tmp_path / "theirs.bin")
    theirs = read_tensors(tmp_path / "theirs.bin")
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in ours)


def drop(state: dict[str, Any]) -> None:
    del state["blocks.1.attn.qkv.weight"]


def surplus(state: dict[str, Any]) -> None:
    state["blocks.1.attn.qvk.weight"] = state["lm_head.bias"]


def reshape(state: dict[str, Any]) -> None:
    state["blocks.2.mlp.fc1.bias"] = state["blocks.2.mlp.fc1.bias"][:-1]


def huge(state: dict[str, Any]) -> None:
    state["lm_head.bias"] = state["lm_head.bias"].astype(np.float64) + 1e200


def whole_numbers(state: dict[str, Any]) -> None:
    state["lm_head.bias"] = state["lm_head.bias"].astype(np.int64)


def nan(state: dict[str, Any]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"] * np.float32("nan")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (huge, "'lm_head.bias' holds numbers that are not finite"),
        (whole_numbers, "'lm_head.bias' is int64: weights are floating point numbers"),
        (drop, r"'blocks.1.attn.qkv.weight' is missing \(1 in all\)"),
        (surplus, r"unexpected tensor 'blocks.1.attn.qvk.weight' .* Did you mean 'blocks.\d.attn.qkv.weight'"),
        (reshape, r"'blocks.2.mlp.fc1.bias' has shape \(159,\), expected \(160,\)"),
        (nan, "'lm_head.weight' holds numbers that are not finite"),
    ],
)
def test_wrong_files(
    released: dict[str, np.ndarray], tmp_path: pathlib.Path, harm: Callable[[dict[str, Any]], None], says: str
) -> None:
    state: dict[str, Any] = dict(released)
    harm(state)
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, tmp_path / "wrong.bin")
    with pytest.raises(WeightsError, match=says):
        rar.load(tmp_path / "wrong.bin")


def test_a_tokenizer_is_no_generator(golden: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match=r"tiny\.bin: it is a tokenizer \(maskgit_vq\), not a generator \(rar\)"):
        rar.load(golden / "maskgit_vq" / "maskgit_vq_tiny.bin")
    with pytest.raises(WeightsError, match=r"written as \.safetensors"):
        rar.save(tmp_path / "x.bin", TINY, init(TINY, jax.random.key(0)))
