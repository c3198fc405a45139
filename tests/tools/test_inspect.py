"""`inspect` by the command: what it counts against Pillow and NumPy, what it finds wrong, and what it does not know."""

from __future__ import annotations

import collections
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from image_files import ImageFiles
from PIL import Image

from rar_jax.cli import main
from rar_jax.tokens.store import TokenStore
from rar_jax.tools.inspect import tokens as inspect_tokens

FILES = ImageFiles()


@pytest.fixture(autouse=True)
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, where pictures go."""
    monkeypatch.chdir(tmp_path)


def report(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> dict[str, Any]:
    """What --json prints, after checking the exit code."""
    assert main(["inspect", *argv, "--json", "--quiet"]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def counts(summary: dict[str, Any]) -> dict[str, int]:
    return {row["class"]: row["count"] for row in summary["classes"]}


def text(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert main(["inspect", *argv]) == code
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that is refused."""
    assert main(["inspect", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


# ---------------------------------------------------------------- images


def write(folder: str, name: str, size: tuple[int, int], mode: str = "RGB", turn: int = 1, **options: Any) -> None:
    (pathlib.Path("data") / "train" / folder).mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = turn
    image = Image.linear_gradient("L").resize(size).convert(mode)
    image.save(pathlib.Path("data") / "train" / folder / name, **({"exif": exif} if turn > 1 else {}), **options)


def test_sizes_kinds_and_modes(capsys: pytest.CaptureFixture[str]) -> None:
    write("cat", "a.jpg", (300, 200))
    write("cat", "b.jpg", (40, 500), turn=6)
    write("cat", "c.jpg", (41, 60), mode="CMYK")
    write("dog", "d.png", (256, 256), mode="L", turn=3)
    write("dog", "e.png", (256, 255), mode="RGBA")
    write("eel", "f.webp", (1000, 256), turn=1)
    for kind in ("cat", "dog"):
        (pathlib.Path("data") / "val" / kind).mkdir(parents=True)
    shutil.copy("data/train/cat/a.jpg", "data/val/cat/a.jpg")
    found = report(capsys, 0, "folder:data")
    assert (found["num_images"], found["num_checked"], found["split"]) == (6, 6, "train")
    assert found["width"] == {"min": 40, "median": 256, "max": 1000}
    assert found["height"] == {"min": 60, "median": 255, "max": 500}
    assert (found["image_size"], found["below_image_size"]) == (256, 4)
    assert found["formats"] == {"JPEG": 3, "PNG": 2, "WEBP": 1}
    assert found["modes"] == {"RGB": 3, "CMYK": 1, "L": 1, "RGBA": 1}
    assert found["rotated_by_exif"] == 2
    assert found["bytes"] == sum(p.stat().st_size for p in pathlib.Path("data/train").rglob("*.*"))
    assert counts(found) == {"cat": 3, "dog": 2, "eel": 1}
    assert (found["num_problems"], found["problems"]) == (0, [])
    assert report(capsys, 0, "folder:data", "--image-size", "41")["below_image_size"] == 1
    assert report(capsys, 1, "folder:data", "--split", "heldout")["num_images"] == 1  # dog and eel are empty there
    told = text(capsys, 0, "data")
    assert told.startswith("folder:data (images)\n") and "width: min 40, median 256, max 1,000\n" in told


def test_a_zoo(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    """All problems of its listing and its reading; what is good is counted all the same."""
    FILES.write_zoo(tmp_path / "zoo" / "train")
    found = report(capsys, 1, "folder:zoo", "--out", "grid.png")
    first, _, empty = FILES.CLASSES
    assert {each["name"]: each["reason"].partition(" (")[0] for each in found["problems"]} == {
        "stray.jpg": "not in a class folder",
        empty: "a class without images",
        **{
            f"{first}/{name}": reason
            for name, reason in {
                "README.md": "not an image by its suffix",
                "circle": "a link to a folder, not followed: it may be circular",
                "dangling.jpg": "a dangling link",
                "pipe.jpg": "not a file",
                "empty.jpg": "0 bytes",
                "page.png": "not an image",
            }.items()
        },
    }
    assert found["num_problems"] == 8
    assert list(counts(found).values()) == [10, 1, 0, 1] and sum(found["formats"].values()) == 10
    few = report(capsys, 1, "folder:zoo", "--problems", "3")
    assert (few["num_problems"], few["problems"]) == (8, found["problems"][:3])
    printed = text(capsys, 1, "folder:zoo", "--problems", "3")
    assert "problems: 8\n" in printed and "stray.jpg" in printed and "page.png" not in printed
    with Image.open("grid.png") as picture:
        assert picture.width > 8 * 128 and 3 * 128 < picture.height < 4 * 128 + 40  # three classes have images
        white = np.asarray(picture.convert("L"))[-140:-20, -130:]
        assert white.min() == 255, "the last class has one image, and then white"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    """But for bytes and sizes, since other encoders write other files."""
    FILES.write_zoo(tmp_path / "zoo" / "train")
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = [line.rstrip() for line in text(capsys, 1, "folder:zoo").splitlines() if "bytes: " not in line]
    assert len(lines) > 20
    assert [line for line in page.splitlines() if line[4:].rstrip() in lines] == [f"    {line}" for line in lines]


def test_limit_is_spread_evenly_and_said(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    images = FILES.image_set((7, 5, 6))
    FILES.write_folder(tmp_path / "data" / "train", images)
    FILES.write_folder(tmp_path / "data" / "val", images)
    found = report(capsys, 0, "folder:data", "--limit", "3")
    assert (found["num_images"], found["num_checked"]) == (18, 3)
    looked = [images[i][0] for i in (0, 8, 17)]
    assert found["bytes"] == sum(map(len, looked))
    assert (list(counts(found).values()), found["counted"]) == ([7, 5, 6], "all images")
    assert report(capsys, 0, "folder:data", "--limit", "99")["num_checked"] == 18


def test_classes_that_only_reading_tells(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("array_record")
    from rar_jax.data.formats.array_record import write_array_record

    images = [(data, label) for data, label, _ in FILES.image_set((7, 5, 6))]
    images[4] = (b"", 0)
    images[12] = (images[12][0], 1)
    write_array_record(tmp_path / "train.array_record", images, class_names=FILES.CLASSES)
    write_array_record(tmp_path / "val.array_record", images[:1], class_names=FILES.CLASSES)
    found = report(capsys, 1, "array_record:.")
    assert found["problems"] == [{"name": "record 4", "reason": "0 bytes"}]
    labels = collections.Counter(label for data, label in images if data)
    assert list(counts(found).values()) == [labels[c] for c in range(3)]
    assert found["counted"] == "good images among the checked ones"


def test_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    found = {split: report(capsys, 0, "digits", "--split", split) for split in ("train", "heldout")}
    target: Any = load_digits().target  # pyright: ignore
    assert np.add(*(list(counts(found[split]).values()) for split in found)).tolist() == np.bincount(target).tolist()
    assert found["train"]["width"] == {"min": 8, "median": 8, "max": 8}
    assert (found["train"]["bytes"], found["train"]["modes"]) == (1437 * 64, {"L": 1437})


def test_of_many_classes_the_smallest_median_and_largest_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    data = FILES.jpeg(0)
    for label in range(25):
        folder = tmp_path / "data" / "train" / f"c{label:02}"
        folder.mkdir(parents=True)
        for i in range(label % 5 + 2 * (label == 9)):
            (folder / f"{i}.jpg").write_bytes(data)
    (tmp_path / "data" / "val").mkdir()
    lines = [line.lstrip("│├└─ ").split() for line in text(capsys, 1, "folder:data").splitlines()]
    begin = next(i for i, line in enumerate(lines) if line[:3] == ["the", "18", "smallest"])
    shown = lines[begin + 2 : begin + 22]
    smallest = [count for count, _ in shown[:18]]
    assert smallest == sorted(smallest)
    assert [name for _, name in shown[:5]] == ["c00", "c05", "c10", "c15", "c20"]
    assert shown[-2:] == [["2", "c12"], ["6", "c09"]]
    assert len(report(capsys, 1, "folder:data")["classes"]) == 25


# ---------------------------------------------------------------- token stores


def test_a_token_store(
    straight: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_tokens, "BLOCK", 100)  # of 360 records
    found, store = report(capsys, 0, str(straight)), TokenStore(straight)
    records = np.concatenate([np.load(path) for path in sorted(straight.glob("*.npy"))])
    p = np.bincount(records["tokens"].reshape(-1), minlength=32) / records["tokens"].size
    assert found["codes"] == {
        "used": int((p > 0).sum()),
        "codebook_usage": float((p > 0).mean()),
        "perplexity": pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-12),
    }
    assert list(counts(found).values()) == np.bincount(records["label"]).tolist()
    assert found["bytes"] == sum(path.stat().st_size for path in straight.glob("*.npy"))
    sizes = [found[f"num_{name}"] for name in ("records", "images", "bad_images", "shards")]
    assert sizes == [360, 360, 0, 8]
    assert found["tokens"] == "16 ids of 32 codes"
    for key in ("tokenizer_sha256", "crops", "source", "tokenizer"):
        assert found[key] == store.card[key]
    assert main(["inspect", str(straight), "--progress"]) == 0
    told = capsys.readouterr()
    assert "checksums: verified" in told.out and store.card["tokenizer_sha256"] in told.out
    assert f"rar-jax tokenize --verify {straight} --weights" in told.out
    assert "8/8 shards" in told.err
    assert not list(pathlib.Path().iterdir()), "nothing is drawn or written"


def test_a_damaged_store(straight: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(straight, tmp_path / "store")
    shard = tmp_path / "store" / "shard-00003-of-00008.npy"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    found = report(capsys, 1, "store")
    assert found["num_problems"] == 1 and not {"codes", "classes", "checksums"} & found.keys()
    assert f"{shard.name} is damaged: sha256" in found["problems"][0]["reason"]
    told = text(capsys, 1, "store")
    assert "problems: 1" in told and "verified" not in told
    (tmp_path / "store" / "card.json").rename(tmp_path / "store" / "making.json")
    assert main(["inspect", "store"]) == 1
    assert "no card.json: tokenize was interrupted, run it again" in capsys.readouterr().err


# ---------------------------------------------------------------- mistakes


def test_what_is_not_known_and_flags_that_mean_nothing(
    straight: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    line = failure(capsys, "foldr:x")
    assert "foldr:x cannot be inspected. No such file or folder exists" in line
    for known in ("a token store (with card.json)", "one folder of images per class", "tfds:NAME"):
        assert known in line
    (tmp_path / "thesis" / "chapter").mkdir(parents=True)
    (tmp_path / "thesis" / "chapter" / "one.tex").touch()
    assert "thesis cannot be inspected. Give" in failure(capsys, "thesis")
    for flag, value in (("--limit", "3"), ("--image-size", "8"), ("--split", "train"), ("--out", "x.png")):
        assert f"{flag} does not apply to {straight}" in failure(capsys, str(straight), flag, value)
    for flag in ("--limit", "--image-size", "--problems"):
        assert f"{flag} is 0: at least 1" in failure(capsys, "digits", flag, "0")
    assert "there is no --config" in failure(capsys, "digits", "--config.seed=1")


def test_the_picture_does_not_fall_among_the_images(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILES.write_folder(tmp_path / "data", FILES.image_set())
    before = sorted((tmp_path / "data").rglob("*"))
    line = failure(capsys, "data", "--out", "data/n01440764/x.png")
    assert "data/n01440764/x.png would be written among the images of folder:data: give --out" in line
    monkeypatch.chdir(tmp_path / "data")
    assert "inspect.png would be written among the images of folder:." in failure(capsys, ".")
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert main(["inspect", ".", "--out", "../x.png", "--quiet"]) == 0 and (tmp_path / "x.png").is_file()
