"""tfds: sources of images of many sizes, from sets that are really prepared (without TensorFlow)."""

from __future__ import annotations

import io
import pathlib
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError

SIZE, CLASSES = 16, ("n01440764", "n01443537", "n02085620")  # as `files` has them
Images = list[tuple[bytes, int, str]]


def prepare_tfds(folder: pathlib.Path, splits: dict[str, Images], classes: tuple[str, ...], **image: Any) -> None:
    """A set really prepared, called "tiny", without TensorFlow: its images are given as files, so nothing encodes them."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        # Or TFDS looks for the package that this class is in.
        url_infos: ClassVar = {}  # pyright: ignore[reportIncompatibleVariableOverride]

        def _info(self):
            label = tfds.features.ClassLabel(names=list(classes))
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(**image), "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {name: self._generate_examples(images) for name, images in splits.items()}

        def _generate_examples(self, images):
            for data, label, name in images:
                yield name, {"image": io.BytesIO(data), "label": label}

    tfds.disable_progress_bar()
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()


def test_tfds_of_many_sizes(files: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    train, val = files.image_set((7, 5, 6)), files.image_set((3, 2, 0), seed=500)
    files.write_folder(tmp_path / "folder" / "train", train)
    files.write_folder(tmp_path / "folder" / "val", val)
    prepare_tfds(tmp_path, {"train": train, "validation": val, "test": train[:1]}, CLASSES, encoding_format="jpeg")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    for split in ("train", "heldout"):
        folder: Any = load_source(f"folder:{tmp_path}/folder", split, image_size=SIZE, crop="ten")
        ours: Any = load_source("tfds:tiny", split, image_size=SIZE, crop="ten")
        assert (ours.num_images, ours.class_names) == (folder.num_images, CLASSES)
        # TFDS has an order of its own.
        places = {folder.read_image(i)[0]: i for i in range(folder.num_images)}
        order = np.array([places[ours.read_image(i)[0]] for i in range(ours.num_images)])
        assert len(set(order)) == len(order)
        expected = folder.gather((order[:, None] * 10 + np.arange(10)).ravel())
        found = ours.gather(np.arange(len(ours)))
        for key in ("images", "labels", "crops", "bad"):
            np.testing.assert_array_equal(found[key], expected[key])
    with pytest.raises(ConfigError, match="give image_size"):
        load_source("tfds:tiny", "train")


def test_tfds_of_one_size_can_be_cropped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images, padded or cropped: both whole, being square."""
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    images: Images = []
    for i, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        images.append((buffer.getvalue(), i % 2, f"{i}"))
    splits = {"train": images[:1], "test": images}
    prepare_tfds(tmp_path, splits, ("a", "b"), shape=(28, 28, 1), encoding_format="png")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    padded = load_source("tfds:tiny", "heldout")
    cropped = load_source("tfds:tiny", "heldout", image_size=28, crop="center")
    ten = load_source("tfds:tiny", "heldout", image_size=28, crop="ten", channels=3)
    assert (cropped.image_shape, len(ten), ten.num_images, padded.num_images) == ((28, 28, 1), 50, 5, 5)
    ours, theirs = cropped.gather(np.arange(5)), padded.gather(np.arange(5))
    for key in ("images", "labels", "ids"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert sorted(image.tobytes() for image in ours["images"]) == sorted(image.tobytes() for image in pixels)
    assert ten[7]["images"].shape == (28, 28, 3) and ten[17]["crops"] == 7
    wide = load_source("tfds:tiny", "heldout", image_size=32).gather(np.array([4, 2]))
    assert {key: (value.shape, value.dtype.name) for key, value in wide.items() if key != "bad"} == {
        "images": ((2, 32, 32, 1), "uint8"),
        "labels": ((2,), "int32"),
        "ids": ((2,), "int64"),
    }
    np.testing.assert_array_equal(wide["images"][:, 2:30, 2:30], theirs["images"][[4, 2]])
    assert not wide["images"][:, :2].any() and wide["ids"].tolist() == [4, 2]
    with pytest.raises(ConfigError, match="28x28, larger than image_size=20"):
        load_source("tfds:tiny", "heldout", image_size=20)
