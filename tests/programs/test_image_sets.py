"""Images made elsewhere: in order, of one size, and clear errors for what is not."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from rar_jax.config import ConfigError
from rar_jax.data.sources import load_source
from rar_jax.evaluation.reference import ReferenceFileError
from rar_jax.programs.image_sets import open_images


def test_images_of_more_than_8_bits_are_refused(tmp_path: pathlib.Path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match=r"deep\.png cannot be read as an image \(mode I;16, more than 8 bits"):
        open_images(str(tmp_path)).read(0, 1)


def write_images(path: pathlib.Path, num: int) -> np.ndarray:
    """An ADM .npz of random pixels."""
    images = np.random.default_rng(0).integers(0, 256, (num, 16, 16, 3), np.uint8)
    np.savez(path, arr_0=images)
    return images


# ---------------------------------------------------------------- images made elsewhere


def save_images(folder: pathlib.Path, images: np.ndarray, names: list[str]) -> None:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def test_a_folder_is_read_in_order(tmp_path: pathlib.Path) -> None:
    images = write_images(tmp_path / "x.npz", 5)
    folder = tmp_path / "folder"
    save_images(folder, images, ["a/1.png", "a/2.PNG", "b.png", "c/0.bmp", "d.png"])
    (folder / "notes.txt").write_text("not an image")
    found = open_images(str(folder))
    assert found.num == 5 and found.name == str(folder)
    np.testing.assert_array_equal(found.read(0, 5), images)
    np.testing.assert_array_equal(found.read(3, 2), images[3:])

    Image.fromarray(images[0, ..., 0]).save(folder / "e.png")  # grey
    Image.fromarray(images[0]).convert("RGBA").save(folder / "f.png")
    found = open_images(str(folder))
    np.testing.assert_array_equal(found.read(5, 1)[0], np.repeat(images[0, ..., :1], 3, axis=-1))
    np.testing.assert_array_equal(found.read(6, 1)[0], images[0])


def test_folders_that_cannot_be_scored(tmp_path: pathlib.Path) -> None:
    images = write_images(tmp_path / "x.npz", 2)
    folder = tmp_path / "folder"
    save_images(folder, images, ["0.png", "1.png"])
    with Image.open(folder / "0.png") as image:
        image.resize((8, 16)).save(folder / "2.png")
    with pytest.raises(ConfigError, match=r"2\.png is 8x16 pixels, the first image 16x16"):
        open_images(str(folder)).read(0, 3)
    for content in (b"", b"hello", (folder / "0.png").read_bytes()[:60]):
        (folder / "1.png").write_bytes(content)
        with pytest.raises(ConfigError, match=r"1\.png cannot be read as an image") as caught:
            open_images(str(folder)).read(0, 2)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no images"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="missing"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(ReferenceFileError, match=r"missing\.npz"):
        open_images(str(tmp_path / "missing.npz"))
    with pytest.raises(ConfigError, match=r"0\.png: give a folder"):
        open_images(str(folder / "0.png"))


def test_an_npz_is_read_in_any_order(tmp_path: pathlib.Path) -> None:
    images = write_images(tmp_path / "x.npz", 150)
    found = open_images(str(tmp_path / "x.npz"))
    assert found.num == 150
    for start, count in ((0, 60), (60, 60), (120, 30), (70, 20), (90, 10), (5, 1), (0, 150), (149, 1)):
        np.testing.assert_array_equal(found.read(start, count), images[start : start + count])
    resumed = open_images(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(resumed.read(100, 50), images[100:])


def test_a_source_is_its_training_images() -> None:
    found, source = open_images("digits"), load_source("digits", "train")
    assert found.num == len(source)
    np.testing.assert_array_equal(found.read(7, 5), source.gather(np.arange(7, 12))["images"])
    assert found.read(0, 2).shape == (2, 8, 8, 1) and found.read(0, 2).dtype == np.uint8
