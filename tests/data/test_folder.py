"""folder: sources, and what every source of encoded images does: views, bad images, the share that is held out."""

from __future__ import annotations

import collections
import copy
import hashlib
import io
import pathlib
from typing import Any

import numpy as np
import pytest
from image_files import find_problems
from PIL import Image

from rar_jax.data import crops, encoded, folder
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError

SIZE, CLASSES = 16, ("n01440764", "n01443537", "n02085620")  # as `files` has them


def open_folder(path: pathlib.Path, split: str = "train", **view) -> EncodedSource:
    source = load_source(f"folder:{path}", split, **{"image_size": SIZE, **view})  # pyright: ignore[reportArgumentType]
    assert isinstance(source, EncodedSource)
    return source


def names(source: EncodedSource) -> list[str]:
    return [source.name(i) for i in range(source.num_images)]


def test_a_folder_holds_a_zoo(files: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that people's folders hold, in one: each thing is read, or listed, or hidden on purpose."""
    files.write_zoo(tmp_path / "train")
    good = files.jpeg(77)

    def open_file(path: str, *args: Any) -> Any:
        if path.endswith("secret.jpg"):
            raise PermissionError(13, "Permission denied")  # the tests may be root, whom nothing is denied
        return open(path, *args)

    monkeypatch.setattr(folder, "open", open_file, raising=False)
    (tmp_path / "val").mkdir()
    files.write_folder(tmp_path / "val", files.image_set((0, 1, 0), seed=5))

    source = open_folder(tmp_path)
    assert source.class_names == (*CLASSES, "n09999999")
    n0 = CLASSES[0]
    assert names(source) == [
        f"{n0}/caf\\xe9.jpg",
        f"{n0}/deeper/still/a.png",
        f"{n0}/empty.jpg",
        f"{n0}/folder.jpg/inside.jpeg",
        f"{n0}/linked.jpg",
        f"{n0}/{n0}_000.JPEG",
        f"{n0}/{n0}_001.JPEG",
        f"{n0}/{n0}_002.JPEG",
        f"{n0}/new\\nline.jpg",
        f"{n0}/page.png",
        f"{n0}/secret.jpg",
        f"{CLASSES[1]}/{CLASSES[1]}_000.JPEG",
        f"{CLASSES[1]}/{CLASSES[1]}_001.JPEG",
        "n09999999/still/a.png",
    ]
    listed = {
        "stray.jpg": "not in a class folder",
        f"{n0}/README.md": "not an image by its suffix",
        f"{n0}/circle": "a link to a folder, not followed: it may be circular",
        f"{n0}/dangling.jpg": "a dangling link",
        f"{n0}/pipe.jpg": "not a file",
        CLASSES[2]: "a class without images",
    }
    assert dict(source.problems) == listed and len(source.problems) == len(listed)
    bad = {
        f"{n0}/empty.jpg": "0 bytes",
        f"{n0}/page.png": "not an image (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM): begins with b'<html>'",
        f"{n0}/secret.jpg": "Permission denied",
    }
    assert find_problems(source) == listed | bad
    batch = source.gather(np.arange(14))
    assert dict(source.problems) == listed | bad
    np.testing.assert_array_equal(batch["labels"], [0] * 11 + [1] * 2 + [3])
    np.testing.assert_array_equal(np.flatnonzero(batch["bad"]), [2, 9, 10])
    expected = crops.center_crop(Image.open(io.BytesIO(good)), size=SIZE)
    for row in (0, 1, 3, 8, 13):
        np.testing.assert_array_equal(batch["images"][row], expected)
    heldout = open_folder(tmp_path, "heldout")
    assert (names(heldout), heldout.class_names) == ([f"{CLASSES[1]}/{CLASSES[1]}_000.JPEG"], source.class_names)
    assert heldout[0]["labels"] == 1


def test_center_view_and_its_record(files: Any, tmp_path: pathlib.Path) -> None:
    images = files.image_set()
    files.write_folder(tmp_path / "train", images)
    files.write_folder(tmp_path / "test", images[:3])
    source = open_folder(tmp_path)
    assert (len(source), source.num_images, source.image_shape, source.crop) == (18, 18, (SIZE, SIZE, 3), "center")
    order = np.array([17, 3, 3, 0, 9])
    batch = source.gather(order)
    for row, index in enumerate(order):
        expected = crops.center_crop(Image.open(io.BytesIO(images[index][0])), size=SIZE)
        np.testing.assert_array_equal(batch["images"][row], expected)
        assert (batch["labels"][row], batch["ids"][row]) == (images[index][1], index)
        assert source.read_image(int(index))[0] == images[index][0]
    assert {k: v.dtype.name for k, v in batch.items()} == dict(images="uint8", labels="int32", ids="int64", bad="bool")
    np.testing.assert_array_equal(source[9]["images"], batch["images"][4])
    grey = open_folder(tmp_path, channels=1)
    expected = crops.center_crop(Image.open(io.BytesIO(images[9][0])).convert("L"), size=SIZE)
    np.testing.assert_array_equal(grey[9]["images"], expected)
    with pytest.raises(ConfigError, match="record 18 of 18"):
        source[18]


def test_ten_views(files: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = files.image_set()
    files.write_folder(tmp_path / "train", images)
    source = open_folder(tmp_path, crop="ten")
    assert (len(source), source.num_images) == (150, 15)  # of 5, 6 and 7 images one each is held out
    decoded = collections.Counter()
    read = source.read_image
    monkeypatch.setattr(source, "read_image", lambda image: (decoded.update([image]), read(image))[1])
    batch = source.gather(np.arange(30))
    assert decoded == {0: 1, 1: 1, 2: 1}, "crops that follow one another decode once"
    np.testing.assert_array_equal(batch["ids"], np.repeat(np.arange(3), 10))
    np.testing.assert_array_equal(batch["crops"], np.tile(np.arange(10), 3))
    assert batch["crops"].dtype == np.int16
    for image in range(3):
        resized = crops.resize_for_ten(Image.open(io.BytesIO(source.read_image(image)[0])), size=SIZE)
        expected = [crops.cut_one_of_ten(resized, size=SIZE, crop=crop) for crop in range(10)]
        np.testing.assert_array_equal(batch["images"][10 * image : 10 * image + 10], expected)
    np.testing.assert_array_equal(source.gather(np.array([27, 4]))["images"], batch["images"][[27, 4]])


def test_the_train_folder_of_imagenet_is_all_for_training(files: Any, tmp_path: pathlib.Path) -> None:
    """`--source folder:imagenet/train` holds nothing back that val is there for; without a val a share is."""
    files.write_folder(tmp_path / "train", files.image_set())
    for split, count in (("train", 15), ("heldout", 3)):
        assert open_folder(tmp_path / "train", split).num_images == count
    files.write_folder(tmp_path / "val", files.image_set((1, 1, 1), seed=5))
    for path in (tmp_path / "train", tmp_path):
        train, heldout = (open_folder(path, split) for split in ("train", "heldout"))
        assert (train.num_images, heldout.num_images) == (18, 3)
        assert (
            train.read_image(0)[0] == files.image_set()[0][0]
            and heldout.read_image(0)[0] == files.image_set(seed=5)[0][0]
        )


def test_random_views_are_functions_of_their_draw(files: Any, tmp_path: pathlib.Path) -> None:
    files.write_folder(tmp_path / "train", files.image_set())
    source = open_folder(tmp_path, crop="random")
    assert source.random_views and not open_folder(tmp_path).random_views
    draws = np.arange(40, dtype=np.uint64) * 1_000_003
    one = source.gather(np.full(40, 3), draws=draws)
    again = source.gather(np.full(40, 3), draws=draws[::-1])
    np.testing.assert_array_equal(one["images"], again["images"][::-1])
    assert len({image.tobytes() for image in one["images"]}) == 40
    np.testing.assert_array_equal(source[5]["images"], source.gather(np.array([2, 5]))["images"][1])
    # By hand: the flip is drawn first, then the box.
    image = Image.open(io.BytesIO(source.read_image(3)[0]))
    flipped = 0
    for row, draw in enumerate(draws):
        rng = np.random.Generator(np.random.Philox(key=int(draw)))
        mirrored = rng.random() < 0.5
        view = crops.random_resized_crop(image, rng, size=SIZE)
        np.testing.assert_array_equal(one["images"][row], view[:, ::-1] if mirrored else view)
        flipped += mirrored
    assert 10 < flipped < 30


def test_padded_view(files: Any, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(pixels).save(root / "0.png")
    Image.fromarray(np.zeros((5, SIZE + 1, 3), np.uint8)).save(root / "1.png")
    Image.fromarray(pixels).save(root / "2.png")
    (tmp_path / "val" / "a").mkdir(parents=True)
    source = open_folder(tmp_path, crop="pad")
    batch = source.gather(np.arange(3))
    np.testing.assert_array_equal(batch["images"][0, 2:14, 3:12], pixels)
    assert batch["images"][0].sum() == pixels.sum()
    assert dict(source.problems) == {"a/1.png": f"images are 5x17, larger than image_size={SIZE}: raise image_size"}
    np.testing.assert_array_equal(batch["bad"], [False, True, False])


def test_heldout_share_is_of_each_class_and_by_name(files: Any, tmp_path: pathlib.Path) -> None:
    files.write_folder(tmp_path, files.image_set((40, 1, 2)))
    train, heldout = open_folder(tmp_path), open_folder(tmp_path, "heldout")
    labels = [s.labels for s in (train, heldout)]
    assert [np.bincount(part, minlength=3).tolist() for part in labels] == [[38, 1, 1], [2, 0, 1]]
    assert not set(names(train)) & set(names(heldout)) and train.class_names == heldout.class_names == CLASSES
    everything = sorted(names(train) + names(heldout))
    assert len(everything) == 43

    def place(name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

    first = sorted((n for n in everything if n.startswith(CLASSES[0])), key=place)[:2]
    assert sorted(first) == names(heldout)[:2]


def test_bad_images_are_replaced_within_their_class(files: Any, tmp_path: pathlib.Path) -> None:
    images = files.image_set((5, 2, 3))
    images = [(b"broken" if i in (1, 2, 5, 6) else data, label, name) for i, (data, label, name) in enumerate(images)]
    files.write_folder(tmp_path / "train", images)
    files.write_folder(tmp_path / "val", images[:1])
    source = open_folder(tmp_path, crop="ten")
    batch = source.gather(np.arange(100))
    image = batch["images"].reshape(10, 10, SIZE, SIZE, 3)
    np.testing.assert_array_equal(batch["bad"].reshape(10, 10)[:, 0], [i in (1, 2, 5, 6) for i in range(10)])
    np.testing.assert_array_equal(batch["ids"], np.arange(100) // 10)
    for bad, other in ((1, 3), (2, 3), (5, 7), (6, 7)):  # of class 1 none is good
        np.testing.assert_array_equal(image[bad], image[other])
        assert batch["labels"][10 * bad] == images[other][1]
    # Whatever was read before, the same replaces it.
    other = copy.deepcopy(open_folder(tmp_path, crop="ten")).gather(np.array([50, 13]))
    np.testing.assert_array_equal(other["images"], batch["images"][[50, 13]])
    assert len(source.problems) == 4, "once each"
    source.gather(np.arange(100))
    assert len(source.problems) == 4


def test_many_bad_images_end_the_run(files: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    for i in range(400):
        (root / f"{i:03d}.jpg").write_bytes(files.jpeg(0) if i >= 101 else b"")
    (tmp_path / "val" / "a").mkdir(parents=True)
    source = open_folder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"101 of 1.. images read are bad, more than 1%: a/000.jpg: 0 bytes; a/001"
    ) as error:
        source.gather(np.arange(400))
    assert "a/004.jpg" in str(error.value) and "a/005.jpg" not in str(error.value) and "\n" not in str(error.value)
    assert len(find_problems(open_folder(tmp_path))) == 101
    # 100 are still suffered, however few are read; and of more, 1 %.
    (root / "000.jpg").write_bytes(files.jpeg(0))
    batch = open_folder(tmp_path).gather(np.arange(400))
    assert batch["bad"].sum() == 100
    monkeypatch.setattr(encoded.Problems, "KEPT", 7)
    source = open_folder(tmp_path)
    source.gather(np.arange(400))
    assert (source.problems.total, len(source.problems)) == (100, 7)


def test_no_good_image_at_all(files: Any, tmp_path: pathlib.Path) -> None:
    files.write_folder(tmp_path / "train", [(b"", 0, "x"), (b"no", 0, "y")])
    with pytest.raises(ConfigError, match=r"no image of 1 is good; the first: .*: (0 bytes|not an image)"):
        open_folder(tmp_path).gather(np.array([0]))


def test_a_source_goes_to_another_process(files: Any, tmp_path: pathlib.Path) -> None:
    files.write_folder(tmp_path, files.image_set())
    source = open_folder(tmp_path)
    there = copy.deepcopy(source)
    np.testing.assert_array_equal(there.gather(np.arange(9))["images"], source.gather(np.arange(9))["images"])


def test_wrong_folders_are_refused(files: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no images: put them into it, or into one folder per class"):
        open_folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no images \(2 problems, the first: a/x.txt: not an image"):
        open_folder(tmp_path)
    files.write_folder(tmp_path, files.image_set())
    with pytest.raises(ConfigError, match="give image_size"):
        open_folder(tmp_path, image_size=None)
    with pytest.raises(ConfigError, match=r"no crop 'centre'.*Did you mean 'center'"):
        open_folder(tmp_path, crop="centre")
    with pytest.raises(ConfigError, match="channels is 4"):
        open_folder(tmp_path, channels=4)
    files.write_folder(tmp_path / "both" / "train", files.image_set((2, 0, 0)))
    files.write_folder(tmp_path / "both" / "validation", files.image_set((1, 1, 0)))
    with pytest.raises(ConfigError, match=f"{CLASSES[1]} of .*validation is no class of .*train"):
        open_folder(tmp_path / "both", "heldout")
    (tmp_path / "flat" / "train" / "a").mkdir(parents=True)
    (tmp_path / "flat" / "train" / "a" / "0.jpg").write_bytes(files.jpeg(0))
    with pytest.raises(ConfigError, match="no class has two images to hold one out"):
        open_folder(tmp_path / "flat", "heldout")
    (tmp_path / "flat" / "val").mkdir()
    (tmp_path / "flat" / "val" / "0.jpg").write_bytes(files.jpeg(0))
    with pytest.raises(ConfigError, match=r"an image without a class folder of .*val is no class of .*train"):
        open_folder(tmp_path / "flat", "heldout")


def test_images_without_class_folders_are_one_class(files: Any, tmp_path: pathlib.Path) -> None:
    """Called like their folder; what is no image among them is told."""
    root = tmp_path / "holiday"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02d}.jpg").write_bytes(files.jpeg(i))
    (root / "notes.txt").write_text("x")
    (root / ".DS_Store").write_bytes(b"x")
    train, heldout = open_folder(root), open_folder(root, "heldout")
    assert train.class_names == heldout.class_names == ("holiday",)
    assert (len(train), len(heldout)) == (38, 2)  # 5 %
    assert sorted(names(train) + names(heldout)) == [f"{i:02d}.jpg" for i in range(40)]
    assert dict(train.problems) == {"notes.txt": "not an image by its suffix"}
    batch = train.gather(np.arange(38))
    np.testing.assert_array_equal(batch["labels"], np.zeros(38))
    expected = crops.center_crop(Image.open(root / names(train)[7]), size=SIZE)
    np.testing.assert_array_equal(batch["images"][7], expected)
    (root / "beach").mkdir()  # with one class folder the others are in none, and told
    (root / "beach" / "a.jpg").write_bytes(files.jpeg(50))
    assert open_folder(root).class_names == ("beach",)
    assert dict(open_folder(root).problems)["07.jpg"] == "not in a class folder"


def test_a_class_may_be_called_train(files: Any, tmp_path: pathlib.Path) -> None:
    for name in ("train", "bus"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(files.jpeg(i))
    source = open_folder(tmp_path)
    assert (source.class_names, len(source)) == (("bus", "train"), 4)
