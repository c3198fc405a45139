"""The authors' JSONL, in and out: to the bit, in constant memory, every mistake with its line."""

from __future__ import annotations

import hashlib
import json
import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest

from rar_jax.errors import StoreError
from rar_jax.tokens import jsonl
from rar_jax.tokens.jsonl import export_jsonl, import_jsonl
from rar_jax.tokens.store import TokenStore

NAMES = tuple("abcde")


def write_lines(path: pathlib.Path, tokens: np.ndarray, labels: np.ndarray) -> None:
    """As the authors' pretokenize script writes: json.dumps of a dict, and a newline."""
    with open(path, "w") as file:
        for label, row in zip(labels.tolist(), tokens.tolist(), strict=True):
            file.write(json.dumps({"class_id": label, "tokens": row}) + "\n")


def make(path: pathlib.Path, count: int = 103, codebook_size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    tokens, labels = rng.integers(0, codebook_size, (count, 6)), rng.integers(0, len(NAMES), count)
    tokens[0, 0], labels[0] = codebook_size - 1, len(NAMES) - 1
    write_lines(path, tokens, labels)
    return tokens, labels


def bring_in(path: pathlib.Path, out: pathlib.Path, **changes: Any) -> TokenStore:
    keywords = {"codebook_size": 1024, "class_names": NAMES, "num_tokens": 6, "shard_records": 26, **changes}
    return import_jsonl(path, out, **keywords)


@pytest.mark.parametrize("codebook_size", [1024, 65_537])
def test_round_trip_to_the_bit(tmp_path: pathlib.Path, codebook_size: int) -> None:
    file, back = tmp_path / "a.jsonl", tmp_path / "back.jsonl"
    tokens, labels = make(file, codebook_size=codebook_size)
    store = bring_in(file, tmp_path / "s", codebook_size=codebook_size)
    store.verify()
    rows = store.gather(np.arange(103))
    np.testing.assert_array_equal(rows["tokens"], tokens)
    np.testing.assert_array_equal(rows["labels"], labels)
    np.testing.assert_array_equal(rows["ids"], np.arange(103))
    assert store.card["tokenizer_sha256"] is None and store.class_names == NAMES
    assert [shard["span"] for shard in store.card["shards"]] == [[0, 26], [26, 52], [52, 78], [78, 103]]
    export_jsonl(store, back)
    assert back.read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))
    again = bring_in(back, tmp_path / "t", codebook_size=codebook_size)
    assert [s["sha256"] for s in again.card["shards"]] == [s["sha256"] for s in store.card["shards"]]


def test_a_last_line_without_newline(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.jsonl"
    tokens, _ = make(file)
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_array_equal(bring_in(file, tmp_path / "s").gather(np.arange(103))["tokens"], tokens)


@pytest.mark.parametrize("number", [1, 27, 103])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("\xff", "not JSON"),
        ("[1, 2]", "not an object"),
        ('{"tokens": [1, 2, 3, 4, 5, 6]}', "not an object"),
        ('{"class_id": 5, "tokens": [1, 2, 3, 4, 5, 6]}', r"class_id is 5, outside 0\.\.4"),
        ('{"class_id": -1, "tokens": [1, 2, 3, 4, 5, 6]}', "class_id is -1"),
        ('{"class_id": 1.0, "tokens": [1, 2, 3, 4, 5, 6]}', "class_id is 1.0"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 4, 5]}', "5 tokens, expected a list of 6"),
        ('{"class_id": 1, "tokens": 7}', "no tokens, expected a list of 6"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 4, 5, 6.5]}', "a token is not an integer"),
        ('{"class_id": 1, "tokens": [1, 2, true, 4, 5, 6]}', "a token is not an integer"),
        ('{"class_id": 1, "tokens": [1, 2, 1024, 4, 5, 6]}', r"token 2 is 1024, outside 0\.\.1023"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 4, 5, -1]}', "token 5 is -1"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 4, 5, 99999999999999999999]}', "too large|too big"),
    ],
)
def test_mistakes_name_the_line(tmp_path: pathlib.Path, line: str, problem: str, number: int) -> None:
    file = tmp_path / "a.jsonl"
    make(file)
    lines = file.read_bytes().split(b"\n")
    lines[number - 1] = line.encode("latin-1")
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(StoreError, match=rf"a\.jsonl line {number}: .*({problem})"):
        bring_in(file, tmp_path / "s")
    assert not (tmp_path / "s" / "card.json").exists()


def test_an_empty_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(StoreError, match="is empty"):
        bring_in(tmp_path / "a.jsonl", tmp_path / "s")


def test_interrupted_import_resumes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    make(file)
    bring_in(file, tmp_path / "straight")
    parsed: list[int] = []
    real = jsonl._parse_lines

    def stops(*args: Any) -> Any:
        if len(parsed) == 2:
            raise KeyboardInterrupt
        parsed.append(args[2])
        return real(*args)

    monkeypatch.setattr(jsonl, "_parse_lines", stops)
    with pytest.raises(KeyboardInterrupt):
        bring_in(file, tmp_path / "s")
    monkeypatch.setattr(jsonl, "_parse_lines", lambda *args: parsed.append(args[2]) or real(*args))
    bring_in(file, tmp_path / "s")
    assert parsed == [0, 26, 52, 78]  # each shard's lines once
    both = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("s", "straight")]
    assert both[0] == both[1]


def test_export_is_whole_or_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.jsonl")
    store, out = bring_in(tmp_path / "a.jsonl", tmp_path / "s"), tmp_path / "out.jsonl"
    out.write_text("before")

    def full(_: np.ndarray) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "gather", full)
    with pytest.raises(OSError, match="No space left"):
        export_jsonl(store, out)
    assert out.read_text() == "before" and not list(tmp_path.glob("*.tmp"))


def test_constant_memory(tmp_path: pathlib.Path) -> None:
    """200,000 lines against 10,000: what is kept does not grow by the 19 times that the file does."""
    line = json.dumps({"class_id": 3, "tokens": [7, 1, 0, 255]}) + "\n"
    peaks, sha256 = {}, {}
    for count in (10_000, 200_000):
        file, out = tmp_path / f"{count}.jsonl", tmp_path / f"back{count}.jsonl"
        file.write_text(line * count)
        tracemalloc.start()
        store = bring_in(file, tmp_path / str(count), num_tokens=4, shard_records=10_000)
        export_jsonl(store, out)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        sha256[count] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, out)]
        assert len(store) == count and sha256[count][0] == sha256[count][1]
    # The list of shards and a set of pages; the file grew by 8.5 MB.
    assert peaks[200_000] < peaks[10_000] + 200_000, peaks
