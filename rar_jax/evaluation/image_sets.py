"""Images made elsewhere, as evaluation reads them: a folder, an ADM file, or a source of data/."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource
from rar_jax.data.sources import ARRAYS, ImageSource, Split, load_source
from rar_jax.errors import ConfigError
from rar_jax.evaluation.reference import ImageFile, read_samples
from rar_jax.runs.manifest import file_sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class ImageSet(Protocol):
    """Images of one size in a fixed order. name: for messages and the record, with the crop. num: how many."""

    name: str
    num: int

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 (count, y, x, 1 or 3) of images start, start + 1, ..."""
        ...

    def fingerprint(self) -> str:
        """Differs where the images do, as far as that can be told without reading them."""
        ...


def open_images(spec: str, split: Split = "train", *, image_size: int | None = None) -> ImageSet:
    """FOLDER of image files (sorted by path, subfolders too), FILE.npz with `arr_0`, or a split of a source (folder:PATH).

    image_size: ADM's centre crop of a source's images to it. The others are read as they are, and so are sources
      whose images have one size.

    Raises: ConfigError if there is none, or image_size is missing or too much; ReferenceFileError for a damaged .npz.
    """
    path = pathlib.Path(spec)
    plain = path.is_dir() or path.suffix == ".npz" or spec.partition(":")[0] in ARRAYS
    require(
        not (plain and image_size is not None),
        f"{spec} is read as it is: leave --image-size out (images of many sizes in a folder a class: folder:PATH)",
    )
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz":
        return NpzImages(read_samples(path))
    if path.exists():
        raise ConfigError(f"{spec}: give a folder of images, a .npz, or a source such as folder:PATH or tfds:NAME")
    if ":" not in spec and spec not in ARRAYS:
        raise ConfigError(f"{spec}: there is no such file or folder, look for a mistyped path (a source is KIND:PATH)")
    if image_size is None:
        return SourceImages(f"{spec} ({split})", load_source(spec, split))
    source = load_source(spec, split, image_size=image_size, crop="center")
    return SourceImages(f"{spec} ({split}), centre crop to {image_size}", source)


class FolderImages:
    """Image files of a folder and its subfolders. Reading one of another size, or a damaged one, is a ConfigError."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.name: str = str(folder)
        self._paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        self.num: int = len(self._paths)
        if not self._paths:
            raise ConfigError(f"{folder} holds no images ({', '.join(SUFFIXES)}): give a folder that does")
        self._size: tuple[int, int] | None = None

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 (count, y, x, 3); grey images and palettes become RGB, transparency is dropped."""
        return np.stack([self._decode(path) for path in self._paths[start : start + count]])

    def fingerprint(self) -> str:
        """sha256 of names, sizes and times of the files."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def _decode(self, path: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would cut all that is above 255
                    raise ValueError(f"mode {image.mode}, more than 8 bits: scale it to 8 bits first")
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as an image ({error}): remove or replace it") from error
        self._size = self._size or pixels.shape[:2]
        if pixels.shape[:2] != self._size:
            raise ConfigError(
                f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first image {self._size[1]}x{self._size[0]}: "
                "crop all to one size first, the score depends on how; or, in a folder a class, give folder:PATH and "
                "--image-size N for ADM's centre crop"
            )
        return pixels


class NpzImages:
    """`arr_0` of an ADM file, read in order without holding it whole."""

    def __init__(self, file: ImageFile) -> None:
        self.name: str = str(file.path)
        self.num: int = file.num
        self._file = file
        self._rows: Iterator[np.ndarray] = iter(())
        self._at = -1

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 (count, y, x, 3). Going on where the last call ended costs nothing; else it reads from the beginning."""
        if start != self._at:
            self._rows = (image for batch in self._file.batches(64) for image in batch)
            for _ in range(start):
                next(self._rows)
        self._at = start + count
        return np.stack([next(self._rows) for _ in range(count)])

    def fingerprint(self) -> str:
        """sha256 of the file."""
        return file_sha256(pathlib.Path(self.name))


class SourceImages:
    """The images of a split of a source of data/. Reading one that cannot be decoded is a ConfigError."""

    def __init__(self, name: str, source: ImageSource) -> None:
        self.name: str = name
        self.num: int = len(source)
        self._source = source

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 (count, y, x, c)."""
        rows = self._source.gather(np.arange(start, start + count))
        if isinstance(self._source, EncodedSource) and rows["bad"].any():
            # The source would put another image in its place, which would count twice.
            bad = start + int(np.argmax(rows["bad"]))
            raise ConfigError(
                f"{self.name}: {self._source.name(bad)} cannot be used ({self._source.problem(bad)}): remove or replace it"
            )
        return rows["images"]

    def fingerprint(self) -> str:
        """The source's name, with the crop, and number: sources are fixed datasets. Of files, also sha256 of their names."""
        if not isinstance(self._source, EncodedSource):
            return f"{self.name} ({self.num})"
        names = hashlib.sha256()
        for image in range(self.num):
            names.update(f"{self._source.name(image)}\n".encode())
        return f"{self.name} ({self.num}, names {names.hexdigest()})"
