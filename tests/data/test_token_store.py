"""The token store: what is written is read back, damage is named, an interrupted writer leaves no store."""

from __future__ import annotations

import hashlib
import json
import pathlib
import pickle
import re
import tracemalloc
from typing import Any

import grain
import numpy as np
import pytest

from rar_jax.data import token_store
from rar_jax.data.token_store import StoreError, TokenStore, TokenStoreWriter

RECORDS, GRID, CLASSES = 103, [2, 3], 5
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_card(num_records: int = RECORDS, codebook_size: int = 1024) -> dict[str, Any]:
    return {
        "num_records": num_records,
        "codebook_size": codebook_size,
        "grid": GRID,
        "num_classes": CLASSES,
        "class_names": list("abcde"),
        "crops": "ten",
        "source": "digits",
        "tokenizer_sha256": "0" * 64,
    }


def make_columns(num_records: int = RECORDS, codebook_size: int = 1024) -> Columns:
    """tokens, labels, source_ids, crops; the largest token and label and an id past 32 bits are among them."""
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(0, codebook_size, (num_records, 6)), rng.integers(0, CLASSES, num_records)
    tokens[0, 0], labels[0] = codebook_size - 1, CLASSES - 1
    return tokens, labels, np.arange(num_records) + 2**40, rng.integers(0, 10, num_records)


def write(folder: pathlib.Path, columns: Columns, *, num_shards: int = 4, codebook_size: int = 1024) -> TokenStore:
    with TokenStoreWriter(folder, make_card(len(columns[0]), codebook_size), num_shards) as writer:
        for start in range(0, len(columns[0]), 17):  # not a divisor of a shard: appends cross its end
            writer.append(*(column[start : start + 17] for column in columns))
    return TokenStore(folder)


@pytest.mark.parametrize("num_shards", [1, 4, 103])
@pytest.mark.parametrize(("codebook_size", "dtype"), [(1024, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_round_trip(tmp_path: pathlib.Path, num_shards: int, codebook_size: int, dtype: str) -> None:
    columns = make_columns(codebook_size=codebook_size)
    store = write(tmp_path / "s", columns, num_shards=num_shards, codebook_size=codebook_size)
    store.verify()
    assert (len(store), store.card["dtype"], store.num_tokens) == (RECORDS, dtype, 6)
    order = np.random.default_rng(2).permutation(RECORDS).repeat(2)
    batch = store.gather(order)
    for key, column, kind in zip(("tokens", "labels", "ids"), columns, ("int32", "int32", "int64"), strict=False):
        np.testing.assert_array_equal(batch[key], column[order])
        assert batch[key].dtype == kind
    for key, value in store[57].items():
        np.testing.assert_array_equal(value, store.gather(np.array([57]))[key][0])
    # The files are plain NumPy: they can be read without this project.
    files = sorted((tmp_path / "s").glob("shard-*.npy"))
    plain = np.concatenate([np.load(file, allow_pickle=False) for file in files])
    for key, column in zip(("tokens", "label", "source_id", "crop"), columns, strict=True):
        np.testing.assert_array_equal(plain[key], column)


def test_card(tmp_path: pathlib.Path) -> None:
    write(tmp_path, make_columns())
    card = json.loads((tmp_path / "card.json").read_text())
    assert {key: card[key] for key in token_store.CARD_KEYS} == make_card()
    assert (card["schema_version"], card["num_tokens"]) == (1, 6)
    assert [shard["records"] for shard in card["shards"]] == [25, 26, 26, 26]
    assert [shard["name"] for shard in card["shards"]] == [f"shard-0000{j}-of-00004.npy" for j in range(4)]
    for shard in card["shards"]:
        assert hashlib.sha256((tmp_path / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert not list(tmp_path.glob("*.tmp"))


def test_grain_and_pickle(tmp_path: pathlib.Path) -> None:
    store = write(tmp_path, make_columns())
    batch: Any = grain.MapDataset.source(store).batch(8)[2]  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(batch["tokens"], store.gather(np.arange(16, 24))["tokens"])
    pickled = pickle.dumps(store)
    assert len(pickled) < 500  # the folder, not the content
    np.testing.assert_array_equal(pickle.loads(pickled).gather(np.array([5]))["ids"], [5 + 2**40])


@pytest.mark.parametrize("index", [-1, RECORDS])
def test_index_out_of_range(tmp_path: pathlib.Path, index: int) -> None:
    with pytest.raises(IndexError, match=r"it has 0\.\.102"):
        write(tmp_path, make_columns()).gather(np.array([0, index]))


@pytest.mark.parametrize("trial", range(20))
def test_a_flipped_bit_is_found_and_its_file_named(tmp_path: pathlib.Path, trial: int) -> None:
    write(tmp_path, make_columns())
    rng = np.random.default_rng(trial)
    path = tmp_path / f"shard-0000{rng.integers(4)}-of-00004.npy"
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=f"{re.escape(str(path))} is damaged: sha256"):
        TokenStore(tmp_path).verify()


@pytest.mark.parametrize(("key", "value", "what"), [("tokens", 1024, "token 1024"), ("label", 5, "label 5")])
def test_verify_names_file_and_record_out_of_range(tmp_path: pathlib.Path, key: str, value: int, what: str) -> None:
    """A store that another program wrote: checksums agree, contents do not."""
    write(tmp_path, make_columns())
    path = tmp_path / "shard-00002-of-00004.npy"
    records = np.load(path)
    records[key][11] = value
    np.save(path, records)
    card = json.loads((tmp_path / "card.json").read_text())
    card["shards"][2]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(StoreError, match=f"{re.escape(path.name)}: record 11 has {what}, outside 0"):
        TokenStore(tmp_path).verify()


def test_missing_or_short_shard_is_named_on_opening(tmp_path: pathlib.Path) -> None:
    write(tmp_path, make_columns())
    path = tmp_path / "shard-00001-of-00004.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{path.name} has 867 bytes, expected 868"):
        TokenStore(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} is missing"):
        TokenStore(tmp_path)


def test_interrupted_writer_leaves_no_store_and_can_be_run_again(tmp_path: pathlib.Path) -> None:
    columns = make_columns()
    with pytest.raises(KeyboardInterrupt), TokenStoreWriter(tmp_path, make_card(), 4) as writer:
        writer.append(*(column[:60] for column in columns))
        raise KeyboardInterrupt
    # Two shards were whole; the third, half written, is gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"shard-0000{j}-of-00004.npy" for j in range(2)]
    with pytest.raises(StoreError, match=r"no card.json: tokenize was interrupted, run it again"):
        TokenStore(tmp_path)
    store = write(tmp_path, columns)
    store.verify()
    np.testing.assert_array_equal(store.gather(np.arange(RECORDS))["tokens"], columns[0])


def test_killed_writer_leaves_no_store(tmp_path: pathlib.Path) -> None:
    """As after kill -9: nothing is cleaned up."""
    writer = TokenStoreWriter(tmp_path, make_card(), 1)
    writer.append(*(column[:60] for column in make_columns()))
    assert [p.name for p in tmp_path.iterdir()] == ["shard-00000-of-00001.npy.tmp"]
    with pytest.raises(StoreError, match="interrupted"):
        TokenStore(tmp_path)
    writer.__exit__(KeyboardInterrupt, None, None)


def test_not_a_store(tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="not a token store"):
            TokenStore(folder)
    write(tmp_path, make_columns())
    card = json.loads((tmp_path / "card.json").read_text())
    for text, message in (
        (json.dumps({**card, "schema_version": 9}), "schema version 9, expected 1"),
        (json.dumps({k: v for k, v in card.items() if k != "grid"}), "lacks grid"),
        (json.dumps({**card, "num_records": 9}), "shards hold 103 records, the card 9"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            TokenStore(tmp_path)


@pytest.mark.parametrize("token", [1024, -1, 65_536])
def test_wrong_tokens_are_refused(tmp_path: pathlib.Path, token: int) -> None:
    tokens, *rest = make_columns()
    tokens[70, 4] = token
    with (
        pytest.raises(StoreError, match=rf"record 70 has token {token}, outside 0\.\.1023"),
        TokenStoreWriter(tmp_path, make_card()) as writer,
    ):
        writer.append(tokens[:50], *(column[:50] for column in rest))
        writer.append(tokens[50:], *(column[50:] for column in rest))
    assert not (tmp_path / "card.json").exists()


def test_wrong_records_are_refused(tmp_path: pathlib.Path) -> None:
    tokens, labels, ids, crops = make_columns()
    for columns, message in (
        ((tokens[:, :5], labels, ids, crops), r"expected \(b, 6\)"),
        ((tokens, labels[1:], ids, crops), "differ in length"),
        ((tokens, labels + 1, ids, crops), "record 0 has label 5"),
        ((tokens.astype(float), labels, ids, crops), "not integers"),
        (tuple(np.concatenate([c, c[:1]]) for c in (tokens, labels, ids, crops)), "more than the card's 103"),
        (tuple(c[:-1] for c in (tokens, labels, ids, crops)), "102 records were appended, the card says 103"),
    ):
        with pytest.raises(StoreError, match=message), TokenStoreWriter(tmp_path, make_card()) as writer:
            writer.append(*columns)
    with pytest.raises(StoreError, match="lacks num_records"):
        TokenStoreWriter(tmp_path, {k: v for k, v in make_card().items() if k != "num_records"})
    with pytest.raises(StoreError, match="cannot be cut into 104"):
        TokenStoreWriter(tmp_path, make_card(), 104)


def test_a_finished_store_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    write(tmp_path, make_columns())
    with pytest.raises(StoreError, match="already holds a finished store"):
        TokenStoreWriter(tmp_path, make_card())


def test_writing_takes_constant_memory(tmp_path: pathlib.Path) -> None:
    def peak(num_records: int) -> int:
        columns = make_columns(100)
        tracemalloc.start()
        with TokenStoreWriter(tmp_path / str(num_records), make_card(num_records)) as writer:
            for _ in range(num_records // 100):
                writer.append(*columns)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(100)  # what the first use imports
    assert peak(50_000) < peak(500) + 50_000
