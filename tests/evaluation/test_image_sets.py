"""Images made elsewhere: in order, of one size, and clear errors for what is not."""

import io
import pathlib

import numpy as np
import pytest
from image_files import ImageFiles
from PIL import Image

from rar_jax.data import crops
from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError, ReferenceFileError
from rar_jax.evaluation.image_sets import open_image_set


def test_images_of_more_than_8_bits_are_refused(tmp_path: pathlib.Path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match=r"deep\.png cannot be read as an image \(mode I;16, more than 8 bits"):
        open_image_set(str(tmp_path)).read(0, 1)


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
    found = open_image_set(str(folder))
    assert found.num == 5 and found.name == str(folder)
    np.testing.assert_array_equal(found.read(0, 5), images)
    np.testing.assert_array_equal(found.read(3, 2), images[3:])

    Image.fromarray(images[0, ..., 0]).save(folder / "e.png")  # grey
    Image.fromarray(images[0]).convert("RGBA").save(folder / "f.png")
    found = open_image_set(str(folder))
    np.testing.assert_array_equal(found.read(5, 1)[0], np.repeat(images[0, ..., :1], 3, axis=-1))
    np.testing.assert_array_equal(found.read(6, 1)[0], images[0])


def test_folders_that_cannot_be_scored(tmp_path: pathlib.Path) -> None:
    images = write_images(tmp_path / "x.npz", 2)
    folder = tmp_path / "folder"
    save_images(folder, images, ["0.png", "1.png"])
    with Image.open(folder / "0.png") as image:
        image.resize((8, 16)).save(folder / "2.png")
    with pytest.raises(ConfigError, match=r"2\.png is 8x16 pixels, the first image 16x16"):
        open_image_set(str(folder)).read(0, 3)
    for content in (b"", b"hello", (folder / "0.png").read_bytes()[:60]):
        (folder / "1.png").write_bytes(content)
        with pytest.raises(ConfigError, match=r"1\.png cannot be read as an image") as caught:
            open_image_set(str(folder)).read(0, 2)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no images"):
        open_image_set(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="missing"):
        open_image_set(str(tmp_path / "missing"))
    with pytest.raises(ReferenceFileError, match=r"missing\.npz"):
        open_image_set(str(tmp_path / "missing.npz"))
    with pytest.raises(ConfigError, match=r"0\.png: give a folder"):
        open_image_set(str(folder / "0.png"))


def test_an_npz_is_read_in_any_order(tmp_path: pathlib.Path) -> None:
    images = write_images(tmp_path / "x.npz", 150)
    found = open_image_set(str(tmp_path / "x.npz"))
    assert found.num == 150
    for start, count in ((0, 60), (60, 60), (120, 30), (70, 20), (90, 10), (5, 1), (0, 150), (149, 1)):
        np.testing.assert_array_equal(found.read(start, count), images[start : start + count])
    resumed = open_image_set(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(resumed.read(100, 50), images[100:])


def test_a_source_is_its_training_images() -> None:
    found, source = open_image_set("digits"), load_source("digits", "train")
    assert found.num == len(source)
    np.testing.assert_array_equal(found.read(7, 5), source.gather(np.arange(7, 12))["images"])
    assert found.read(0, 2).shape == (2, 8, 8, 1) and found.read(0, 2).dtype == np.uint8


# ---------------------------------------------------------------- images of many sizes


@pytest.fixture
def many_sizes(tmp_path: pathlib.Path) -> pathlib.Path:
    """18 JPEGs of three classes in train/, and 2 in val/."""
    files = ImageFiles()
    files.write_folder(tmp_path / "data" / "train", files.image_set())
    files.write_folder(tmp_path / "data" / "val", files.image_set((1, 1, 0), seed=5))
    return tmp_path / "data"


def test_a_source_of_many_sizes_is_cropped_as_adm_does(many_sizes: pathlib.Path) -> None:
    found, images = open_image_set(f"folder:{many_sizes}", image_size=16), ImageFiles().image_set()
    assert found.num == 18
    for i, got in enumerate(found.read(4, 9), start=4):
        expected = crops.center_crop(Image.open(io.BytesIO(images[i][0])), size=16)
        np.testing.assert_array_equal(got, expected)
    assert open_image_set(f"folder:{many_sizes}", "heldout", image_size=16).num == 2


def test_the_crop_is_in_the_record(many_sizes: pathlib.Path) -> None:
    spec = f"folder:{many_sizes}"
    found = open_image_set(spec, image_size=16)
    assert found.name == f"{spec} (train), centre crop to 16"
    prints = [found.fingerprint(), open_image_set(spec, image_size=17).fingerprint()]
    prints.append(open_image_set(spec, "heldout", image_size=16).fingerprint())
    assert open_image_set(spec, image_size=16).fingerprint() == prints[0]
    first = many_sizes / "train" / ImageFiles.CLASSES[0]
    (first / f"{ImageFiles.CLASSES[0]}_003.JPEG").rename(first / f"{ImageFiles.CLASSES[0]}_103.JPEG")
    prints.append(open_image_set(spec, image_size=16).fingerprint())
    assert len(set(prints)) == 4


def test_an_image_that_cannot_be_decoded_is_named_and_not_replaced(many_sizes: pathlib.Path) -> None:
    path = many_sizes / "train" / ImageFiles.CLASSES[1] / f"{ImageFiles.CLASSES[1]}_002.JPEG"
    path.write_bytes(b"")
    found = open_image_set(f"folder:{many_sizes}", image_size=16)
    assert len(found.read(0, 9)) == 9
    with pytest.raises(ConfigError, match=rf"{path.stem}\.JPEG cannot be used \(0 bytes\): remove or replace it"):
        found.read(8, 3)


def test_image_size_is_asked_for_where_it_is_needed_and_only_there(many_sizes: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"images of many sizes: give image_size \(--image-size N\)"):
        open_image_set(f"folder:{many_sizes}")
    np.savez(many_sizes.parent / "x.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    for plain in (str(many_sizes), str(many_sizes.parent / "x.npz"), "digits"):
        with pytest.raises(ConfigError, match="is read as it is: leave --image-size out"):
            open_image_set(plain, image_size=16)
    with pytest.raises(ConfigError, match=r"give folder:PATH and --image-size N for ADM's centre crop"):
        open_image_set(str(many_sizes)).read(0, 5)


def test_a_mistyped_path_is_no_source(tmp_path: pathlib.Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere: there is no such file or folder, look for a mistyped path"):
        open_image_set(missing)
