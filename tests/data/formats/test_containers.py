"""Parquet, WebDataset and ArrayRecord hold the images of a folder bit for bit, and their damages are named."""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import sys
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from digests import batch_digest
from image_files import find_problems

from rar_jax.data import splits
from rar_jax.data.formats import parquet
from rar_jax.data.formats.array_record import write_array_record
from rar_jax.data.loader import batches
from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError

SIZE, CLASSES = 16, ("n01440764", "n01443537", "n02085620")  # as `files` has them
Images = list[tuple[bytes, int, str]]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: pathlib.Path, images: Images, *, label: str = "cls") -> None:
    with tarfile.open(path, "w") as tar:
        for data, number, name in images:
            add(tar, f"{name}.jpg", data)
            text = str(number) if label == "cls" else json.dumps({"label": number, "width": 3})
            add(tar, f"{name}.{label}", text.encode())


def write_parquet(path: pathlib.Path, images: Images, *, names: bool = True, rows: int = 4) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    table = pa.table(
        {
            "image": [{"bytes": data, "path": f"{name}.JPEG"} for data, _, name in images],
            "label": pa.array([label for _, label, _ in images], pa.int64()),
        }
    )
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)


@pytest.fixture
def train(files: Any) -> Images:
    return files.image_set((7, 5, 6))


@pytest.fixture
def val(files: Any) -> Images:
    return files.image_set((3, 2, 0), seed=500)


@pytest.fixture
def specs(files: Any, train: Images, val: Images, tmp_path: pathlib.Path) -> dict[str, str]:
    """The same images as every kind of source, in the same order; in two files for training."""
    files.write_folder(tmp_path / "folder" / "train", train)
    files.write_folder(tmp_path / "folder" / "val", val)
    for kind in ("tar", "parquet", "array_record"):
        (tmp_path / kind).mkdir()
    parts = {"train-00000-of-00002": train[:9], "train-00001-of-00002": train[9:], "validation-00000-of-00001": val}
    for name, part in parts.items():
        write_tar(tmp_path / "tar" / f"set-{name}.tar", part, label="cls" if "train" in name else "json")
        write_parquet(tmp_path / "parquet" / f"{name}.parquet", part)
        pairs = [(data, label) for data, label, _ in part]
        path = tmp_path / "array_record" / f"{name}.array_record"
        assert write_array_record(path, pairs, class_names=CLASSES) == len(part)
    (tmp_path / "tar" / "classes.txt").write_text("\n".join(CLASSES))
    return {
        "folder": f"folder:{tmp_path}/folder",
        "parquet": f"parquet:{tmp_path}/parquet",
        "glob": f"parquet:{tmp_path}/parquet/*-of-0000?.parquet",
        "webdataset": f"webdataset:{tmp_path}/tar",
        "braces": f"webdataset:{tmp_path}/tar/set-{{train-{{00000..00001}}-of-00002,validation-00000-of-00001}}.tar",
        "array_record": f"array_record:{tmp_path}/array_record",
    }


@pytest.mark.parametrize("kind", ["parquet", "glob", "webdataset", "braces", "array_record"])
@pytest.mark.parametrize("crop", ["center", "ten", "random"])
def test_containers_equal_the_folder(specs: dict[str, str], kind: str, crop: str, train: Images, val: Images) -> None:
    for split, images in (("train", train), ("heldout", val)):
        ours, folder = (load_source(specs[k], split, image_size=SIZE, crop=crop) for k in (kind, "folder"))  # pyright: ignore[reportArgumentType]
        assert ours.class_names == CLASSES and ours.num_images == len(images)
        order = np.random.default_rng(0).permutation(len(folder))
        assert batch_digest(ours.gather(order)) == batch_digest(folder.gather(order))
        assert [ours.read_image(i)[0] for i in range(len(images))] == [data for data, _, _ in images]  # pyright: ignore[reportAttributeAccessIssue]
        assert find_problems(ours) == {}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["folder", "parquet", "array_record"])
def test_batches_are_the_same_from_workers(specs: dict[str, str], kind: str) -> None:
    """After the source was read here: open files and caches stay behind."""
    source = load_source(specs[kind], "train", image_size=SIZE, crop="random")
    source.gather(np.arange(len(source)))
    digests = []
    for workers in (0, 2):
        stream = batches(source, global_batch=8, seed=1, start_step=2, num_workers=workers)
        digests.append([batch_digest(next(stream)) for _ in range(4)])
        getattr(stream, "close", lambda: None)()
    assert digests[0] == digests[1] and len(set(digests[0])) == 4


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "array_record"])
def test_a_share_is_held_out_where_no_name_says_so(files: Any, tmp_path: pathlib.Path, kind: str) -> None:
    images = files.image_set((30, 10, 2))
    if kind == "parquet":
        write_parquet(tmp_path / "all.parquet", images)
    elif kind == "webdataset":
        write_tar(tmp_path / "all.tar", images)
    else:
        write_array_record(tmp_path / "all.array_record", [(d, n) for d, n, _ in images], class_names=CLASSES)
    parts = [load_source(f"{kind}:{tmp_path}", split, image_size=SIZE) for split in ("train", "heldout")]  # pyright: ignore[reportArgumentType]
    assert [len(part) for part in parts] == ([40, 2] if kind == "array_record" else [38, 4])
    encoded: list[bytes] = [part.read_image(i)[0] for part in parts for i in range(len(part))]  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(encoded) == sorted(data for data, _, _ in images)
    if kind != "array_record":
        np.testing.assert_array_equal(np.bincount(parts[1].gather(np.arange(4))["labels"]), [2, 1, 1])
    by_hand = {d: n for d, n, _ in images}
    for part in parts:
        for i, label in enumerate(part.gather(np.arange(len(part)))["labels"]):
            assert by_hand[part.read_image(i)[0]] == label  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00010.parquet", "train"), ("imagenet1k-train-0000.tar", "train"), ("training_1.tar", "train"),
        ("val/0000.tar", "heldout"), ("imagenet_val_00.tar", "heldout"), ("validation-00000-of-00001.parquet", "heldout"),
        ("heldout.tar", "heldout"), ("test-0.parquet", "heldout"), ("test/train-0.parquet", "train"),
    ],
)  # fmt: skip
def test_names_say_the_split(tmp_path: pathlib.Path, name: str, split: str) -> None:
    file, other = tmp_path / name, tmp_path / ("x-test.tar" if split == "train" else "x-train.tar")
    found, train, share = splits.split_files("x", [file, other], split)  # pyright: ignore[reportArgumentType]
    assert found == (file,) and share is None and train == ((file,) if split == "train" else (other,))
    # Other words with the same letters do not.
    plain = [tmp_path / "attest.tar", tmp_path / "rooms" / "trainee.tar", tmp_path / "valley.tar"]
    assert splits.split_files("x", plain, "heldout") == (tuple(plain), tuple(plain), "heldout")


def test_validation_goes_before_test_whose_labels_are_withheld(tmp_path: pathlib.Path) -> None:
    files = [tmp_path / f"{name}.tar" for name in ("test", "train", "validation")]
    assert splits.split_files("x", files, "heldout")[0] == (files[2],)
    with pytest.raises(ConfigError, match=r"test.tar is held out, and no file's name says 'train'"):
        splits.split_files("x", files[:1], "train")


def test_braces_are_a_shells() -> None:
    assert splits.expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert splits.expand_braces("a-{9..11}") == ["a-9", "a-10", "a-11"]
    assert splits.expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]
    assert splits.expand_braces("{train-{0..1},val-0}") == ["train-0", "val-0", "train-1", "val-0"]


def test_bad_records_are_problems_with_a_name(files: Any, train: Images, tmp_path: pathlib.Path) -> None:
    images = [(b"" if i == 2 else data, label, name) for i, (data, label, name) in enumerate(train)]
    write_tar(tmp_path / "train-0.tar", images)
    write_tar(tmp_path / "val-0.tar", train[:1])
    write_parquet(tmp_path / "train-0.parquet", images)
    write_parquet(tmp_path / "val-0.parquet", train[:1])
    table = pq.read_table(tmp_path / "train-0.parquet")
    column = table["image"].to_pylist()
    column[4]["bytes"], column[5] = None, None
    pq.write_table(table.set_column(0, "image", pa.array(column)), tmp_path / "train-0.parquet", row_group_size=4)
    pairs = [(data, label) for data, label, _ in images]
    (tmp_path / "records").mkdir()
    write_array_record(tmp_path / "records" / "train-0.array_record", pairs, class_names=CLASSES)
    # Now only class 0 has a name.
    write_array_record(tmp_path / "records" / "val-0.array_record", pairs[:1], class_names=CLASSES[:1])
    empty = "no bytes: the row is empty or names a file elsewhere"
    expected = {
        "webdataset": {f"train-0.tar:{CLASSES[0]}_002": "0 bytes"},
        "parquet": {"train-0.parquet:2": "0 bytes", "train-0.parquet:4": empty, "train-0.parquet:5": empty},
        "array_record": {"record 2": "0 bytes"}
        | {f"record {i}": f"label {1 + (i > 11)} is outside the 1 classes" for i in range(7, 18)},
    }
    for kind, problems in expected.items():
        source = load_source(f"{kind}:{tmp_path}", "train", image_size=SIZE)
        batch = source.gather(np.arange(18))
        assert dict(source.problems) == find_problems(source) == problems  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_array_equal(batch["bad"].sum(), len(problems))
        if kind != "array_record":  # the next of class 0
            other = 6 if kind == "parquet" else 3
            np.testing.assert_array_equal(batch["images"][2], source[3]["images"])
            np.testing.assert_array_equal(batch["images"][4], source[other if kind == "parquet" else 4]["images"])
        else:  # labels are in the records: what follows is read until one is good
            np.testing.assert_array_equal(batch["images"][2], source[3]["images"])
            np.testing.assert_array_equal(batch["labels"], np.zeros(18))


def test_a_tar_of_oddities_lists_them(train: Images, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "a/x.jpg", train[0][0])
        add(tar, "a/x.cls", b" 1\n")
        add(tar, "b/x.JPEG", train[1][0])
        add(tar, "b/x.json", b'{"label": 0}')
        add(tar, "b/x.png", train[2][0])
        add(tar, "b/x.txt", b"a caption")
        add(tar, "c.jpg", train[3][0])
        add(tar, "d.cls", b"1")
        add(tar, "e.jpg", train[3][0])
        add(tar, "e.json", b'{"klass": 1}')
        add(tar, "f.jpg", train[3][0])
        add(tar, "f.cls", b"cat")
        add(tar, "g.seg.npy", b"1")
        add(tar, ".hidden", b"1")
        link = tarfile.TarInfo("h.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a/x.jpg"
        tar.addfile(link)
        add(tar, "n" * 120 + ".jpg", train[4][0])  # a long name has a header of its own
        add(tar, "n" * 120 + ".cls", b"1")
    write_tar(tmp_path / "val.tar", train[:1])
    source: Any = load_source(f"webdataset:{tmp_path}", "train", image_size=SIZE)
    assert [source.name(i) for i in range(3)] == ["train.tar:a/x", "train.tar:b/x", f"train.tar:{'n' * 120}"]
    np.testing.assert_array_equal(source.gather(np.arange(3))["labels"], [1, 0, 1])
    assert [source.read_image(i)[0] for i in range(3)] == [train[i][0] for i in (0, 1, 4)]
    no_class = "no class in it: .cls holds a number, .json a number named 'label'"
    assert dict(source.problems) == {
        "train.tar:b/x.png": "a second image of its sample",
        "train.tar:e.json": no_class,
        "train.tar:f.cls": no_class,
        "train.tar:g.seg.npy": "neither an image nor a class by its suffix",
        "train.tar:c": "no .cls or .json with its class",
        "train.tar:e": "no .cls or .json with its class",
        "train.tar:f": "no .cls or .json with its class",
        "train.tar:d": "a class without its image",
        "train.tar:h.jpg": "not a file: links in a tar are not followed",
    }
    assert source.class_names == ("0", "1")


def test_a_damaged_tar_is_named(train: Images, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train.tar"
    write_tar(path, train)
    whole = path.read_bytes()

    def check_refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=f"train.tar {message}") as error:
            load_source(f"webdataset:{path}", "train", image_size=SIZE)
        assert "\n" not in str(error.value)

    # In the middle of an image; within a header in the middle, where tarfile itself would quietly stop; no tar at all.
    second = whole.index(CLASSES[0].encode(), 600)
    check_refused(whole[:700], "ends within|is no plain")
    check_refused(whole[:second] + b"\xff" * 300 + whole[second + 300 :], "has a damaged header at byte")
    check_refused(whole[: second + 100], "has a damaged header|is no plain")
    check_refused(b"", "is no plain")
    check_refused(b"<html>" * 200, "is no plain")
    check_refused(gzip.compress(whole), "is no plain, whole .tar")
    # Cut between two members: nothing is wrong but that there is no end.
    path.write_bytes(whole[: whole.index(f"{train[5][2]}.jpg".encode())])
    source: Any = load_source(f"webdataset:{path}", "heldout", image_size=SIZE)
    assert dict(source.problems) == {"train.tar": "no end marker: the file may have been cut short between two members"}


def test_parquet_memory_is_bounded(train: Images, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train.parquet", train, rows=3)
    write_parquet(tmp_path / "val.parquet", train[:1])
    source: Any = load_source(f"parquet:{tmp_path}", "train", image_size=SIZE)
    group = sum(len(data) for data, _, _ in train) // 6
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * group)
    reads = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda s, i, **k: (reads.append(i), real(s, i, **k))[1])
    for start in range(0, 18, 6):  # rows in order, shuffled within a batch: each group once
        source.gather(np.random.default_rng(start).permutation(6) + start)
    assert reads == [0, 1, 2, 3, 4, 5]
    assert 1 <= len(source._cache) <= 3 and sum(c.nbytes for c in source._cache.values()) <= 3 * group
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    source.gather(np.arange(18))
    assert len(source._cache) == 1


def test_wrong_parquet_is_refused(train: Images, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"

    def check_refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message) as error:
            load_source(f"parquet:{path}", "train", image_size=SIZE)
        assert "\n" not in str(error.value)

    check_refused(r"no file .*a.parquet")
    path.write_bytes(b"PAR1 not really")
    check_refused("a.parquet is no whole Parquet file")
    pq.write_table(pa.table({"img": [b"1"], "label": [0]}), path)
    check_refused(r"columns \['img', 'label'\], not 'image' and 'label'")
    pq.write_table(pa.table({"image": [b"1"], "label": ["cat"]}), path)
    check_refused("labels of a.parquet are string")
    pq.write_table(pa.table({"image": [b"1", b"2"], "label": [0, None]}), path)
    check_refused("has 1 rows without a label")
    write_parquet(path, [(train[0][0], 0, "a"), (train[1][0], 3, "b"), (train[1][0], 3, "c")])
    check_refused("label 3 of record . is outside the 3 classes")
    # Without the metadata classes are numbers; plain bytes will do.
    images = pa.array([data for data, _, _ in train])
    pq.write_table(pa.table({"image": images, "label": [label for _, label, _ in train]}), path)
    source: Any = load_source(f"parquet:{path}", "heldout", image_size=SIZE)
    assert (source.class_names, source.read_image(0)[0] in [data for data, _, _ in train]) == (("0", "1", "2"), True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check_refused("pip install pyarrow")


def test_wrong_array_records_are_refused(
    train: Images, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.array_record"
    with pytest.raises(ConfigError, match="label 3 of image 0 has no class name"):
        write_array_record(path, [(b"", 3)], class_names=CLASSES)
    write_array_record(path, [(data, label) for data, label, _ in train], class_names=CLASSES)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ConfigError, match=r"no classes.txt beside a.array_record"):
        load_source(f"array_record:{tmp_path}", "train", image_size=SIZE)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    path.write_bytes(b"no records" * 100)
    with pytest.raises(ConfigError, match="no whole ArrayRecord files") as error:
        load_source(f"array_record:{tmp_path}", "train", image_size=SIZE)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(ConfigError, match="pip install array_record"):
        load_source(f"array_record:{tmp_path}", "train", image_size=SIZE)
