"""webdataset:PATH, samples in tar files: NAME.jpg beside NAME.cls (or NAME.json with "label")."""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from rar_jax.data.encoded import EncodedSource, Problems
from rar_jax.data.folder import SUFFIXES
from rar_jax.data.image_source import Split, View
from rar_jax.data.splits import class_names_beside, data_files, heldout_mask, split_files
from rar_jax.errors import ConfigError


class _Sample(NamedTuple):
    name: str
    label: int
    offset: int
    size: int


class WebDatasetSource(EncodedSource):
    """Plain .tar files, listed once at opening and then read by seeking; nothing is ever unpacked.

    PATH is a file, a folder, a glob or a brace range; `splits.split_files` says which are held out. A sample is the
    files of one name up to its first dot: one image, and its class as text (.cls) or in a .json as "label". Classes are
    named by a classes.txt in the folder, else by their numbers.

    Raises: ConfigError for a missing, compressed or damaged file, or labels that are not those of the classes.
    """

    def __init__(self, argument: str, split: Split, view: View) -> None:
        spec = f"webdataset:{argument}"
        found = data_files(spec, argument, (".tar",))
        files, train, share = split_files(spec, found, split)
        problems = Problems()
        samples = [list(_samples(spec, file, problems)) for file in files]
        flat = [sample for shard in samples for sample in shard]
        labels = np.array([sample.label for sample in flat], np.int64)
        if (names := class_names_beside(files[0])) is None:
            # From the training labels in both splits: held-out files may lack the last class.
            every = labels
            if files != train:
                every = np.array([s.label for file in train for s in _samples(spec, file, Problems())], np.int64)
            names = tuple(str(c) for c in range(int(every.max(initial=-1)) + 1))
        self._paths = files
        self._shard = np.repeat(np.arange(len(files), dtype=np.int32), [len(shard) for shard in samples])
        self._where = np.array([(s.offset, s.size) for s in flat], np.int64).reshape(-1, 2)
        self._names = [s.name for s in flat]
        if share:
            mask = heldout_mask(labels, [n.encode("utf-8", "surrogateescape") for n in self._names])
            take = np.flatnonzero(mask == (split == "heldout"))
            labels, self._shard, self._where = labels[take], self._shard[take], self._where[take]
            self._names = [self._names[i] for i in take]
        super().__init__(spec, view, length=len(labels), labels=labels, class_names=names, problems=problems)

    def _name(self, image: int) -> str:
        return f"{self._paths[self._shard[image]].name}:{self._names[image]}"

    def _record(self, image: int) -> tuple[bytes, int]:
        offset, size = (int(n) for n in self._where[image])
        # Opened for each: a handle would be shared by forked workers, its place too, and shards may be thousands.
        with self._paths[self._shard[image]].open("rb") as file:
            file.seek(offset)
            return file.read(size), self.label(image)


def _samples(spec: str, path: pathlib.Path, problems: Problems) -> Iterator[_Sample]:
    """The samples of a tar file in its order. What makes no sample is a problem."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for member in _members(spec, path, problems):
            folder, _, base = member.name.rpartition("/")
            key, _, extension = base.partition(".")
            key, extension = f"{folder}/{key}".removeprefix("/"), f".{extension.lower()}"
            name = f"{path.name}:{member.name}"
            if base.startswith("."):
                continue
            if extension in SUFFIXES:
                if key in images:
                    problems.add(name, "a second image of its sample")
                images.setdefault(key, (member.offset_data, member.size))
            elif extension in (".cls", ".json"):
                file.seek(member.offset_data)
                try:
                    content = file.read(member.size).decode("utf-8")
                    labels.setdefault(key, int(content if extension == ".cls" else json.loads(content)["label"]))
                except (ValueError, KeyError, TypeError):
                    problems.add(name, "no class in it: .cls holds a number, .json a number named 'label'")
            elif extension not in (".txt", ".index"):
                problems.add(name, "neither an image nor a class by its suffix")
    for key, (offset, size) in images.items():
        if key in labels:
            yield _Sample(key, labels[key], offset, size)
        else:
            problems.add(f"{path.name}:{key}", "no .cls or .json with its class")
    for key in labels.keys() - images.keys():
        problems.add(f"{path.name}:{key}", "a class without its image")


def _members(spec: str, path: pathlib.Path, problems: Problems) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar.

    Raises: ConfigError if it is not whole. tarfile ends quietly at a damaged header, so where it ended is looked at.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as opened:
            tar: Any = opened
            while (member := tar.next()) is not None:
                tar.members = []  # or it keeps every one
                if member.offset_data + member.size > size:
                    raise ConfigError(f"{spec}: {path.name} ends within {member.name}: fetch it again")
                if member.isreg():
                    yield member
                elif not member.isdir():
                    problems.add(f"{path.name}:{member.name}", "not a file: links in a tar are not followed")
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{spec}: {path.name} is no plain, whole .tar ({error}): fetch or decompress it") from None
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
    if any(rest):
        raise ConfigError(f"{spec}: {path.name} has a damaged header at byte {end}: fetch it again")
    if not rest:
        problems.add(path.name, "no end marker: the file may have been cut short between two members")
