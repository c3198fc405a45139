"""Image sources: exact counts, exact pixels, and errors that name the file."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import re
import struct
from typing import Any

import grain
import numpy as np
import pytest
from sklearn import datasets

from rar_jax.data.sources import ArraySource, load_source, pad_images
from rar_jax.errors import ConfigError

DIGITS: Any = datasets.load_digits()
FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """7 training images (gzipped) of classes 0..2, 4 held-out ones (plain) of classes 0..1; 5 rows, 4 columns."""
    rng = np.random.default_rng(0)
    for prefix, labels, end in (("train", [0, 1, 2, 0, 1, 2, 0], ".gz"), ("t10k", [1, 0, 1, 0], "")):
        images = rng.integers(0, 256, (len(labels), 5, 4), np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{end}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{end}", np.array(labels, np.uint8))
    return tmp_path


def test_digits_split_is_stratified_disjoint_and_frozen() -> None:
    train, heldout = load_source("digits", "train"), load_source("digits", "heldout")
    assert (len(train), len(heldout)) == (1437, 360)
    a, b = train.gather(np.arange(1437)), heldout.gather(np.arange(360))
    np.testing.assert_array_equal(np.sort(np.concatenate([a["ids"], b["ids"]])), np.arange(1797))
    share = np.bincount(DIGITS.target) * 360 / 1797
    assert np.abs(np.bincount(b["labels"]) - share).max() < 1
    # The split of every published digits number: a change here makes them incomparable.
    assert hashlib.sha256(b["ids"].astype("<i8").tobytes()).hexdigest()[:16] == "d971ab24951548c1"


def test_digits_records_are_the_scaled_originals() -> None:
    source = load_source("digits", "heldout")
    assert (source.image_shape, source.num_classes) == ((8, 8, 1), 10)
    assert source.class_names == tuple("0123456789")
    record = source[17]
    assert record["images"].dtype == np.uint8
    np.testing.assert_array_equal(record["images"][..., 0], np.round(DIGITS.images[record["ids"]] * 255 / 16))
    assert record["labels"] == DIGITS.target[record["ids"]]
    assert source.gather(np.arange(360))["images"].max() == 255


def test_a_source_is_a_grain_source() -> None:
    source = load_source("digits", "train")
    batch: Any = grain.MapDataset.source(source).batch(4)[3]  # pyright: ignore[reportArgumentType]
    for key, value in source.gather(np.arange(12, 16)).items():
        np.testing.assert_array_equal(batch[key], value)
        assert batch[key].dtype == value.dtype


@pytest.mark.parametrize(("size", "target"), [(28, 32), (8, 11)])
def test_padding_is_symmetric(size: int, target: int) -> None:
    images = np.full((2, size, size, 3), 7, np.uint8)
    padded = pad_images(images, target)
    begin = (target - size) // 2
    assert padded.shape == (2, target, target, 3)
    np.testing.assert_array_equal(padded[:, begin : begin + size, begin : begin + size], images)
    assert padded.sum() == images.sum()


def test_image_size_smaller_than_the_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="8x8, larger than image_size=6"):
        load_source("digits", "train", image_size=6)


def test_idx(idx_folder: pathlib.Path) -> None:
    train = load_source(f"idx:{idx_folder}", "train")
    heldout = load_source(f"idx:{idx_folder}", "heldout", image_size=8)
    assert (len(train), train.image_shape, train.class_names) == (7, (5, 4, 1), ("0", "1", "2"))
    assert (len(heldout), heldout.image_shape, heldout.class_names) == (4, (8, 8, 1), ("0", "1", "2"))
    raw = np.frombuffer((idx_folder / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(4, 5, 4)
    np.testing.assert_array_equal(heldout.gather(np.array([3, 1]))["images"][:, 1:6, 2:6, 0], raw[[3, 1]])
    assert heldout[2]["labels"] == 1


def test_idx_class_names_from_a_file(idx_folder: pathlib.Path) -> None:
    (idx_folder / "classes.txt").write_text("T-shirt\ntrouser\nankle boot\n")
    assert load_source(f"idx:{idx_folder}", "train").class_names == ("T-shirt", "trouser", "ankle boot")
    (idx_folder / "classes.txt").write_text("T-shirt\ntrouser\n")
    with pytest.raises(ConfigError, match="label 2 of record 2 is outside the 2 classes"):
        load_source(f"idx:{idx_folder}", "train")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_idx_fashion_mnist() -> None:
    source = load_source(f"idx:{FASHION}", "heldout", image_size=32)
    assert (len(source), source.image_shape, source.num_classes) == (10_000, (32, 32, 1), 10)
    np.testing.assert_array_equal(np.bincount(source.gather(np.arange(10_000))["labels"]), [1000] * 10)


def test_idx_missing_folder_names_the_package(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset-fashion-mnist.*tfds:fashion_mnist"):
        load_source(f"idx:{tmp_path / 'nowhere'}", "train")
    with pytest.raises(ConfigError, match="no file train-images-idx3-ubyte"):
        load_source(f"idx:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "expected 96 bytes for .4, 5, 4., found 93"),
        (lambda data: data + b"x", "expected 96 bytes .* found 97"),
        (
            lambda data: b"<html>" + data,
            "no IDX file of 3 dimensions: expected 00000803 first, found 102 bytes from 3c68746d",
        ),
        (lambda data: b"", "found 0 bytes"),
        (lambda data: data[:4] + b"\xff" * 12 + data[16:], "expected 792281"),
    ],
)
def test_idx_corrupt_file_is_named(idx_folder: pathlib.Path, damage, message: str) -> None:
    path = idx_folder / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{message}") as error:
        load_source(f"idx:{idx_folder}", "heldout")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: b"text", lambda d: d[:20] + b"\0\0\0\0" + d[24:]])
def test_idx_corrupt_gzip_is_named(idx_folder: pathlib.Path, damage) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_source(f"idx:{idx_folder}", "train")


def test_idx_counts_must_agree(idx_folder: pathlib.Path) -> None:
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(ConfigError, match="4 images but 3 labels"):
        load_source(f"idx:{idx_folder}", "heldout")


def test_images_of_one_size_are_padded_not_cropped(idx_folder: pathlib.Path) -> None:
    padded = load_source("digits", "train", image_size=12, crop="pad")
    assert padded.image_shape == (12, 12, 1)
    for spec in ("digits", f"idx:{idx_folder}"):
        with pytest.raises(ConfigError, match="padded and not cropped: leave crop='ten' out"):
            load_source(spec, "train", image_size=6, crop="ten")


def test_tfds_errors_say_what_to_do(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no such dataset in TFDS. Did you mean 'fashion_mnist'") as error:
        load_source("tfds:fashion_mnits", "train")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"Prepare it once.*download_and_prepare") as error:
        load_source("tfds:fashion_mnist", "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"), [("digit", "Did you mean 'digits'"), ("idx", "idx:FOLDER"), ("digits:x", "idx:FOLDER")]
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_source(spec, "train")
    with pytest.raises(ConfigError, match="neither"):
        load_source("digits", "test")  # pyright: ignore[reportArgumentType]


def test_array_source_refuses_what_does_not_fit() -> None:
    images = np.zeros((2, 4, 4, 1), np.uint8)
    with pytest.raises(ConfigError, match="float32"):
        ArraySource(images.astype(np.float32), np.zeros(2, int), class_names="ab")
    with pytest.raises(ConfigError, match="label -1 of record 1"):
        ArraySource(images, np.array([0, -1]), class_names="ab")
    with pytest.raises(ConfigError, match="no images"):
        ArraySource(images[:0], np.zeros(0, int), class_names="ab")
