"""folder:PATH, images in one folder a class, as ImageNet is unpacked."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource, Problems, printable
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import HELDOUT_NAMES, heldout_mask
from rar_jax.errors import ConfigError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# What systems leave behind in folders that people have looked at; hidden names besides.
_PASSED_OVER = ("thumbs.db", "desktop.ini", "__macosx")


class FolderSource(EncodedSource):
    """PATH/CLASS/.../IMAGE, classes sorted by the bytes of their names (WNIDs: in the order of ImageNet's labels).

    If PATH/train holds folders it is the training split, and the first of PATH/val, validation, valid, heldout, test
    is held out, also if PATH is that train itself; else 5 % of each class is (`splits.heldout_mask`). A class without images keeps its label. Images that
    lie in PATH itself, without any class folder, are one class, called like the folder. Links to files and to class
    folders are followed. Everything that is not an image by its suffix is one of `problems`, but for hidden files and
    those of systems.

    Raises: ConfigError if there is no such folder, it holds no images, none can be held out, or the held-out part has
    another class.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"folder:{argument}"
        path = pathlib.Path(argument).expanduser()
        require(path.is_dir(), f"{spec}: no such folder, look for a mistyped path")
        self._root, own_split = _split_folder(path, split)
        problems = Problems()
        train_root = _split_folder(path, "train")[0]
        # A folder in both splits is listed once, with the held-out part's own problems.
        classes = _classes(train_root, problems if train_root == self._root else Problems())
        require(bool(classes), f"{spec}: {train_root} holds no images: put them into it, or into one folder a class")
        if train_root != self._root:
            known = set(classes)
            for name in _classes(self._root, problems):
                if name not in known:
                    what = printable(os.fsdecode(name)) or "an image without a class folder"
                    raise ConfigError(f"{spec}: {what} of {self._root} is no class of {train_root}")
        files, labels = [], []
        for label, name in enumerate(classes):
            here = sorted(_images(self._root, name, problems)) if (self._root / os.fsdecode(name)).is_dir() else []
            if not here:
                problems.add(os.fsdecode(name), "a class without images")
            files += here
            labels += [label] * len(here)
        labels = np.array(labels, np.int32)
        if not own_split:
            mask = heldout_mask(labels, files) == (split == "heldout")
            require(
                not files or bool(mask.any()),
                f"{spec}: no class has two images, so that one could be held out: add images, or a folder val of classes",
            )
            files, labels = [f for f, take in zip(files, mask, strict=True) if take], labels[mask]
        # One string for a million names: as objects they would be copied, one by one, into every worker.
        self._ends = np.cumsum([len(f) for f in files], dtype=np.int64)
        self._files = b"".join(files)
        names = [printable(os.fsdecode(name) if name else path.resolve().name) for name in classes]
        super().__init__(spec, view, length=len(files), labels=labels, class_names=names, problems=problems)

    def _name(self, image: int) -> str:
        start = self._ends[image - 1] if image else 0
        return os.fsdecode(self._files[start : self._ends[image]])

    def _record(self, image: int) -> tuple[bytes, int]:
        with open(f"{self._root}/{self._name(image)}", "rb") as file:
            return file.read(), self.label(image)


def _split_folder(path: pathlib.Path, split: Split) -> tuple[pathlib.Path, bool]:
    """The folder of a split's classes, and whether it is all that split's."""
    path = path.resolve()
    if path.name == "train" and any((path.parent / name).is_dir() for name in HELDOUT_NAMES):
        path = path.parent  # "folder:imagenet/train" beside its val is all for training
    # A class may be called "train": only a folder of folders is a split.
    train = path / "train"
    if not (train.is_dir() and any(entry.is_dir() for entry in list(os.scandir(train)))):
        return path, False
    heldout = next((path / name for name in HELDOUT_NAMES if (path / name).is_dir()), None)
    if heldout is None:
        return train, False
    return (train if split == "train" else heldout), True


def _classes(root: pathlib.Path, problems: Problems) -> list[bytes]:
    """Names of the class folders, sorted; the empty name, of the folder itself, if it holds images and no folders."""
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


def _images(root: pathlib.Path, folder: bytes, problems: Problems) -> Iterator[bytes]:
    """Image files under a class folder, as paths from the root."""
    try:
        entries = sorted(os.scandir(os.fsencode(root / os.fsdecode(folder))), key=lambda e: e.name)
    except OSError as error:
        problems.add(os.fsdecode(folder), error.strerror or "unreadable folder")
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)
        name = os.fsdecode(path)
        if _hidden(os.fsdecode(entry.name)):
            continue
        image = _is_image(entry.name)
        if entry.is_dir():
            if image:
                problems.add(name, "a folder named like an image")
            if entry.is_symlink():
                problems.add(name, "a link to a folder, which is not followed: it may lead in a circle")
            else:
                yield from _images(root, path, problems)
        elif not entry.is_file():
            problems.add(name, "a dangling link" if entry.is_symlink() else "not a file")
        elif not image:
            problems.add(name, "not an image by its suffix")
        else:
            if path.decode("utf-8", "replace") != name:
                problems.add(name, "the name is not UTF-8; it is read all the same")
            yield path


def _is_image(name: bytes) -> bool:
    return os.path.splitext(os.fsdecode(name))[1].lower() in SUFFIXES


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _PASSED_OVER
