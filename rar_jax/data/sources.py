"""Open a source of labelled images from its spec string.

A kind of source is one subclass of `ImageSource` and one line in `_KINDS`.
"""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rar_jax.config import nearest, require
from rar_jax.data.folder import FolderSource
from rar_jax.data.formats.array_record import ArrayRecordSource
from rar_jax.data.formats.parquet import ParquetSource
from rar_jax.data.formats.tfds import TfdsSource
from rar_jax.data.formats.webdataset import WebDatasetSource
from rar_jax.data.image_source import ArraySource, ImageSource, Split, View, pad_images
from rar_jax.data.splits import number_classes, read_class_names
from rar_jax.errors import ConfigError


def load_source(
    spec: str, split: Split, *, image_size: int | None = None, crop: str | None = None, channels: int | None = None
) -> ImageSource:
    """Open a source of images.

    Args:
      spec: one of SPECS: scikit-learn's 8x8 digits, MNIST's format, a prepared TFDS dataset, one folder per class,
        Hugging Face's Parquet layout, tar files, or records of `write_array_record`.
      split: "train", or "heldout" (t10k files, TFDS's "test", 360 of the digits, the container's own or 5 %).
      image_size: height and width. Images of one size are padded to it, or left if None; others need it.
      crop: "pad" (default for images of one size), "center" (default otherwise), "ten" or "random"; see EncodedSource.
      channels: 3 (default) or 1, for encoded images.

    Raises: ConfigError for a wrong spec, missing or corrupt files, or images larger than image_size.
    """
    kind, _, argument = spec.partition(":")
    require(split in ("train", "heldout"), f"split '{split}' is neither 'train' nor 'heldout'")
    if kind not in _KINDS:
        raise ConfigError(f"Unknown data source '{spec}'.{nearest(kind, _KINDS)}")
    require(bool(argument) == (kind != "digits"), f"source '{spec}': write one of {', '.join(SPECS)}")
    view, padded = View(image_size, crop, channels), "has images of one size, which are padded and not cropped"
    require(kind not in ARRAYS or crop in (None, "pad"), f"{spec} {padded}: leave crop='{crop}' out")
    return _KINDS[kind](argument, split, view)


def _open_digits(_: str, split: Split, view: View) -> ImageSource:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    ids = split_digits(bunch.target)[split]
    names = [str(name) for name in bunch.target_names]
    return ArraySource(pad_images(images[ids], view.image_size), bunch.target[ids], class_names=names, ids=ids)


def split_digits(labels: np.ndarray, *, heldout: int = 360) -> dict[str, np.ndarray]:
    """Return the fixed stratified split: ascending ids of "train" and "heldout".

    Each class contributes its share, rounded by largest remainder, in the order of a stream that NumPy has frozen.
    """
    counts = np.bincount(labels)
    share = counts * heldout / len(labels)
    take = np.floor(share).astype(int)
    most_short = np.argsort(take - share, kind="stable")[: heldout - take.sum()]
    take[most_short] += 1
    order = np.random.RandomState(0).permutation(len(labels))
    ids = np.concatenate([order[labels[order] == c][:k] for c, k in enumerate(take)])
    return {"train": np.setdiff1d(np.arange(len(labels)), ids), "heldout": np.sort(ids)}


def _open_idx(argument: str, split: Split, view: View) -> ImageSource:
    folder = pathlib.Path(argument).expanduser()
    hint = "Fashion-MNIST is Debian's dataset-fashion-mnist or tfds:fashion_mnist"
    require(folder.is_dir(), f"idx:{argument}: no such folder. {hint}")
    prefix = {"train": "train", "heldout": "t10k"}[split]
    images = read_idx(_find_idx(folder, f"{prefix}-images-idx3-ubyte"), ndim=3)[..., None]
    labels = read_idx(_find_idx(folder, f"{prefix}-labels-idx1-ubyte"), ndim=1)
    if (names := read_class_names(folder)) is None:
        names = number_classes(read_idx(_find_idx(folder, "train-labels-idx1-ubyte"), ndim=1).tolist())
    return ArraySource(pad_images(images, view.image_size), labels, class_names=names)


def _find_idx(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ConfigError(f"idx:{folder}: no file {name} or {name}.gz")


def read_idx(path: pathlib.Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or .gz. Raises: ConfigError if it is not whole."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is not a whole gzip file ({error}): download it again") from None
    header, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    begins = f"expected {magic.hex()} first, found {len(data)} bytes from {data[:4].hex()}"
    require(data[:4] == magic and len(data) >= header, f"{path} is no IDX file of {ndim} dimensions: {begins}")
    shape = [int(n) for n in np.frombuffer(data, ">u4", count=ndim, offset=4)]
    expected = header + math.prod(shape)
    whole = f"expected {expected} bytes for {shape}, found {len(data)}: download it again"
    require(len(data) == expected, f"{path}: {whole}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# Kinds whose images are arrays of one size: they are padded, the others are cropped.
ARRAYS = ("digits", "idx")
_KINDS: dict[str, Callable[[str, Split, View], ImageSource]] = {
    "digits": _open_digits,
    "idx": _open_idx,
    "tfds": TfdsSource,
    "folder": FolderSource,
    "parquet": ParquetSource,
    "webdataset": WebDatasetSource,
    "array_record": ArrayRecordSource,
}
_ARGUMENTS = {"digits": "", "idx": ":FOLDER", "tfds": ":NAME"}
SPECS = tuple(kind + _ARGUMENTS.get(kind, ":PATH") for kind in _KINDS)  # as they are written
