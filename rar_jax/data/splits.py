"""Which images of a data set are held out: by the names of its files, or else a fixed share of each class."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from rar_jax.data.image_source import Split
from rar_jax.errors import ConfigError

HELDOUT_SHARE = 0.05

# In this order, where there are several: the labels of a "test" are often withheld (ImageNet's are -1).
HELDOUT_NAMES = ("val", "validation", "valid", "heldout", "test")
_TRAIN = re.compile(r"(?:^|[^a-z])train(?:ing)?(?![a-z])")
_HELDOUT = tuple(re.compile(rf"(?:^|[^a-z]){name}(?![a-z])") for name in HELDOUT_NAMES)


def heldout_mask(labels: np.ndarray, names: Sequence[bytes]) -> np.ndarray:
    """Which images to hold out where the data does not say, bool (n,): 5 % of each class, of two or more at least one.

    A function of the names alone, the least of their hashes: the order of files and the machine do not matter, and few
    change sides when images are added.

    Args:
      labels: ints (n,).  names: of the images, (n,).
    """
    hashes = np.array([int.from_bytes(hashlib.blake2b(n, digest_size=8).digest(), "little") for n in names], np.uint64)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) >= 2:
            count = max(1, round(HELDOUT_SHARE * len(members)))
            mask[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return mask


def data_files(spec: str, argument: str, suffixes: Sequence[str]) -> tuple[pathlib.Path, ...]:
    """The files of a container source, sorted: one file, a folder's (and its subfolders'), a glob, a brace range
    ("shard-{0000..0127}.tar") or list ("{train,test}.tar").

    Raises: ConfigError if there are none.
    """
    path = pathlib.Path(argument).expanduser()
    if path.is_dir():
        found = [p for suffix in suffixes for p in path.rglob(f"*{suffix}") if not p.name.startswith(".")]
    else:
        # Each pattern of a brace must be there: a missing shard is not to be passed over.
        found = []
        for pattern in expand_braces(str(path)):
            matches = (
                [pathlib.Path(pattern)] if pathlib.Path(pattern).exists() else map(pathlib.Path, glob.glob(pattern))
            )
            if not (here := [p for p in matches if p.is_file()]):
                raise ConfigError(f"{spec}: no file {pattern}")
            found += here
    if not found:
        raise ConfigError(f"{spec}: no {' or '.join(suffixes)} file in it")
    return tuple(sorted(set(found)))


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" to its three names, "{a,b}.tar" to its two, as a shell does; several braces multiply."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if match[1] is not None:
        width = max(len(match[1]), len(match[2])) if match[1].startswith("0") or match[2].startswith("0") else 0
        parts = [str(i).zfill(width) for i in range(int(match[1]), int(match[2]) + 1)]
    else:
        parts = match[3].split(",")
    return [out for part in parts for out in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def split_files(
    spec: str, files: Sequence[pathlib.Path], split: Split
) -> tuple[tuple[pathlib.Path, ...], tuple[pathlib.Path, ...], bool]:
    """The files of a split and of the training split, and whether a share of them is to be held out.

    A file belongs to the split that its name says ("train-00000-of-00010.parquet", "imagenet-validation-03.tar"), or
    else its folder's name. Where none says so, or only "train", a share is held out (`heldout_mask`).

    Raises: ConfigError if some names say a split, and none "train".
    """
    # Only folders below the one that holds all: the data itself may lie in a folder called "test".
    top = pathlib.Path(os.path.commonpath([f.parent for f in files]))
    train = tuple(f for f in files if _says(f.relative_to(top), _TRAIN))
    for pattern in _HELDOUT:
        heldout = tuple(f for f in files if _says(f.relative_to(top), pattern))
        if heldout:
            if not train:
                raise ConfigError(f"{spec}: {heldout[0].name} is held out, and no file's name says 'train': add those")
            return (train if split == "train" else heldout), train, False
    train = train or tuple(files)
    return train, train, True


def _says(file: pathlib.Path, pattern: re.Pattern[str]) -> bool:
    """By the file's own name, if it names any split; else by its folder's."""
    name, folder = file.name.lower(), file.parent.name.lower()
    named = any(p.search(name) for p in (_TRAIN, *_HELDOUT))
    return bool(pattern.search(name if named else folder))


def class_names_beside(path: pathlib.Path) -> tuple[str, ...] | None:
    """Names of the classes from a classes.txt in the folder, one a line; None if there is none."""
    file = (path if path.is_dir() else path.parent) / "classes.txt"
    if not file.is_file():
        return None
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip())
