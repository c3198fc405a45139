"""Files and words that nobody meant: they are read, or refused by an error of ours; nothing else comes out."""

from __future__ import annotations

import io
import json
import pathlib
import string
import tempfile
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rar_jax.config import ConfigError, load_experiment
from rar_jax.data.token_store import StoreError, TokenStore
from rar_jax.evaluation.npz import ReferenceFileError, open_npz
from rar_jax.interop.torch_zip import WeightsError, read
from rar_jax.interop.weights_file import write
from rar_jax.programs.experiment import resolve

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"
EXAMPLES = 150
quick = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def torch_zip() -> bytes:
    """A zip as torch writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "w.bin"
        write(path, {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)})
        assert read(path)["w"].shape == (2, 3)
        return path.read_bytes()


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, mu=np.zeros(8), sigma=np.eye(8))
    return out.getvalue()


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some changed, some cut out and some put in."""
    edit = st.tuples(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=40))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for at, cut, put in edits:
            data = data[:at] + put + data[at + cut :]
        return data

    return st.lists(edit, min_size=1, max_size=4).map(apply)


SAFETENSORS = safetensors.numpy.save({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})


@pytest.mark.promise(9, "fuzz of torch's zip and stream, and of safetensors: weights or WeightsError")
@quick
@given(
    data=st.one_of(st.binary(max_size=200).map(lambda b: b"\x80\x02" + b), damaged(torch_zip()), damaged(SAFETENSORS))
)
def test_weights(data: bytes, tmp_path: pathlib.Path) -> None:
    for suffix in (".bin", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(data)
        try:
            found = read(path)
        except WeightsError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(x, np.ndarray) for x in found.values())


@pytest.mark.promise(9, "truncated and oversized safetensors headers: refused")
@pytest.mark.parametrize("size", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_safetensors_headers(tmp_path: pathlib.Path, size: int) -> None:
    path = tmp_path / "w.safetensors"
    for body in (SAFETENSORS[8:], SAFETENSORS[8:20], b""):
        path.write_bytes(size.to_bytes(8, "little") + body)
        with pytest.raises(WeightsError):
            read(path)


@pytest.mark.promise(9, "fuzz of npz files: arrays or ReferenceFileError")
@quick
@given(data=st.one_of(st.binary(max_size=300), damaged(npz())))
def test_npz(data: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.npz"
    path.write_bytes(data)
    try:
        with open_npz(path) as file:
            for key, shape in (("mu", (8,)), ("sigma", (8, 8))):
                assert file.array(key, shape=shape).shape == shape
    except ReferenceFileError as error:
        assert str(path) in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CARD = {
    "schema": 2, "codebook_size": 8, "grid": [4], "num_classes": 2, "class_names": ["a", "b"], "crops": ["center"], "source": "x",
    "tokenizer_sha256": None, "num_records": 1, "shards": [{"name": "shard-0.npy", "num_records": 1}],
}  # fmt: skip


@pytest.mark.promise(9, "fuzz of the dataset card: a store or StoreError")
@quick
@given(key=st.sampled_from(sorted(CARD)), value=JSON, whole=st.none() | JSON | st.binary(max_size=60))
def test_card(key: str, value: Any, whole: Any, tmp_path: pathlib.Path) -> None:
    card = {**CARD, key: value} if whole is None else whole
    (tmp_path / "card.json").write_bytes(card if isinstance(card, bytes) else json.dumps(card).encode())
    with pytest.raises(StoreError):  # the shards are not there
        TokenStore(tmp_path)


WORDS = st.text(alphabet=string.ascii_letters + string.digits + "._=-[]{}()'\"%,: \u00e9\0", max_size=20)
KEYS = [
    "train.steps",
    "train.batch_size",
    "data.source",
    "generator.width",
    "mesh.fsdp",
    "seed",
    "evaluate",
    "train.warmup",
    "data.mix",
]


@pytest.mark.promise(11, "fuzz of config overrides: an experiment or a ConfigError of one line")
@quick
@given(
    override=st.one_of(
        WORDS,
        st.tuples(st.sampled_from(KEYS) | WORDS, WORDS | st.integers().map(str) | st.floats().map(str)).map("=".join),
    )
)
def test_overrides(override: str) -> None:
    try:
        resolve(load_experiment(str(TINY), [override]), "tiny")
    except ConfigError as error:
        assert str(error)
