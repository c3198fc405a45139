"""Base class of encoded images: read, decode, crop, and replace bad images.

A container format is a subclass with `_record` (bytes and label of a row) and `_name`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data import crops
from rar_jax.data.decode import decode_image
from rar_jax.data.image_source import Batch, ImageSource, Split, View, check_labels, pad_images
from rar_jax.data.splits import heldout_mask
from rar_jax.errors import ConfigError, DecodeError

# More bad images than both point to a broken disk, mount or copy.
MOST_BAD, MOST_BAD_SHARE = 100, 0.01


class Problems(list[tuple[str, str]]):
    """The first 1000 problems of a source as (name, reason), and the number of all."""

    KEPT: int = 1000
    total: int = 0

    def add(self, name: str, reason: str) -> None:
        self.total += 1
        if len(self) < self.KEPT:
            self.append((printable(name), reason))

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self[:5]) or "none"


class EncodedSource(ImageSource):
    """Images that are decoded on access.

    Views (`view.crop`, default "center"): "center" and "ten" as in data/crops.py; "random" is a random-resized crop and
    a flip with probability 1/2; "pad" pads images of at most image_size. With "ten", record i is crop i % 10 of image
    i // 10.

    A record that cannot be decoded is added to `problems` (each worker process has its own) and replaced by the next
    good image, of its class if labels are known without reading. "bad" bool (b,) marks such rows.

    Args:
      length: number of rows in the container. labels: ints (length,), or None if only `_record` knows them.
      problems: found while listing the source.
      hold_out: the split to take, if the container has no validation split: 5 % of each class are held out.

    Raises: ConfigError; so does `gather` if over 1 % and over 100 of the images read are bad, or none is good.
    """

    def __init__(
        self,
        spec: str,
        view: View,
        *,
        length: int,
        labels: np.ndarray | None,
        class_names: Sequence[str],
        problems: Problems | None = None,
        hold_out: Split | None = None,
    ) -> None:
        self.problems: Problems = problems or Problems()
        self.listed: tuple[tuple[str, str], ...] = tuple(self.problems)
        listed = f" ({self.problems.total} problems, the first: {self.problems})" if self.problems else ""
        require(length > 0, f"{spec} holds no images{listed}")
        if view.image_size is None:
            raise ConfigError(f"{spec} has images of many sizes: give image_size (--image-size N)")
        if labels is not None:
            assert len(labels) == length
            check_labels(labels, len(class_names))
        size, self._channels = view.image_size, view.channels or 3
        super().__init__(image_shape=(size, size, self._channels), class_names=class_names)
        self.spec: str = spec
        # The rows of this split.
        self._rows = np.arange(length)
        if hold_out:
            names = [os.fsencode(self._name(row)) for row in range(length)]
            mask = heldout_mask(np.zeros(length, int) if labels is None else labels, names)
            self._rows = np.flatnonzero(mask == (hold_out == "heldout"))
            require(len(self._rows) > 0, f"{spec}: no class has two images to hold one out: add images or a val split")
        # int32 (num_images,), or None if only reading an image tells its class.
        self.labels: np.ndarray | None = None if labels is None else labels[self._rows].astype(np.int32)
        self.crop: str = view.crop or "center"
        self.random_views: bool = self.crop == "random"
        self._views = crops.NUM_CROPS if self.crop == "ten" else 1
        self._read = 0
        self._bad: set[int] = set()
        # The last image and its `_read_good`: ten crops mostly follow one another.
        self._last: tuple[int, tuple[int, Any, int]] | None = None

    def _record(self, row: int) -> tuple[bytes, int]:
        """Return bytes and label (any if in `labels`). Raises: OSError, ValueError."""
        raise NotImplementedError

    def _name(self, row: int) -> str:
        raise NotImplementedError

    @property
    def num_images(self) -> int:
        return len(self._rows)

    def read_image(self, image: int) -> tuple[bytes, int]:
        """Encoded bytes and label of image 0..num_images-1. Raises: OSError, ValueError."""
        data, label = self._record(int(self._rows[image]))
        return data, int(self.labels[image]) if self.labels is not None else label

    def name(self, image: int) -> str:
        """Printable name of an image."""
        return printable(self._name(int(self._rows[image])))

    def problem(self, image: int) -> str | None:
        """Read and decode an image; return why it is bad, or None."""
        try:
            self.prepare(image)
        except (OSError, ValueError) as error:
            return reason_of(error)
        return None

    def __len__(self) -> int:
        return self.num_images * self._views

    def gather(self, indices: np.ndarray, *, draws: np.ndarray | None = None) -> Batch:
        """Gather records at `indices` (int64 (b,)).

        draws: uint64 (b,), all the randomness of crop="random"; default the indices.

        Returns: "images" uint8 (b, size, size, c), "labels" int32 (b,), "ids" of images int64 (b,), "bad" bool (b,),
          and with ten crops "crops" int16 (b,).
        """
        if (outside := indices[(indices < 0) | (indices >= len(self))]).size:
            raise ConfigError(f"{self.spec}: record {outside[0]} of {len(self)}")
        images_b, crops_b = np.divmod(indices, self._views)
        draws = indices.astype(np.uint64) if draws is None else draws
        out: Batch = {
            "images": np.empty((len(indices), *self.image_shape), np.uint8),
            "labels": np.empty(len(indices), np.int32),
            "ids": images_b.astype(np.int64),
            "bad": np.zeros(len(indices), bool),
        }
        # In storage order: crops of one image share a decode, rows of one chunk of a file share a read.
        for row in np.argsort(images_b, kind="stable"):
            image = int(images_b[row])
            if (last := self._last) is None or last[0] != image:
                self._last = last = image, self._read_good(image)
            used, pixels, label = last[1]
            out["images"][row] = self._cut(pixels, int(crops_b[row]), int(draws[row]))
            out["labels"][row], out["bad"][row] = label, used != image
        return out if self._views == 1 else {**out, "crops": crops_b.astype(np.int16)}

    def _cut(self, pixels: Any, crop: int, draw: int) -> np.ndarray:
        if self.crop == "ten":
            return crops.cut_one_of_ten(pixels, size=self.image_shape[0], crop=crop)
        if self.crop != "random":
            return pixels
        rng = np.random.Generator(np.random.Philox(key=draw))
        mirrored = rng.random() < 0.5
        out = crops.random_resized_crop(pixels, rng, size=self.image_shape[0])
        return crops.mirror(out) if mirrored else out

    def prepare(self, image: int) -> tuple[Any, int]:
        """Return what all views share (a Pillow image or pixels), and the label. Raises: OSError, ValueError."""
        data, label = self.read_image(image)
        if not 0 <= label < self.num_classes:
            raise DecodeError(f"label {label} is outside the {self.num_classes} classes")
        decoded, size = decode_image(data, channels=self._channels), self.image_shape[0]
        if self.crop == "random":
            return decoded, label
        if self.crop == "pad":
            return pad_images(crops.to_pixels(decoded)[None], size)[0], label
        return (crops.resize_for_ten if self.crop == "ten" else crops.center_crop)(decoded, size=size), label

    def _read_good(self, image: int) -> tuple[int, Any, int]:
        """Return the image or its replacement, and what `prepare` returns for it."""
        for candidate in itertools.chain([image], self._list_replacements(image)):
            if candidate in self._bad:
                continue
            self._read += 1
            try:
                return candidate, *self.prepare(candidate)
            except (OSError, ValueError) as error:
                self._bad.add(candidate)
                self.problems.add(self.name(candidate), reason_of(error))
            read, bad = min(self._read, self.num_images), len(self._bad)
            if bad > max(MOST_BAD, MOST_BAD_SHARE * read):
                share = f"{bad} of {read} images read are bad, more than {MOST_BAD_SHARE:.0%}"
                raise ConfigError(f"{self.spec}: {share}: {self.problems}; repair or remove them")
        raise ConfigError(f"{self.spec}: no image of {self.num_images} is good; the first: {self.problems}")

    def _list_replacements(self, image: int) -> Iterator[int]:
        """Yield the images of its class, then all that follow."""
        if self.labels is not None:
            members = np.flatnonzero(self.labels == self.labels[image])
            yield from np.roll(members, -np.searchsorted(members, image, side="right")).tolist()
        for step in range(1, self.num_images):
            yield (image + step) % self.num_images


def reason_of(error: Exception) -> str:
    """Return one line for an error."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(text.strip().split("\n")[0]) or type(error).__name__


def printable(name: str) -> str:
    """Escape what is not UTF-8 or not printable, so that a name is one line of text."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
