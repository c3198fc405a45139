"""The base of sources of encoded images: bytes by index in, views of one size out, and bad images dealt with.

A kind of container is a subclass with `_record` (an image's bytes and label) and `_name`. The rest is here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data import crops
from rar_jax.data.decode import open_image
from rar_jax.data.image_source import Batch, ImageSource, Record, View, check_labels, pad_images, padded_shape
from rar_jax.errors import ConfigError, DecodeError

# More bad images than both are no accident of the data, but a disk, a mount or a copy that broke off.
MOST_BAD, MOST_BAD_SHARE = 100, 0.01
# How many images of its own class a bad one may be replaced by, and among how many where labels are in the records.
_TRIES, _WINDOW = 20, 1000

# An image as far as all its views share it (a Pillow image, or pixels), and its label.
Prepared = tuple[Any, int]


class Problems:
    """What is wrong with a source's data: all are counted (`total`), the first 1000 kept as (record name, reason)."""

    KEPT = 1000

    def __init__(self) -> None:
        self.total: int = 0
        self.kept: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        self.total += 1
        if len(self.kept) < self.KEPT:
            self.kept.append((printable(name), reason))

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.kept)


class EncodedSource(ImageSource):
    """Images decoded as they are asked for.

    Views (`view.crop`, default "center"): "center" and "ten" as in data/crops.py; "random" a random-resized crop and a
    flip with probability 1/2; "pad" for images of at most image_size. With "ten" the source is ten times as long as it
    has images: record i is crop i % 10 of image i // 10, and "crops" int16 (b,) says so; "ids" is the image.

    A record that cannot be read or decoded is put on `problems` and replaced: by the next good image of its class
    (cyclic; the next 1000 are looked through where labels are known only by reading), else by the next good image,
    with that one's label. "bad" bool (b,) marks such rows. `problems` is this process's: workers have their own.

    Args:
      length: images.  labels: ints (length,), or None where `_record` alone knows them.
      problems: what was found wrong when the source was listed.

    Raises: ConfigError if image_size is missing, there are no images, or a label has no class. `gather` raises it when
    over 1 % and over 100 of the images read so far are bad, or none is good.
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
    ) -> None:
        self.problems: Problems = problems if problems is not None else Problems()
        self.listed: tuple[tuple[str, str], ...] = tuple(self.problems)
        listed = f" ({len(self.problems)} problems, the first: {first_of(self.problems)})" if self.problems else ""
        require(length > 0, f"{spec} holds no images{listed}")
        if view.image_size is None:
            raise ConfigError(f"{spec} has images of many sizes: give image_size (--image-size N), to crop them to")
        if labels is not None:
            require(len(labels) == length, f"{spec}: {length} images but {len(labels)} labels")
            check_labels(labels, len(class_names))
            labels = labels.astype(np.int32)
        size, self._channels = view.image_size, view.channels or 3
        super().__init__(image_shape=(size, size, self._channels), class_names=class_names)
        self.spec: str = spec
        self._length, self._labels = length, labels
        self.crop: str = view.crop or "center"
        self.random_views: bool = self.crop == "random"
        self._views = crops.NUM_CROPS if self.crop == "ten" else 1
        self._read = 0
        self._bad: set[int] = set()
        self._replaced_by: dict[int, int] = {}
        # The last image resized for ten crops, which mostly come one after another.
        self._last: tuple[int, Prepared] | None = None

    # ---- what a subclass says

    def _record(self, image: int) -> tuple[bytes, int]:
        """The encoded bytes and the label of an image. May raise OSError or ValueError: the image is then bad."""
        raise NotImplementedError

    def _name(self, image: int) -> str:
        raise NotImplementedError

    # ---- images

    @property
    def num_images(self) -> int:
        return self._length

    def encoded(self, image: int) -> bytes:
        """The bytes of image 0..num_images-1. Raises: OSError, ValueError."""
        return self._record(image)[0]

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (num_images,), classes of the images; None where they are known only by reading."""
        return self._labels

    def label(self, image: int) -> int:
        """Class of an image. Raises: OSError, ValueError where it is known only by reading."""
        return int(self._labels[image]) if self._labels is not None else self._record(image)[1]

    def name(self, image: int) -> str:
        """What a message calls an image, printable."""
        return printable(self._name(image))

    def problem(self, image: int) -> str | None:
        """Why an image is bad; None if it is good. Reads and decodes it, and remembers nothing."""
        try:
            self._prepare(image)
        except (OSError, ValueError) as error:
            return reason_of(error)
        return None

    # ---- records

    def __len__(self) -> int:
        return self._length * self._views

    def __getitem__(self, index: int) -> Record:
        require(0 <= index < len(self), f"{self.spec}: record {index} of {len(self)}")
        return {key: array[0] for key, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray, *, draws: np.ndarray | None = None) -> Batch:
        """Records at `indices` (int64 (b,)).

        draws: uint64 (b,), all the randomness of crop="random"; default the indices, so a record always looks alike.

        Returns: "images" uint8 (b, size, size, c), "labels" int32 (b,), "ids" int64 (b,), "bad" bool (b,), and with ten
        crops "crops" int16 (b,).
        """
        images_b, crops_b = np.divmod(indices, self._views)
        draws = indices.astype(np.uint64) if draws is None else draws
        out: Batch = {
            "images": np.empty((len(indices), *self.image_shape), np.uint8),
            "labels": np.empty(len(indices), np.int32),
            "ids": images_b.astype(np.int64),
            "bad": np.zeros(len(indices), bool),
        }
        # In the order of the data: crops of one image share a decode, rows of one chunk of a file a read.
        for row in np.argsort(images_b, kind="stable"):
            image = int(images_b[row])
            used, (pixels, label) = self._good(image)
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
        return crops.flip(out) if mirrored else out

    def _prepare(self, image: int) -> Prepared:
        """Reads and decodes an image. Raises: OSError, ValueError."""
        data, label = self._record(image)
        if not 0 <= label < self.num_classes:
            raise DecodeError(f"label {label} is outside the {self.num_classes} classes")
        decoded, size = open_image(data, channels=self._channels), self.image_shape[0]
        if self.crop == "random":
            return decoded, label
        if self.crop == "pad":
            pixels = np.asarray(decoded).reshape(decoded.height, decoded.width, self._channels)
            padded_shape(pixels.shape, size)
            return pad_images(pixels[None], size)[0], label
        return (crops.resize_for_ten if self.crop == "ten" else crops.center_crop)(decoded, size=size), label

    # ---- bad images

    def _good(self, image: int) -> tuple[int, Prepared]:
        """The image, or the one that replaces it, and what `_prepare` gives for that."""
        first = self._replaced_by.get(image, image)
        for candidate in itertools.chain([first], self._others(image)):
            if candidate not in self._bad and (prepared := self._try(candidate)) is not None:
                if candidate != image:
                    self._replaced_by[image] = candidate
                return candidate, prepared
        raise ConfigError(f"{self.spec}: no image of {self._length} is good; the first: {first_of(self.problems)}")

    def _try(self, image: int) -> Prepared | None:
        """`_prepare`, or None for a bad image, which is noted."""
        last = self._last
        if last is not None and last[0] == image:
            return last[1]
        self._read += 1
        try:
            prepared = self._prepare(image)
        except (OSError, ValueError) as error:
            self._bad.add(image)
            self.problems.add(self._name(image), reason_of(error))
            self._refuse_many()
            return None
        if self.crop == "ten":
            self._last = (image, prepared)
        return prepared

    def _refuse_many(self) -> None:
        read, bad = min(self._read, self._length), len(self._bad)
        if bad > MOST_BAD and bad > MOST_BAD_SHARE * read:
            names = "; ".join(f"{self.name(i)}: {self.problem(i)}" for i in itertools.islice(sorted(self._bad), 5))
            raise ConfigError(
                f"{self.spec}: {bad} of {read} images read cannot be used, more than {MOST_BAD_SHARE:.0%}: {names}; "
                "mend or remove them"
            )

    def _others(self, image: int) -> Iterator[int]:
        """What may replace an image, in order: some of its class that follow, then all that follow."""
        try:
            label = self.label(image)
        except (OSError, ValueError):
            label = -1
        yield from itertools.islice(self._of_class(label, after=image), _TRIES)
        for step in range(1, self._length):
            yield (image + step) % self._length

    def _of_class(self, label: int, *, after: int) -> Iterable[int]:
        if self._labels is not None:
            members = np.flatnonzero(self._labels == label)
            at = np.searchsorted(members, after, side="right")
            yield from (int(i) for i in np.roll(members, -at) if i != after)
            return
        for step in range(1, min(_WINDOW, self._length)):
            other = (after + step) % self._length
            try:
                found = self.label(other)
            except (OSError, ValueError):
                continue
            if found == label:
                yield other


def scan(source: ImageSource) -> Iterator[tuple[str, str]]:
    """Reads and decodes every image of a source, and yields (name, reason) for what is wrong: first what was found when
    it was listed, then image by image. Nothing is replaced and no number of problems is too many."""
    if isinstance(source, EncodedSource):
        yield from source.listed
        for image in range(source.num_images):
            if (reason := source.problem(image)) is not None:
                yield source.name(image), reason


def first_of(problems: Problems, count: int = 5) -> str:
    """The first problems in one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in problems.kept[:count]) or "none"


def reason_of(error: Exception) -> str:
    """One line for an error."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(text.strip().split("\n")[0]) or type(error).__name__


def printable(name: str) -> str:
    """A name as UTF-8 text of one line: other bytes, and characters that move the cursor, are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
