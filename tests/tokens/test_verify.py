"""`tokenize --verify`, `--import` and `--export` by the command: damage is found in any file, the picture is the tokens."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import sys
from typing import Any

import jax
import numpy as np
import pytest
from commands import environment
from PIL import Image
from terminal import frames, shown_by

from rar_jax.cli import main
from rar_jax.data import imagenet
from rar_jax.errors import StoreError
from rar_jax.models import TokenSpec
from rar_jax.runs.manifest import file_sha256
from rar_jax.runs.pictures import save_image_grid
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.verify import select_sample
from rar_jax.tokens.writer import TokenStoreWriter
from rar_jax.weights import maskgit_vq

TINY = str(pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py")
NAMES = ["cat, Felis", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def weights(tiny: Any) -> pathlib.Path:
    return tiny.weights


@pytest.fixture
def store(weights: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """100 records of 4 of 5 classes in 3 shards; class 1 has none, class 4 has three."""
    card = {
        "spec": {"shape": [16], "dtype": "uint16", "vocab": 32},
        "num_classes": 5,
        "class_names": NAMES,
        "crops": ["whole image"],
    }
    writer = TokenStoreWriter(
        tmp_path / "store",
        {**card, "source": "made up", "tokenizer_sha256": file_sha256(weights)},
        source_records=100,
        shard_records=40,
    )
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 3], 100)
    labels[[9, 50, 99]] = 4
    for j in writer.missing():
        begin, end = writer.span(j)
        with writer.shard(j) as shard:
            count = end - begin
            shard.append(
                rng.integers(0, 32, (count, 16)), labels[begin:end], np.arange(begin, end), np.zeros(count, int)
            )
    writer.finish()
    return tmp_path / "store"


def test_a_terminal_shows_how_far_it_is(store: pathlib.Path) -> None:
    command = [sys.executable, "-m", "rar_jax", "tokenize", "--verify", str(store)]
    code, output = shown_by(command, environment())
    shown = [line for screen in frames(output) for line in screen]
    assert code == 0 and any(re.search(r"3/3 shards  [\d.e+-]+ shards/s", line) for line in shown), shown[-5:]
    code, output = shown_by([*command, "--quiet"], environment())
    assert code == 0 and b"shards/s" not in output


def check_fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr, progress apart, of a `tokenize` that fails."""
    assert main(["tokenize", *argv]) in (1, 2)
    out, err = capsys.readouterr()
    (line,) = (line for line in err.splitlines() if not re.match(r"verify store +\d+/\d+ shards", line))
    assert out == "" and line.startswith("rar-jax tokenize: "), err
    return line.removeprefix("rar-jax tokenize: ")


# ---------------------------------------------------------------- verify


@pytest.mark.parametrize(("field", "value"), [("tokens", 32), ("label", 5), ("label", -1), ("crop", 1)])
def test_a_batch_with_a_record_out_of_range(store: pathlib.Path, field: str, value: int) -> None:
    """Opening a store does not read it: a shard may have rotted, or been made by another program."""
    good = TokenStore(store).gather(np.arange(100))
    path = store / "shard-00001-of-00003.npy"
    records = np.load(path, mmap_mode="r+")
    records[field][11] = value
    records.flush()
    opened = TokenStore(store)
    np.testing.assert_array_equal(opened.gather(np.array([99, 3, 50, 52]))["ids"], good["ids"][[99, 3, 50, 52]])
    message = f"{path}: record 11 has {field.removesuffix('s')} {value}, outside 0"
    with pytest.raises(StoreError, match=re.escape(message)):
        opened.gather(np.array([99, 3, 51, 52]))


def test_summary(store: pathlib.Path, weights: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "--verify", str(store)]) == 0
    out = capsys.readouterr().out
    for text in (
        f"{store}: whole and undamaged",
        "100 of 16 ids of 32 codes, in 3 shards",
        "images     100, each in 1 crop(s); 0 could not",
        "classes    5, of 0 to ",
        "source     made up",
        f"tokenizer  {file_sha256(weights)}",
    ):
        assert text in out
    assert sorted(p.suffix for p in store.iterdir()) == [".json", ".npy", ".npy", ".npy"]


def test_a_flipped_byte_is_found_wherever_it_is(store: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first and last token, a label, an image id, a crop and the header of each shard; and the card."""
    dtype = np.dtype([("tokens", "<u2", (16,)), ("label", "<i4"), ("source_id", "<i8"), ("crop", "<i2")])
    assert dtype.itemsize == 46
    for name, records in (("00000", 40), ("00001", 40), ("00002", 20)):
        path = store / f"shard-{name}-of-00003.npy"
        data = path.read_bytes()
        header = len(data) - records * 46
        for at in (0, header - 1, header, header + 32, header + 36, header + 44, header + 20 * 46 - 16, len(data) - 15):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert check_fails(capsys, "--verify", str(store)).startswith(f"{path} is damaged: sha256 is ")
        path.write_bytes(data)
    card = (store / "card.json").read_bytes()
    for at in [i for i, byte in enumerate(card) if not chr(byte).isspace()][::61]:
        (store / "card.json").write_bytes(card[:at] + bytes([card[at] ^ 1]) + card[at + 1 :])
        assert str(store) in check_fails(capsys, "--verify", str(store))
    (store / "card.json").write_bytes(card)
    assert main(["tokenize", "--verify", str(store)]) == 0


def test_the_picture_is_the_decoded_tokens(
    tiny: Any, store: pathlib.Path, weights: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", "--verify", str(store), "--weights", str(weights)]) == 0
    assert f"picture    {store / 'verify.png'}" in capsys.readouterr().out
    # The records by plain NumPy, the decoder outside a jit: three of each class, for class 4 has no more.
    records = np.concatenate([np.load(path) for path in sorted(store.glob("shard-*.npy"))])
    rows = [np.flatnonzero(records["label"] == label)[:3] for label in (0, 2, 3, 4)]
    _, params = maskgit_vq.load(weights, image_size=8)
    decoded = tokenizer.decode(tiny.config, params, records["tokens"][np.concatenate(rows)].astype(np.int32))
    expected = (np.asarray(decoded) * 255).astype(np.uint8)
    assert len(np.unique(expected)) > 20
    save_image_grid(expected, ["cat", "eel", "fox", "gnu"], tmp_path / "expected.png", title="decoded tokens of store")
    ours, theirs = (
        np.asarray(Image.open(p).convert("RGB"), int) for p in (store / "verify.png", tmp_path / "expected.png")
    )
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1  # truncated: a last bit of float32 may cross a level
    TokenStore(store).verify()  # the picture in its folder is no damage
    assert main(["tokenize", "--verify", str(store), "--weights", str(weights), "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes() == (store / "verify.png").read_bytes()


def test_another_tokenizer_is_refused(
    tiny: Any, store: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    maskgit_vq.save(other, tiny.config, tokenizer.init(tiny.config, jax.random.key(1)))
    line = check_fails(capsys, "--verify", str(store), "--weights", str(other))
    assert "was made by the tokenizer with sha256" in line and "Give the tokenizer that made it" in line
    assert not (store / "verify.png").exists()


def test_a_sample_is_spread_over_the_classes(store: pathlib.Path) -> None:
    opened = TokenStore(store)
    indices, shown = select_sample(opened, rows=2, columns=8)
    assert shown == [0, 4] and len(indices) == 2 * 3
    np.testing.assert_array_equal(opened.gather(indices)["labels"], [0, 0, 0, 4, 4, 4])
    assert indices[3:].tolist() == [9, 50, 99]
    indices, shown = select_sample(opened, rows=9, columns=2)
    assert shown == [0, 2, 3, 4] and len(set(indices.tolist())) == 8


# ---------------------------------------------------------------- import, export


def test_import_and_export_by_the_command(
    store: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert main(["tokenize", "--export", str(store), "--out", str(file), "--quiet"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    records = np.concatenate([np.load(path) for path in sorted(store.glob("shard-*.npy"))])
    assert [line["tokens"] for line in lines] == records["tokens"].tolist()
    assert [line["class_id"] for line in lines] == records["label"].tolist()
    assert "exists: choose another" in check_fails(capsys, "--export", str(store), "--out", str(file))
    out = tmp_path / "imported"
    assert main(["tokenize", "--import", str(file), "--out", str(out), "--config", TINY, "--shard-records", "7"]) == 0
    assert "100 of 16 ids of 32 codes, in 15 shards" in capsys.readouterr().out
    assert main(["tokenize", "--export", str(out), "--out", str(back), "--quiet"]) == 0
    assert back.read_bytes() == file.read_bytes()


def test_import_of_the_authors_layout_needs_no_more(tmp_path: pathlib.Path) -> None:
    file, out = tmp_path / "maskgitvq.jsonl", tmp_path / "s"
    file.write_text(json.dumps({"class_id": 999, "tokens": [*range(768, 1024)]}) + "\n")
    assert main(["tokenize", "--import", str(file), "--out", str(out), "--quiet"]) == 0
    store = TokenStore(out)
    assert (store.spec, store.num_classes) == (TokenSpec((256,), "uint16", 1024), 1000)
    assert store.class_names == imagenet.class_names()
    np.testing.assert_array_equal(store[0]["tokens"], np.arange(768, 1024))
    shutil.rmtree(out)
    file.write_text(file.read_text() + json.dumps({"class_id": 1000, "tokens": [0] * 256}) + "\n")
    assert main(["tokenize", "--import", str(file), "--out", str(out), "--quiet"]) == 1
    assert (
        main(["tokenize", "--import", str(file), "--out", str(out), "--quiet", "--num-classes", "1001"]) == 1
    )  # begun
    shutil.rmtree(out)
    assert main(["tokenize", "--import", str(file), "--out", str(out), "--quiet", "--num-classes", "1001"]) == 0


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ((), "give one of --workdir, --source, --verify, --import and --export"),
        (("--verify", "a", "--export", "b"), "give one of --workdir"),
        (("--workdir", "w", "--config", TINY, "--weights", "x"), "--workdir has its own tokenizer"),
        (("--import", "a"), "give --out"),
        (("--import", "a", "--out", "b"), "--import a: no such file"),
        (("--export", "nowhere", "--out", "b"), "nowhere is not a token store"),
        (("--verify", "nowhere"), "nowhere is not a token store"),
        (("--verify", "nowhere", "--out", "b.png"), "give --weights too"),
        (("--source", "digits", "--out", "b"), "needs --config"),
        (("--source", "digits", "--out", "b", "--config", TINY, "--weights", "w.bin"), "w.bin: no such directory"),
        (("--workdir", "w"), "tokenize --workdir needs --config"),
    ],
)
def test_wrong_commands(
    argv: tuple[str, ...], problem: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert problem in check_fails(capsys, *argv)
    assert not list(tmp_path.iterdir())
