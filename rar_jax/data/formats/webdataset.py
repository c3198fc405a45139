"""webdataset:PATH, tar files of NAME.jpg beside NAME.cls (or NAME.json)."""

from __future__ import annotations

import json
import pathlib
import tarfile
from typing import BinaryIO

import numpy as np

from rar_jax.config import require
from rar_jax.data.encoded import EncodedSource, Problems
from rar_jax.data.folder import SUFFIXES
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import find_data_files, number_classes, read_class_names, split_files
from rar_jax.errors import ConfigError


class WebDatasetSource(EncodedSource):
    """Plain .tar files, listed once when opened and then read by seeking.

    A sample is the files of one name up to its first dot: one image, and its class as text (.cls) or as "label" in a
    .json. Class names come from a classes.txt in the folder, else they are numbers. Raises: ConfigError.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"webdataset:{argument}"
        self._paths, train, hold_out = split_files(spec, find_data_files(spec, argument, (".tar",)), split)
        problems = Problems()
        shards = [_list_samples(spec, path, problems) for path in self._paths]
        self._keys = [key for shard in shards for key in shard]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in shards])
        rows = [row for shard in shards for row in shard.values()]
        labels, *self._bytes = np.array(rows, np.int64).reshape(-1, 3).T
        if (names := read_class_names(self._paths[0].parent)) is None:
            known = shards if self._paths == train else [_list_samples(spec, path, Problems()) for path in train]
            names = number_classes(label for shard in known for label, _, _ in shard.values())
        super().__init__(
            spec, view, length=len(labels), labels=labels, class_names=names, problems=problems, hold_out=hold_out
        )

    def _name(self, row: int) -> str:
        return f"{self._paths[self._shard[row]].name}:{self._keys[row]}"

    def _record(self, row: int) -> tuple[bytes, int]:
        offset, size = (int(column[row]) for column in self._bytes)
        # Opened each time: forked workers would share a handle and its position, and shards may be thousands.
        with self._paths[self._shard[row]].open("rb") as file:
            file.seek(offset)
            return file.read(size), -1


def _list_samples(spec: str, path: pathlib.Path, problems: Problems) -> dict[str, tuple[int, int, int]]:
    """Return label, offset and size of each sample of a tar file; what is not part of one is a problem."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as file, tarfile.open(path, "r:") as tar:
            for member in tar:
                if reason := _add_member(member, file, images, labels):
                    problems.add(f"{path.name}:{member.name}", reason)
            end = int(tar.offset)
            file.seek(end)
            rest = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{spec}: {path.name} is no plain, whole .tar ({error}): fetch or decompress it") from None
    # tarfile stops silently at a damaged header.
    require(not any(rest), f"{spec}: {path.name} has a damaged header at byte {end}: fetch it again")
    if not rest:
        problems.add(path.name, "no end marker: the file may have been cut short between two members")
    for key in sorted(images.keys() ^ labels.keys()):
        reason = "no .cls or .json with its class" if key in images else "a class without its image"
        problems.add(f"{path.name}:{key}", reason)
    return {key: (labels[key], *images[key]) for key in images if key in labels}


def _add_member(
    member: tarfile.TarInfo, file: BinaryIO, images: dict[str, tuple[int, int]], labels: dict[str, int]
) -> str | None:
    """Add a member to its sample: an image's offset and size, or a label. Return what is wrong with it, or None."""
    folder, _, base = member.name.rpartition("/")
    key, _, extension = base.partition(".")
    key, extension = f"{folder}/{key}".removeprefix("/"), f".{extension.lower()}"
    if member.isdir() or base.startswith("."):
        return None
    if not member.isreg():
        return "not a file: links in a tar are not followed"
    if extension in SUFFIXES:
        if key in images:
            return "a second image of its sample"
        images[key] = member.offset_data, member.size
    elif extension in (".cls", ".json"):
        file.seek(member.offset_data)
        try:
            content = file.read(member.size).decode("utf-8")
            labels.setdefault(key, int(content if extension == ".cls" else json.loads(content)["label"]))
        except (ValueError, KeyError, TypeError):
            return "no class in it: .cls holds a number, .json a number named 'label'"
    elif extension not in (".txt", ".index"):
        return "neither an image nor a class by its suffix"
    return None
