"""folder:PATH, images in one folder a class, as ImageNet is unpacked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource, Problems, printable
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import HELDOUT_NAMES
from rar_jax.errors import ConfigError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# What operating systems leave in folders, besides hidden files.
_SKIPPED = ("thumbs.db", "desktop.ini", "__macosx")


class FolderSource(EncodedSource):
    """PATH/CLASS/.../IMAGE, classes sorted by bytes, which is ImageNet's order.

    If PATH/train holds folders, it is the training split, and the first of PATH/val, validation, valid, heldout, test
    is held out. This also holds if PATH is that train folder. Otherwise 5 % of each class is held out.

    A class without images keeps its label. Images in PATH itself, without any class folder, are one class, named like
    the folder. Links to files and to class folders are followed. `problems` lists other files, but no hidden ones.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"folder:{argument}"
        path = pathlib.Path(argument).expanduser()
        require(path.is_dir(), f"{spec}: no such folder")
        self._root, own_split = _find_split_folder(path, split)
        train_root, _ = _find_split_folder(path, "train")
        problems = Problems()
        own, classes = {*_list_classes(self._root, problems)}, _list_classes(train_root, Problems())
        require(bool(classes), f"{spec}: {train_root} holds no images: put them into it, or into one folder per class")
        if unknown := sorted(own - {*classes}):
            what = printable(os.fsdecode(unknown[0])) or "an image without a class folder"
            raise ConfigError(f"{spec}: {what} of {self._root} is no class of {train_root}")
        files, labels = [], []
        for label, name in enumerate(classes):
            here = sorted(_list_images(self._root, name, problems)) if name in own else []
            if not here:
                problems.add(os.fsdecode(name), "a class without images")
            files += here
            labels += [label] * len(here)
        # One string for a million names: as objects they would be copied, one by one, into every worker.
        self._ends = np.cumsum([0, *(len(f) for f in files)], dtype=np.int64)
        self._files = b"".join(files)
        super().__init__(
            spec,
            view,
            length=len(files),
            labels=np.array(labels, np.int32),
            class_names=[printable(os.fsdecode(name) or path.resolve().name) for name in classes],
            problems=problems,
            hold_out=None if own_split else split,
        )

    def _name(self, row: int) -> str:
        return os.fsdecode(self._files[self._ends[row] : self._ends[row + 1]])

    def _record(self, row: int) -> tuple[bytes, int]:
        with open(f"{self._root}/{self._name(row)}", "rb") as file:
            return file.read(), -1


def _find_split_folder(path: pathlib.Path, split: Split) -> tuple[pathlib.Path, bool]:
    """Return the folder of a split's classes, and whether all of it is that split's."""
    path = path.resolve()
    if path.name == "train" and any((path.parent / name).is_dir() for name in HELDOUT_NAMES):
        path = path.parent  # "folder:imagenet/train" beside its val is all for training
    # A class may be called "train": only a folder of folders is a split.
    train = path / "train"
    if not (train.is_dir() and any(entry.is_dir() for entry in train.iterdir())):
        return path, False
    heldout = next((path / name for name in HELDOUT_NAMES if (path / name).is_dir()), None)
    if heldout is None:
        return train, False
    return (train if split == "train" else heldout), True


def _list_classes(root: pathlib.Path, problems: Problems) -> list[bytes]:
    """List the class folders, sorted; [b""] if there are images and no folders."""
    names, files = [], []
    for entry in os.scandir(root):
        if not _hidden(entry.name):
            (names if entry.is_dir() else files).append(os.fsencode(entry.name))
    if not names and any(_is_image(name) for name in files):
        return [b""]
    for name in files:
        if name != b"classes.txt":
            problems.add(os.fsdecode(name), "not in a class folder")
    return sorted(names)


def _list_images(root: pathlib.Path, folder: bytes, problems: Problems) -> Iterator[bytes]:
    """List the image files under a class folder, as paths from the root."""
    try:
        entries = sorted(os.scandir(os.path.join(os.fsencode(root), folder)), key=lambda entry: entry.name)
    except OSError as error:
        problems.add(os.fsdecode(folder), error.strerror or "unreadable folder")
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if _hidden(os.fsdecode(entry.name)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _list_images(root, path, problems)
        elif entry.is_dir():
            problems.add(os.fsdecode(path), "a link to a folder, not followed: it may be circular")
        elif not entry.is_file():
            problems.add(os.fsdecode(path), "a dangling link" if entry.is_symlink() else "not a file")
        elif not _is_image(entry.name):
            problems.add(os.fsdecode(path), "not an image by its suffix")
        else:
            yield path


def _is_image(name: bytes) -> bool:
    return os.path.splitext(os.fsdecode(name))[1].lower() in SUFFIXES


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SKIPPED
