"""tfds:NAME, datasets prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rar_jax.config import nearest, require
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.image_source import Split, View, pad_images
from rar_jax.errors import ConfigError


class TfdsSource(EncodedSource):
    """A prepared dataset of labelled images, whose labels are known only by reading. Raises: ConfigError.

    The validation split is TFDS's "test", or "validation" where images are cropped and there is one. Images of one size
    are padded by default.
    """

    def __init__(self, name: str, split: Split, view: View) -> None:
        try:
            import tensorflow_datasets as tfds  # here, because importing it takes a second
        except ImportError as error:
            raise ConfigError(f"tfds:{name} needs a package ({error}): pip install tensorflow-datasets") from None
        try:
            builder: Any = tfds.builder(name)
        except tfds.core.DatasetNotFoundError:
            known = tfds.list_builders(with_community_datasets=False)
            raise ConfigError(f"tfds:{name}: no such dataset in TFDS.{nearest(name, known)}") from None
        features = builder.info.features
        labelled = {"image", "label"} <= set(features or ())
        require(labelled, f"tfds:{name} has no 'image' and 'label': only labelled image datasets can be used")
        shape, tfds_split = features["image"].shape, {"train": "train", "heldout": "test"}[split]
        if None not in shape and view.crop in (None, "pad"):
            size = view.image_size or max(shape[:2])
            pad_images(np.empty((0, *shape), np.uint8), size)  # raises if they are larger
            view = dataclasses.replace(view, crop="pad", image_size=size)
        elif split == "heldout":
            # ImageNet's "test" has no labels.
            tfds_split = "validation" if "validation" in builder.info.splits else "test"
        try:
            # Never download here: on a pod every process would, each to its own disk.
            decoders: Any = {"image": tfds.decode.SkipDecoding()}
            self._data: Any = tfds.data_source(name, split=tfds_split, download=False, decoders=decoders)
        except (KeyError, ValueError, NotImplementedError, FileNotFoundError) as error:
            reason = str(error.args[0] if error.args else error).split("\n")[0]
            raise ConfigError(
                f"tfds:{name}: split '{tfds_split}' cannot be read ({reason}). Prepare it once, where TensorFlow is: "
                f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
            ) from None
        view = dataclasses.replace(view, channels=view.channels or shape[-1])
        names = tuple(features["label"].names)
        super().__init__(f"tfds:{name}", view, length=len(self._data), labels=None, class_names=names)

    def _name(self, row: int) -> str:
        return f"record {row}"

    def _record(self, row: int) -> tuple[bytes, int]:
        record = self._data[row]
        return record["image"], int(record["label"])
