"""The token store: what is written is read back, damage is named, an interrupted writer goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import pickle
import re
import shutil
import tracemalloc
from typing import Any

import grain
import numpy as np
import pytest

from rar_jax.errors import StoreError
from rar_jax.models import TokenSpec
from rar_jax.tokens import store as token_store
from rar_jax.tokens.store import TokenStore, card_sha256
from rar_jax.tokens.writer import TokenStoreWriter

RECORDS, CLASSES = 103, 5
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_card(codebook_size: int = 1024) -> dict[str, Any]:
    dtype = "uint16" if codebook_size <= 65_536 else "uint32"
    return {
        "spec": {"shape": [6], "dtype": dtype, "vocab": codebook_size},
        "num_classes": CLASSES,
        "class_names": list("abcde"),
        "crops": [f"crop {k}" for k in range(10)],
        "source": "digits",
        "tokenizer_sha256": "0" * 64,
    }


def make_columns(num_records: int = RECORDS, codebook_size: int = 1024) -> Columns:
    """tokens, labels, source_ids, crops; the largest token and label and an id past 32 bits are among them."""
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(0, codebook_size, (num_records, 6)), rng.integers(0, CLASSES, num_records)
    tokens[0, 0], labels[0] = codebook_size - 1, CLASSES - 1
    return tokens, labels, np.arange(num_records) + 2**40, rng.integers(0, 10, num_records)


def make_writer(folder: pathlib.Path, *, codebook_size: int = 1024, **changes: Any) -> TokenStoreWriter:
    keywords = {"source_records": RECORDS, "shard_records": 26, **changes}
    return TokenStoreWriter(folder, make_card(codebook_size), **keywords)


def fill(writer: TokenStoreWriter, columns: Columns, bad: np.ndarray | None = None) -> None:
    """Writes every missing shard, 17 records at a time."""
    for j in writer.missing():
        begin, end = writer.span(j)
        with writer.shard(j) as shard:
            for at in range(begin, end, 17):
                here = slice(at, min(at + 17, end))
                tokens, labels, ids, crops = (column[here] for column in columns)
                shard.append(tokens, labels, ids, crops, None if bad is None else bad[here])


def write(folder: pathlib.Path, columns: Columns, bad: np.ndarray | None = None, **changes: Any) -> TokenStore:
    writer = make_writer(folder, source_records=len(columns[0]), **changes)
    fill(writer, columns, bad)
    assert writer.finish()
    return TokenStore(folder)


def write_card(folder: pathlib.Path, card: dict[str, Any]) -> None:
    """As another program would, with a sha256 that fits."""
    (folder / "card.json").write_text(json.dumps({**card, "sha256": card_sha256(card)}))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_records", [1, 26, 103, 1000])
@pytest.mark.parametrize(("codebook_size", "dtype"), [(1024, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_round_trip(tmp_path: pathlib.Path, shard_records: int, codebook_size: int, dtype: str) -> None:
    columns = make_columns(codebook_size=codebook_size)
    store = write(tmp_path / "s", columns, shard_records=shard_records, codebook_size=codebook_size)
    store.verify()
    assert (len(store), store.spec) == (RECORDS, TokenSpec((6,), dtype, codebook_size))
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
    columns = make_columns()
    write(tmp_path, columns)
    card = json.loads((tmp_path / "card.json").read_text())
    assert {key: card[key] for key in token_store.CARD_KEYS} == make_card()
    assert (card["schema_version"], card["num_records"]) == (4, RECORDS)
    assert [shard["records"] for shard in card["shards"]] == [26, 26, 26, 25]
    assert [shard["span"] for shard in card["shards"]] == [[0, 26], [26, 52], [52, 78], [78, 103]]
    assert [shard["name"] for shard in card["shards"]] == [f"shard-0000{j}-of-00004.npy" for j in range(4)]
    for shard in card["shards"]:
        assert hashlib.sha256((tmp_path / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert card["records_per_class"] == [int(np.sum(columns[1] == c)) for c in range(CLASSES)]
    assert card["records_per_crop"] == [int(np.sum(columns[3] == k)) for k in range(10)]
    assert (card["num_bad_records"], card["num_bad_images"]) == (0, 0)
    with pytest.raises(StoreError, match="already holds a finished store"):
        make_writer(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", *(shard["name"] for shard in card["shards"])]


def test_bad_records_are_left_out_and_counted(tmp_path: pathlib.Path) -> None:
    """30 images in two crops; three images, and with them a whole shard's worth of one, could not be decoded."""
    columns = (*make_columns(60)[:2], np.arange(60) // 2, np.arange(60) % 2)
    bad = np.isin(columns[2], [3, 10, 11])
    store = write(tmp_path, columns, bad, shard_records=4)
    store.verify()
    card = store.card
    counted = [card[k] for k in ("num_records", "num_images", "num_bad_records", "num_bad_images")]
    assert counted == [54, 27, 6, 3]
    assert [i for shard in card["shards"] for i in shard["bad_records"]] == [6, 7, 20, 21, 22, 23]
    assert [shard["records"] for shard in card["shards"]] == [4, 2, 4, 4, 4, 0, *[4] * 9]
    rows = store.gather(np.arange(54))
    np.testing.assert_array_equal(rows["tokens"], columns[0][~bad])
    np.testing.assert_array_equal(rows["ids"], columns[2][~bad])
    with pytest.raises(StoreError, match="no image of digits could be decoded"):
        write(tmp_path / "nothing", make_columns(9), np.ones(9, bool))


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


@pytest.mark.parametrize(
    ("key", "value", "what"), [("tokens", 1024, "token 1024"), ("label", 5, "label 5"), ("crop", 10, "crop 10")]
)
def test_verify_names_file_and_record_out_of_range(tmp_path: pathlib.Path, key: str, value: int, what: str) -> None:
    """A store that another program wrote: checksums agree, contents do not."""
    write(tmp_path, make_columns())
    path = tmp_path / "shard-00002-of-00004.npy"
    records = np.load(path)
    records[key][11] = value
    np.save(path, records)
    card = json.loads((tmp_path / "card.json").read_text())
    card["shards"][2]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_card(tmp_path, card)
    with pytest.raises(StoreError, match=f"{re.escape(path.name)}: record 11 has {what}, outside 0"):
        TokenStore(tmp_path).verify()


def test_missing_or_short_shard_is_named_on_opening(tmp_path: pathlib.Path) -> None:
    write(tmp_path, make_columns())
    path = tmp_path / "shard-00001-of-00004.npy"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{path.name} has {size - 1} bytes, expected {size}"):
        TokenStore(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match=f"{path.name} is missing"):
        TokenStore(tmp_path)


@pytest.mark.parametrize("flipped", range(12))
def test_a_flipped_byte_of_the_card_is_found(tmp_path: pathlib.Path, flipped: int) -> None:
    """Even where it is still JSON: a digit of a count, a letter of a class name."""
    write(tmp_path, make_columns())
    path = tmp_path / "card.json"
    data = bytearray(path.read_bytes())
    at = [i for i, byte in enumerate(data) if not bytes([byte]).isspace()][flipped * 97 + 13]
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=re.escape(str(path))):
        TokenStore(tmp_path).verify()


def test_counts_that_are_not_the_records(tmp_path: pathlib.Path) -> None:
    card = write(tmp_path, make_columns()).card
    per_class = [card["records_per_class"][1], card["records_per_class"][0], *card["records_per_class"][2:]]
    for changes, message in (
        ({"records_per_class": per_class}, "records_per_class is not what the shards hold"),
        ({"shards": [{**s, "bad_records": [0]} for s in card["shards"]]}, "the span of shard-00000-of-00004.npy"),
    ):
        write_card(tmp_path, {**card, **changes})
        with pytest.raises(StoreError, match=message):
            TokenStore(tmp_path).verify()


@pytest.mark.parametrize("version", [1, 3])
def test_an_older_store_is_refused_with_its_version(tmp_path: pathlib.Path, version: int) -> None:
    card = write(tmp_path, make_columns()).card
    write_card(tmp_path, {**card, "schema_version": version})
    with pytest.raises(StoreError, match=f"card.json has schema version {version}, expected 4: run tokenize again"):
        TokenStore(tmp_path)


# ---------------------------------------------------------------- interruptions and processes


def test_interrupted_writer_resumes_with_the_first_missing_shard(tmp_path: pathlib.Path) -> None:
    columns = make_columns()
    write(tmp_path / "straight", columns)
    folder, writer = tmp_path / "s", make_writer(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        for j in writer.missing():
            begin, end = writer.span(j)
            with writer.shard(j) as shard:
                shard.append(*(column[begin:end] for column in columns))
                if j == 2:
                    raise KeyboardInterrupt
    # Two shards were whole; of the third there is nothing.
    whole = [f"shard-0000{j}-of-00004.{suffix}" for j in range(2) for suffix in ("json", "npy")]
    assert sorted(p.name for p in folder.iterdir()) == ["making.json", *whole]
    with pytest.raises(StoreError, match=r"no card.json: tokenize was interrupted, run it again"):
        TokenStore(folder)
    again = make_writer(folder)
    assert (again.missing(), again.finish()) == ([2, 3], False)
    fill(again, columns)
    assert again.finish()
    assert contents(folder) == contents(tmp_path / "straight")


@pytest.mark.parametrize("at", range(10))
def test_killed_at_any_write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """As after kill -9 at the k-th rename: what was to be renamed is left behind, half written, and nothing is cleaned up."""
    columns = make_columns()
    write(tmp_path / "straight", columns)
    calls, real = [], os.replace

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == at + 1:
            data = pathlib.Path(source).read_bytes()
            pathlib.Path(f"{target}.99999.tmp").write_bytes(data[: len(data) // 2])
            raise RuntimeError("killed")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RuntimeError, match="killed"):
        write(tmp_path / "s", columns)
    assert not (tmp_path / "s" / "card.json").exists()
    monkeypatch.undo()
    write(tmp_path / "s", columns)
    assert contents(tmp_path / "s") == contents(tmp_path / "straight")


def test_a_damaged_shard_is_made_again(tmp_path: pathlib.Path) -> None:
    columns = make_columns()
    write(tmp_path / "straight", columns)
    folder, writer = tmp_path / "s", make_writer(tmp_path / "s")
    fill(writer, columns)
    for name in ("shard-00001-of-00004.npy", "shard-00003-of-00004.json"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    (folder / "shard-00002-of-00004.json").unlink()
    assert make_writer(folder).missing()[:2] == [1, 2]
    write(folder, columns)
    assert contents(folder) == contents(tmp_path / "straight")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_make_the_store_of_one(tmp_path: pathlib.Path, count: int) -> None:
    columns = make_columns()
    write(tmp_path / "one", columns)
    writers = [make_writer(tmp_path / "s", process_index=p, process_count=count) for p in range(count)]
    for p in reversed(range(count)):
        assert writers[p].missing() == [j for j in range(4) if j % count == p]
        assert not writers[p].finish()
        fill(writers[p], columns)
        assert writers[p].finish() == (p == 0)
    assert writers[-1].finish()
    assert contents(tmp_path / "s") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokenizer_sha256": "1" * 64}, "tokenizer_sha256"),
        ({"source": "idx:x"}, "source"),
        ({"crops": ["whole"]}, "crops"),
        ({"shard_records": 25}, "shard_records"),
        ({"source_records": 104}, "source_records"),
    ],
)
def test_another_store_is_never_mixed_in(tmp_path: pathlib.Path, changes: dict[str, Any], what: str) -> None:
    fill(make_writer(tmp_path), make_columns())
    before = contents(tmp_path)
    sizes = {"source_records": RECORDS, "shard_records": 26}
    card = make_card() | {k: v for k, v in changes.items() if k not in sizes}
    with pytest.raises(StoreError, match=rf"holds the beginning of another store \({what}: .*remove it"):
        TokenStoreWriter(tmp_path, card, **(sizes | {k: v for k, v in changes.items() if k in sizes}))
    assert contents(tmp_path) == before


def test_not_a_store(tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="not a token store"):
            TokenStore(folder)
    write(tmp_path, make_columns())
    card = json.loads((tmp_path / "card.json").read_text())
    for text, message in (
        (json.dumps({**card, "schema_version": 9}), "schema version 9, expected 4: run tokenize again"),
        (json.dumps({k: v for k, v in card.items() if k != "spec"}), "lacks spec"),
        (json.dumps({k: v for k, v in card.items() if k != "sha256"}), "lacks sha256"),
        (json.dumps({**card, "source": "else"}), "is damaged: its sha256 does not match"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(StoreError, match=message):
            TokenStore(tmp_path)
    write_card(tmp_path, {**card, "num_records": 9})
    with pytest.raises(StoreError, match="shards hold 103 records, the card 9"):
        TokenStore(tmp_path)


@pytest.mark.parametrize("token", [1024, -1, 65_536])
def test_wrong_tokens_are_refused(tmp_path: pathlib.Path, token: int) -> None:
    columns = make_columns()
    columns[0][70, 4] = token
    with pytest.raises(StoreError, match=rf"record 70 has token {token}, outside 0\.\.1023"):
        write(tmp_path, columns)
    assert not (tmp_path / "card.json").exists()


def test_wrong_records_are_refused(tmp_path: pathlib.Path) -> None:
    tokens, labels, ids, crops = make_columns()
    for columns, message in (
        ((tokens[:, :5], labels, ids, crops), r"expected \(b, 6\)"),
        ((tokens, labels[1:], ids, crops), "differ in length"),
        ((tokens, labels + 1, ids, crops), "record 0 has label 5"),
        ((tokens, labels, ids, crops + 10), "record 0 has crop"),
        ((tokens.astype(float), labels, ids, crops), "not integers"),
        (tuple(np.concatenate([c, c[:1]]) for c in (tokens, labels, ids, crops)), "more than its 103"),
        (tuple(c[:-1] for c in (tokens, labels, ids, crops)), "102 of 103 records were appended"),
    ):
        writer = make_writer(tmp_path, shard_records=103)
        with pytest.raises(StoreError, match=message), writer.shard(0) as shard:
            shard.append(*columns)
        assert writer.missing() == [0]
        shutil.rmtree(tmp_path)
    with pytest.raises(StoreError, match="lacks source"):
        TokenStoreWriter(tmp_path, {k: v for k, v in make_card().items() if k != "source"}, source_records=3)
    for sizes in ({"source_records": 0}, {"shard_records": 0}):
        with pytest.raises(StoreError, match="cannot be split into shards"):
            make_writer(tmp_path, **sizes)


def test_writing_takes_constant_memory(tmp_path: pathlib.Path) -> None:
    def peak(num_records: int) -> int:
        columns = make_columns(2500)
        tracemalloc.start()
        writer = make_writer(tmp_path / f"{num_records}", source_records=num_records, shard_records=2500)
        for j in writer.missing():
            with writer.shard(j) as shard:
                shard.append(*columns)
        assert writer.finish()
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(5000)  # what the first use imports
    # 1.2 MB more were written; what is left of each of the 19 shards is its line on the card.
    assert peak(50_000) < peak(2500) + 100_000
