"""tfds:NAME, datasets prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rar_jax.config import nearest
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.image_source import Batch, ImageSource, Split, View, pad_images, padded_shape
from rar_jax.errors import ConfigError

# In this order; the labels of a "test" may be withheld (-1).
_HELDOUT_OF_MANY_SIZES = ("validation", "test")


def open_tfds(name: str, split: Split, view: View) -> ImageSource:
    """Open a prepared dataset.

    TFDS decodes images of one size that are not cropped; all others are decoded by us. The validation split is TFDS's
    "test", or "validation" where images have many sizes and there is one.

    Raises: ConfigError if the name is unknown, not prepared on this machine, or not labelled images.
    """
    try:
        import tensorflow_datasets as tfds  # here, because importing it takes a second
    except ImportError as error:
        raise ConfigError(f"tfds:{name} needs a package ({error}): pip install tensorflow-datasets") from None

    tfds_split = {"train": "train", "heldout": "test"}[split]
    try:
        builder: Any = tfds.builder(name)
        features = builder.info.features
        if features is None or not {"image", "label"} <= set(features):
            raise ConfigError(f"tfds:{name} has no 'image' and 'label': only labelled image datasets can be used")
        shape = features["image"].shape
        fixed = None not in shape and view.crop in (None, "pad")
        if not fixed and split == "heldout":
            tfds_split = next((s for s in _HELDOUT_OF_MANY_SIZES if s in builder.info.splits), "test")
        decoders = None if fixed else {"image": tfds.decode.SkipDecoding()}
        # Never download here: on a pod every process would, each to its own disk.
        data: Any = tfds.data_source(name, split=tfds_split, download=False, decoders=decoders)
    except tfds.core.DatasetNotFoundError:
        # Few names, so that the message stays one line.
        alike = [n for n in tfds.list_builders(with_community_datasets=False) if n[:3] == name[:3]]
        raise ConfigError(f"tfds:{name}: no such dataset in TFDS.{nearest(name, alike)}") from None
    except ConfigError:
        raise
    except (KeyError, ValueError, NotImplementedError, FileNotFoundError) as error:
        reason = str(error.args[0] if error.args else error).split("\n")[0]
        raise ConfigError(
            f"tfds:{name}: split '{tfds_split}' cannot be read ({reason}). Prepare it once in Python, where TensorFlow is "
            f"installed: tfds.builder('{name}', file_format='array_record').download_and_prepare()"
        ) from None
    names = tuple(features["label"].names)
    view = dataclasses.replace(view, channels=view.channels or shape[-1])
    return TfdsSource(data, shape, names, view) if fixed else TfdsEncodedSource(name, data, names, view)


class TfdsSource(ImageSource):
    """Images of one size, decoded by TFDS."""

    def __init__(self, data: Any, shape: tuple[int, int, int], class_names: tuple[str, ...], view: View) -> None:
        self._data, self._image_size = data, view.image_size
        super().__init__(image_shape=padded_shape(shape, view.image_size), class_names=class_names)

    def __len__(self) -> int:
        return len(self._data)

    def gather(self, indices: np.ndarray) -> Batch:
        records = [self._data[int(i)] for i in indices]
        images = pad_images(np.stack([r["image"] for r in records]), self._image_size)
        return {"images": images, "labels": np.array([r["label"] for r in records], np.int32), "ids": indices}


class TfdsEncodedSource(EncodedSource):
    """Images of any size, decoded by us. Labels are known only by reading."""

    def __init__(self, name: str, data: Any, class_names: tuple[str, ...], view: View) -> None:
        self._data = data
        super().__init__(f"tfds:{name}", view, length=len(data), labels=None, class_names=class_names)

    def _name(self, row: int) -> str:
        return f"record {row}"

    def _record(self, row: int) -> tuple[bytes, int]:
        record = self._data[row]
        return record["image"], int(record["label"])
