"""Files and words that nobody meant: they are read, or refused by an error of ours; nothing else comes out."""

from __future__ import annotations

import hashlib
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
from torch_files import read_tensors, write_state_dict

from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError, ReferenceFileError, StoreError, WeightsError
from rar_jax.evaluation.npz import open_npz, read_array
from rar_jax.experiment import resolve
from rar_jax.models import TokenSpec
from rar_jax.tokens.store import TokenStore, card_sha256, npy_header, record_dtype

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"
EXAMPLES = 150
quick = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def torch_zip() -> bytes:
    """A zip as torch writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "w.bin"
        write_state_dict(path, {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)})
        assert read_tensors(path)["w"].shape == (2, 3)
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


@quick
@given(
    data=st.one_of(st.binary(max_size=200).map(lambda b: b"\x80\x02" + b), damaged(torch_zip()), damaged(SAFETENSORS))
)
def test_weights(data: bytes, tmp_path: pathlib.Path) -> None:
    for suffix in (".bin", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(data)
        try:
            found = read_tensors(path)
        except WeightsError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(x, np.ndarray) for x in found.values())


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_safetensors_headers(tmp_path: pathlib.Path, size: int) -> None:
    path = tmp_path / "w.safetensors"
    for body in (SAFETENSORS[8:], SAFETENSORS[8:20], b""):
        path.write_bytes(size.to_bytes(8, "little") + body)
        with pytest.raises(WeightsError):
            read_tensors(path)


@quick
@given(data=st.one_of(st.binary(max_size=300), damaged(npz())))
def test_npz(data: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.npz"
    path.write_bytes(data)
    try:
        with open_npz(path) as file:
            for key, shape in (("mu", (8,)), ("sigma", (8, 8))):
                assert read_array(file, key, shape=shape, kind="f").shape == shape
    except ReferenceFileError as error:
        assert str(path) in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def whole_store(folder: pathlib.Path) -> dict[str, Any]:
    """Writes the only shard of a store of 3 records; its card."""
    dtype = record_dtype(TokenSpec((4,), "uint16", 8))
    content = npy_header(3, dtype) + np.zeros(3, dtype).tobytes()
    (folder / "shard-0.npy").write_bytes(content)
    shard = {
        "name": "shard-0.npy",
        "records": 3,
        "sha256": hashlib.sha256(content).hexdigest(),
        "span": [0, 3],
        "bad_records": [],
    }
    return {
        "schema_version": 4, "spec": {"shape": [4], "dtype": "uint16", "vocab": 8}, "num_classes": 2, "class_names": ["a", "b"], "crops": ["center"],
        "source": "x", "tokenizer_sha256": None, "num_records": 3, "num_images": 3,
        "num_bad_records": 0, "num_bad_images": 0, "records_per_class": [3, 0], "records_per_crop": [3], "shards": [shard],
    }  # fmt: skip


CARD_KEYS = (
    "schema_version",
    "spec",
    "num_classes",
    "class_names",
    "crops",
    "source",
    "tokenizer_sha256",
)
CARD_KEYS += ("num_records", "num_images", "records_per_class", "records_per_crop", "shards")
SHARD_KEYS = ("name", "records", "sha256", "span", "bad_records")


@settings(quick, max_examples=4 * EXAMPLES)
@given(
    key=st.sampled_from(CARD_KEYS) | st.sampled_from(SHARD_KEYS).map(lambda key: ("shards", key)),
    value=JSON | st.sampled_from([2**40, 2**31, -1, [[]], [{}], [None], "../shard-0.npy", "\0", True]),
    schema=st.sampled_from([3, 4, 4]),
)
def test_card(key: Any, value: Any, schema: int, tmp_path: pathlib.Path) -> None:
    card = whole_store(tmp_path) | {"schema_version": schema}
    if isinstance(key, str):
        card[key] = value
    else:
        card["shards"][0][key[1]] = value
    (tmp_path / "card.json").write_text(json.dumps({**card, "sha256": card_sha256(card)}))
    try:
        TokenStore(tmp_path).verify()
    except StoreError as error:
        assert str(tmp_path) in str(error)


def test_the_whole_card_is_a_store(tmp_path: pathlib.Path) -> None:
    card = whole_store(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({**card, "sha256": card_sha256(card)}))
    store = TokenStore(tmp_path)
    store.verify()
    assert len(store) == 3


@quick
@given(content=JSON.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=60) | st.just(b"[" * 200_000))
def test_no_card(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(StoreError):
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
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", ["-" * 20_000 + "1", "1" + "+1" * 5_000, "[" * 5_000, "{}", "{'a': {}}", "'a\nb'"])
def test_nested_overrides(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(load_experiment(str(TINY), [f"train.steps={text}"]), "tiny")
    assert str(caught.value) and "\n" not in str(caught.value)
