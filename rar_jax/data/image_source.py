"""The base class of image sources, one in memory, and the view they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rar_jax.config import nearest, require
from rar_jax.errors import ConfigError

Split = Literal["train", "heldout"]
Batch = dict[str, np.ndarray]

CROPS = ("pad", "center", "ten", "random")


@dataclasses.dataclass(frozen=True)
class View:
    """Arguments of `load_source` on size and crop. None is the source's default."""

    image_size: int | None = None
    crop: str | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        require(self.image_size is None or self.image_size >= 1, f"image_size is {self.image_size}: at least 1")
        known = f"one of {', '.join(CROPS)}.{nearest(str(self.crop), CROPS)}"
        require(self.crop in (None, *CROPS), f"no crop '{self.crop}': {known}")
        require(self.channels in (None, 1, 3), f"channels is {self.channels}: images are decoded to 1 or 3")


class ImageSource:
    """Random access to labelled images; also a source for `grain.MapDataset.source`.

    A record is {"images": uint8 (h, w, c), "labels": int32, "ids": int64}. An id names an image of a split; a source of
    several crops has more records than images. Subclasses define `__len__` and `gather`.
    """

    random_views = False  # True: a record looks different each time it is drawn, and `gather` takes `draws`

    def __init__(self, *, image_shape: tuple[int, int, int], class_names: Sequence[str]) -> None:
        self.image_shape = image_shape
        self.class_names: tuple[str, ...] = tuple(class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_images(self) -> int:
        return len(self)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: array[0] for key, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> Batch:
        """Gather records at `indices` (int64 (b,)), with a leading axis."""
        raise NotImplementedError


class ArraySource(ImageSource):
    """Images in memory: uint8 (n, h, w, c), labels (n,) and ids (n,), by default 0..n-1. Raises: ConfigError."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str], ids: np.ndarray | None = None
    ) -> None:
        fits = images.ndim == 4 and images.dtype == np.uint8
        require(fits, f"images are {images.dtype} {images.shape}, not uint8 4-D")
        require(len(images) > 0, "the source holds no images")
        require(len(images) == len(labels), f"{len(images)} images but {len(labels)} labels")
        check_labels(labels, len(class_names))
        super().__init__(image_shape=images.shape[1:], class_names=class_names)
        ids = np.arange(len(images)) if ids is None else ids
        self._arrays: Batch = {"images": images, "labels": labels.astype(np.int32), "ids": ids.astype(np.int64)}

    def __len__(self) -> int:
        return len(self._arrays["labels"])

    def gather(self, indices: np.ndarray) -> Batch:
        return {key: array[indices] for key, array in self._arrays.items()}


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise ConfigError for a label outside [0, num_classes)."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise ConfigError(f"label {labels[bad[0]]} of record {bad[0]} is outside the {num_classes} classes")


def pad_images(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Zero-pad uint8 (n, h, w, c) to image_size; an odd rest goes below and right."""
    if image_size is None:
        return images
    height, width = images.shape[1:3]
    too_large = f"images are {height}x{width}, larger than image_size={image_size}: raise image_size"
    require(max(height, width) <= image_size, too_large)
    margins = [((image_size - n) // 2, (image_size - n + 1) // 2) for n in (height, width)]
    return np.pad(images, [(0, 0), *margins, (0, 0)])
