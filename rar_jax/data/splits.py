"""Validation splits: by the names of files, else a fixed share of each class."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from rar_jax.config import require
from rar_jax.data.image_source import Split

HELDOUT_SHARE = 0.05

# In this order, where there are several: the labels of a "test" are often withheld (ImageNet's are -1).
HELDOUT_NAMES = ("val", "validation", "valid", "heldout", "test")
_TRAIN = re.compile(r"(?:^|[^a-z])train(?:ing)?(?![a-z])")
_HELDOUT = tuple(re.compile(rf"(?:^|[^a-z]){name}(?![a-z])") for name in HELDOUT_NAMES)


def heldout_mask(labels: np.ndarray, names: Sequence[bytes]) -> np.ndarray:
    """Select 5 % of each class to hold out, at least one of two or more; bool (n,).

    The smallest hashes of names: independent of order and machine, and few change sides when images are added.
    """
    hashes = np.array([int.from_bytes(hashlib.blake2b(n, digest_size=8).digest(), "little") for n in names], np.uint64)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) >= 2:
            count = max(1, round(HELDOUT_SHARE * len(members)))
            mask[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return mask


def find_data_files(spec: str, argument: str, suffixes: Sequence[str]) -> tuple[pathlib.Path, ...]:
    """Find the files of a container source, sorted.

    argument: a file, a folder (subfolders too), a glob, a brace range ("shard-{0000..0127}.tar") or list ("{a,b}.tar"),
      each pattern of which must match. Raises: ConfigError.
    """
    path = pathlib.Path(argument).expanduser()
    if path.is_dir():
        found = [p for suffix in suffixes for p in path.rglob(f"*{suffix}") if not p.name.startswith(".")]
        require(bool(found), f"{spec}: no {' or '.join(suffixes)} file in it")
        return tuple(sorted(found))
    found = []
    for pattern in expand_braces(str(path)):
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
        files = [pathlib.Path(p) for p in matches if os.path.isfile(p)]
        require(bool(files), f"{spec}: no file {pattern}")
        found += files
    return tuple(sorted(set(found)))


def expand_braces(pattern: str) -> list[str]:
    """Expand "a-{08..10}.tar" and "{a,b}.tar" as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        parts = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    else:
        parts = names.split(",")
    return [out for part in parts for out in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def split_files(
    spec: str, files: Sequence[pathlib.Path], split: Split
) -> tuple[tuple[pathlib.Path, ...], tuple[pathlib.Path, ...], Split | None]:
    """Return a split's files, the training files, and `split` if a share is held out. Raises: ConfigError.

    A file's split is in its name ("train-00000-of-00010.parquet", "imagenet-validation-03.tar") or its folder's. If no
    name says so, or only "train", a share is held out (`heldout_mask`).
    """
    # Only folders below the common one: the data itself may be stored in a folder called "test".
    top = pathlib.Path(os.path.commonpath([f.parent for f in files]))
    train = tuple(f for f in files if _names_split(f.relative_to(top), _TRAIN))
    for pattern in _HELDOUT:
        heldout = tuple(f for f in files if _names_split(f.relative_to(top), pattern))
        if heldout:
            need_train = f"{heldout[0].name} is held out, and no file's name says 'train': add training files"
            require(bool(train), f"{spec}: {need_train}")
            return (train if split == "train" else heldout), train, None
    train = train or tuple(files)
    return train, train, split


def _names_split(file: pathlib.Path, pattern: re.Pattern[str]) -> bool:
    """Match the file's own name if it names any split, else its folder's."""
    name, folder = file.name.lower(), file.parent.name.lower()
    named = any(p.search(name) for p in (_TRAIN, *_HELDOUT))
    return bool(pattern.search(name if named else folder))


def read_class_names(folder: pathlib.Path) -> tuple[str, ...] | None:
    """Read class names from a folder's classes.txt, one per line, or None."""
    file = folder / "classes.txt"
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    return tuple(line.strip() for line in lines if line.strip()) or None


def number_classes(train_labels: Iterable[int]) -> tuple[str, ...]:
    """Name classes by numbers: of training labels, as others may lack the last."""
    return tuple(str(c) for c in range(max(train_labels, default=-1) + 1))
