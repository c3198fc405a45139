"""Sets of images to score: a folder, an ADM .npz, or a source of data/."""

from __future__ import annotations

import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from rar_jax.data.encoded import EncodedSource
from rar_jax.data.sources import ARRAYS, ImageSource, Split, load_source
from rar_jax.errors import ConfigError, ReferenceFileError
from rar_jax.evaluation import npz
from rar_jax.runs.manifest import file_sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_MAX_SIDE = 4096  # pixels; the header of a .npz may claim any


def open_image_set(spec: str, split: Split = "train", *, image_size: int | None = None) -> ImageSet:
    """Open a FOLDER of image files, a FILE.npz, or a split of a source (folder:PATH).

    image_size: ADM's centre crop of a source's images to it. Folders, .npz files, and sources whose images have one
      size are read as they are.

    Raises: ConfigError if there is none, or image_size is missing or too much; ReferenceFileError for a damaged .npz.
    """
    path = pathlib.Path(spec)
    plain = path.is_dir() or path.suffix == ".npz" or spec.partition(":")[0] in ARRAYS
    if plain and image_size is not None:
        raise ConfigError(f"{spec} is read as it is: leave --image-size out (of many sizes: folder:PATH)")
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz":
        return NpzImages(path)
    if path.exists():
        raise ConfigError(f"{spec}: give a folder of images, a .npz, or a source such as folder:PATH or tfds:NAME")
    if ":" not in spec and spec not in ARRAYS:
        raise ConfigError(f"{spec}: there is no such file or folder, look for a mistyped path (a source is KIND:PATH)")
    crop = "" if image_size is None else f", centre crop to {image_size}"
    source = load_source(spec, split, image_size=image_size, crop="center" if crop else None)
    return SourceImages(f"{spec} ({split}){crop}", source)


class FolderImages:
    """Image files of a folder and its subfolders, in the order of their paths."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.name: str = str(folder)
        self._paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        self.num: int = len(self._paths)
        if not self._paths:
            raise ConfigError(f"{folder} holds no images ({', '.join(SUFFIXES)}): give a folder that does")
        self._size: tuple[int, ...] | None = None

    def read(self, start: int, count: int) -> np.ndarray:
        """Return uint8 (count, y, x, 3); Pillow converts each image to RGB."""
        return np.stack([self._decode(path) for path in self._paths[start : start + count]])

    def fingerprint(self) -> str:
        """Return the sha256 of names, sizes and times of the files."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def _decode(self, path: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip all that is above 255
                    raise ValueError(f"mode {image.mode}, more than 8 bits: scale it to 8 bits first")
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as an image ({error}): remove or replace it") from error
        self._size = self._size or pixels.shape
        if pixels.shape != self._size:
            (height, width, _), (first_height, first_width, _) = pixels.shape, self._size
            raise ConfigError(
                f"{path} is {width}x{height} pixels, the first image {first_width}x{first_height}: crop all to one "
                "size, or, in a folder a class, give folder:PATH and --image-size N for ADM's centre crop"
            )
        return pixels


class NpzImages:
    """`arr_0` (n, y, x, 3) uint8 of an ADM file. Only its header is read here.

    Raises: ReferenceFileError; also from `read`, since the checksum of a damaged file is only known at its end.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.name: str = str(path)
        with npz.open_npz(path) as archive, npz.open_array(archive, npz.IMAGES) as member:
            self.shape: tuple[int, ...] = member.shape
            shape = self.shape
            if member.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or member.fortran_order:
                raise ReferenceFileError(
                    f"{path}, key '{npz.IMAGES}' is {member.dtype} {shape}, expected uint8 (n, y, x, 3) in C order"
                )
        if min(shape) < 1 or max(shape[1:]) > _MAX_SIDE:
            raise ReferenceFileError(f"{path} has images {shape}: sides must be 1 to {_MAX_SIDE} pixels")
        self.num: int = shape[0]
        self._images: Iterator[np.ndarray] = iter(())
        self._next = -1

    def read(self, start: int, count: int) -> np.ndarray:
        """Return uint8 (count, y, x, 3). Out of order, it reads from the beginning."""
        if start != self._next:
            self._images = itertools.islice(self._iterate(), start, None)
        self._next = start + count
        return np.stack(list(itertools.islice(self._images, count)))

    def fingerprint(self) -> str:
        """Return the sha256 of the file."""
        return file_sha256(self.path)

    def _iterate(self) -> Iterator[np.ndarray]:
        with npz.open_npz(self.path) as archive, npz.open_array(archive, npz.IMAGES) as member:
            if member.shape != self.shape:
                raise ReferenceFileError(f"{self.path} changed: '{npz.IMAGES}' was {self.shape}, is {member.shape}")
            for _ in range(self.num):
                yield np.frombuffer(member.stream.read(math.prod(self.shape[1:])), np.uint8).reshape(self.shape[1:])


class SourceImages:
    """The images of a split of a source of data/."""

    def __init__(self, name: str, source: ImageSource) -> None:
        self.name: str = name
        self.num: int = len(source)
        self._source = source

    def read(self, start: int, count: int) -> np.ndarray:
        """Return uint8 (count, y, x, c)."""
        rows = self._source.gather(np.arange(start, start + count))
        if isinstance(self._source, EncodedSource) and rows["bad"].any():
            # The source would replace it by another image, which would count twice.
            bad = start + int(np.argmax(rows["bad"]))
            name, problem = self._source.name(bad), self._source.problem(bad)
            raise ConfigError(f"{self.name}: {name} cannot be used ({problem}): remove or replace it")
        return rows["images"]

    def fingerprint(self) -> str:
        """Return name, crop and number, and the sha256 of the names of files."""
        source = self._source
        names = [source.name(i) for i in range(self.num)] if isinstance(source, EncodedSource) else []
        return f"{self.name} ({self.num}, names {hashlib.sha256(repr(names).encode()).hexdigest()})"


# Images of one size in a fixed order. A fingerprint differs where the images do.
ImageSet = FolderImages | NpzImages | SourceImages
