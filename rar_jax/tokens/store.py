"""Tokens on disk: fixed-width records in a few memory-mapped .npy files, and a card that says what they are.

    DIR/card.json                     written last: a folder without it is not a store
    DIR/shard-00000-of-00004.npy      structured array: tokens <u2 or <u4 (n,), label <i4, source_id <i8, crop <i2

Record i of the store is record i of the shards laid end to end. Plain .npy and not ArrayRecord, by
measurement: docs/measurements/token_store.md. Stores are written by tokens/writer.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rar_jax.errors import StoreError
from rar_jax.runs.bucket import BucketPath, Path, make_path

SCHEMA_VERSION = 2
# What the maker of a store says of it; the writer adds what it counted. A maker may add keys of its own.
CARD_KEYS = ("codebook_size", "grid", "num_classes", "class_names", "crops", "source", "tokenizer_sha256")
# What the writer adds besides schema_version, num_tokens and dtype. Schema 1 has no counts and no sha256 of the card.
_COUNTS = ("num_images", "num_bad_records", "num_bad_images", "records_per_class", "records_per_crop", "sha256")
_VERIFY_RECORDS = 65_536


def record_dtype(*, num_tokens: int, codebook_size: int) -> np.dtype:
    """The structured dtype of one record; 2 bytes a token as long as the codebook allows it."""
    token = "<u2" if codebook_size <= 65_536 else "<u4"
    return np.dtype([("tokens", token, (num_tokens,)), ("label", "<i4"), ("source_id", "<i8"), ("crop", "<i2")])


class TokenStore:
    """Random access to a finished store; also a source for `grain.MapDataset.source`.

    Opening checks the card and the sizes of the files; `verify` reads everything. Shards are memory-mapped:
    memory does not grow with the store.

    Raises: StoreError if the folder is not a store, unfinished, of an unknown schema, its card is damaged, or a
      shard has a wrong size.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder: Path = make_path(folder)
        self.card: dict[str, Any] = _read_card(self.folder)
        # Shards of a store in a bucket are mapped from a cache of this machine.
        names = [shard["name"] for shard in self.card["shards"]]
        self._local: pathlib.Path = _cache_files(self.folder, names, key=card_sha256(self.card))
        self.num_classes: int = self.card["num_classes"]
        self.class_names: tuple[str, ...] = tuple(self.card["class_names"])
        self.codebook_size: int = self.card["codebook_size"]
        self.num_tokens: int = self.card["num_tokens"]
        self._dtype = record_dtype(num_tokens=self.num_tokens, codebook_size=self.codebook_size)
        self._shards = [self._open(shard) for shard in self.card["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if self._ends[-1] != self.card["num_records"]:
            raise StoreError(
                f"{self.folder}: shards hold {self._ends[-1]} records, the card {self.card['num_records']}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map pickles as its whole content; a worker process should open the files itself.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"tokens": int32 (n,), "labels": int32, "ids": int64}."""
        return {key: array[0] for key, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Records at `indices`, ints (b,): "tokens" int32 (b, n), "labels" int32 (b,), "ids" int64 (b,).

        Raises: IndexError for an index outside [0, len); StoreError naming file and record of a token outside the codebook, a label
          outside the classes or a crop that the card does not have.
        """
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.folder}: asked for {indices.min()}..{indices.max()}, it has 0..{len(self) - 1}")
        # Sorted, so that each of hundreds of shards is asked once, and the pages of a file come in order.
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        bounds = [0, *np.searchsorted(ascending, self._ends)]
        records = np.empty(len(indices), self._dtype)
        for j, shard in enumerate(self._shards):
            begin, end = bounds[j], bounds[j + 1]
            if begin < end:
                records[order[begin:end]] = shard[ascending[begin:end] - (self._ends[j] - len(shard))]
        tokens, labels, crops = records["tokens"].astype(np.int32), records["label"].astype(np.int32), records["crop"]
        try:
            check_ranges(tokens, labels, crops, self.card, "", 0)
        except StoreError:  # which record of which file, is looked for only now
            for k, index in enumerate(indices):
                j = int(np.searchsorted(self._ends, index, side="right"))
                path, place = self.folder / self.card["shards"][j]["name"], int(index - self._ends[j])
                place += len(self._shards[j])
                check_ranges(tokens[k : k + 1], labels[k : k + 1], crops[k : k + 1], self.card, str(path), place)
        return {"tokens": tokens, "labels": labels, "ids": records["source_id"].astype(np.int64)}

    def verify(self, *, seen: Any = iter) -> None:
        """Reads the whole store: checksums, ranges, and the card's counts against the records.

        seen: what the list of shards is passed through, to show progress.

        Raises: StoreError naming the file of a wrong checksum or count, or the file and record of a token outside
          the codebook, a label outside the classes or a crop that the card does not have.
        """
        counted = Counts(self.num_classes)
        for shard, records in zip(seen(self.card["shards"]), self._shards, strict=True):
            path = self._local / shard["name"]
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                if isinstance(self.folder, BucketPath):
                    path.unlink()  # the next start caches it again
                raise StoreError(f"{path} is damaged: sha256 is {found}, the card says {shard['sha256']}")
            for start in range(0, len(records), _VERIFY_RECORDS):
                part = records[start : start + _VERIFY_RECORDS]
                check_ranges(part["tokens"], part["label"], part["crop"], self.card, str(path), start)
                counted.add(part["label"], part["crop"])
        if self.card["schema_version"] == 1:
            return
        for name, ours in (("records_per_class", counted.per_class.tolist()), ("records_per_crop", counted.per_crop)):
            if ours != self.card[name]:
                raise StoreError(f"{self.folder / 'card.json'}: {name} is not what the shards hold: run tokenize again")
        end = 0
        for shard in self.card["shards"]:
            begin, end_before = shard["span"][0], end
            end = shard["span"][1]
            if begin != end_before or end - begin != shard["records"] + len(shard["bad_records"]):
                raise StoreError(f"{self.folder / 'card.json'}: the span of {shard['name']} does not fit its records")

    def _open(self, shard: Mapping[str, Any]) -> np.ndarray:
        path = self._local / shard["name"]
        header = npy_header(shard["records"], self._dtype)
        size = len(header) + shard["records"] * self._dtype.itemsize
        if not path.is_file():
            raise StoreError(f"{path} is missing: the card names it")
        if path.stat().st_size != size:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, expected {size}")
        # Mapped by the card's dtype: the file's own header, which could say anything, is never interpreted.
        if shard["records"] == 0:
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(path, self._dtype, mode="r", offset=len(header), shape=(shard["records"],)))


def _cache_files(folder: Path, names: Iterable[str], *, key: str) -> pathlib.Path:
    """Return a folder on this machine that holds files of a folder in a bucket; a folder on a disk is returned as it is.

    Args:
      key: identifies the content of the files, so that another start reads them from the cache.
    """
    if not isinstance(folder, BucketPath):
        return folder
    cache = pathlib.Path.home() / ".cache" / "rar_jax" / "tokens" / key
    cache.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (cache / name).is_file():
            temporary = cache / f"{name}.{os.getpid()}.tmp"
            temporary.write_bytes((folder / name).read_bytes())
            temporary.replace(cache / name)
    return cache


class Counts:
    """How many records there are of each class, int64 (c,), and of each crop, {"crop": number}."""

    def __init__(self, num_classes: int) -> None:
        self.per_class: np.ndarray = np.zeros(num_classes, np.int64)
        self.per_crop: dict[str, int] = {}

    def add(self, labels: np.ndarray, crops: np.ndarray) -> None:
        """Counts records: labels ints (b,) within the classes, crops ints (b,)."""
        self.per_class += np.bincount(labels, minlength=len(self.per_class))
        for crop, number in zip(*np.unique(crops, return_counts=True), strict=True):
            self.per_crop[str(crop)] = self.per_crop.get(str(crop), 0) + int(number)
        self.per_crop = dict(sorted(self.per_crop.items(), key=lambda item: int(item[0])))


def npy_header(records: int, dtype: np.dtype) -> bytes:
    """The bytes of a .npy file of one structured dimension, before its records."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (records,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def card_sha256(card: Mapping[str, Any]) -> str:
    """Hex sha256 of a card's content without its own "sha256"; it names the store, since the card holds the shards'."""
    rest = {key: value for key, value in card.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_ranges(
    tokens: np.ndarray, labels: np.ndarray, crops: np.ndarray, card: Mapping[str, Any], where: str, first: int
) -> None:
    """Raises StoreError naming the first record whose tokens (b, n), label (b,) or crop (b,) is out of range."""
    limits = [("token", tokens, card["codebook_size"]), ("label", labels, card["num_classes"])]
    if card["schema_version"] > 1:  # before, a card described its crops in words
        limits.append(("crop", crops, len(card["crops"])))
    for name, values, limit in limits:
        if not np.issubdtype(values.dtype, np.integer):
            raise StoreError(f"{where}: {name}s are {values.dtype}, not integers")
        if not values.size or (values.min() >= 0 and values.max() < limit):
            continue
        values = values.reshape(len(values), -1)
        record, place = np.argwhere((values < 0) | (values >= limit))[0]
        raise StoreError(f"{where}: record {first + record} has {name} {values[record, place]}, outside 0..{limit - 1}")


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / "card.json"
    if not path.is_file():
        if any(folder.glob("shard-*")) or (folder / "making.json").is_file():
            raise StoreError(f"{folder} has shards but no card.json: tokenize was interrupted, run it again")
        raise StoreError(f"{folder} is not a token store: it has no card.json; make one with tokenize")
    try:
        card = json.loads(path.read_bytes())
        version = card["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error!r}): run tokenize again") from None
    if type(version) is not int or version not in (1, SCHEMA_VERSION):
        raise StoreError(f"{path} has schema version {version}, expected 1 or {SCHEMA_VERSION}: run tokenize again")
    needed = (*CARD_KEYS, "num_records", "num_tokens", "shards", *(_COUNTS if version > 1 else ()))
    if missing := [key for key in needed if key not in card]:
        raise StoreError(f"{path} lacks {', '.join(missing)}: run tokenize again")
    if version > 1 and card_sha256(card) != card["sha256"]:
        raise StoreError(f"{path} is damaged: its sha256 is not that of its content. Restore it or run tokenize again")
    if wrong := next(_wrong_values(card), None):
        raise StoreError(f"{path} is damaged: {wrong}. Restore it or run tokenize again")
    return card


def _wrong_values(card: Mapping[str, Any]) -> Iterator[str]:
    """What the store would stumble over: a card whose sha256 fits its content was still written by anybody."""

    def is_number(x: Any, least: int = 0) -> bool:
        return type(x) is int and least <= x < 2**31

    def is_shard(x: Any) -> bool:
        name = x.get("name") if isinstance(x, dict) else None
        # A name alone, or a card could have files from elsewhere read.
        if not isinstance(name, str) or not name.isprintable() or "/" in name or name in (".", ".."):
            return False
        fits = is_number(x.get("records")) and isinstance(x.get("sha256"), str)
        return fits and (card["schema_version"] == 1 or is_span(x))

    def is_span(x: Mapping[str, Any]) -> bool:
        span, bad = x.get("span"), x.get("bad_records")
        return isinstance(span, list) and len(span) == 2 and all(map(is_number, span)) and isinstance(bad, list)

    checks = {
        "codebook_size": lambda x: is_number(x, 1),
        "num_classes": lambda x: is_number(x, 1),
        "num_tokens": lambda x: is_number(x, 1) and x < 2**20,
        "num_records": is_number,
        "grid": lambda x: isinstance(x, list) and all(map(is_number, x)),
        "tokenizer_sha256": lambda x: x is None or isinstance(x, str),
        "class_names": lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
        "shards": lambda x: isinstance(x, list) and len(x) > 0 and all(map(is_shard, x)),
    }
    if card["schema_version"] > 1:
        classes = card["num_classes"]
        checks |= dict.fromkeys(("num_images", "num_bad_images"), is_number)
        checks["crops"] = lambda x: isinstance(x, list) and len(x) > 0
        checks["records_per_class"] = lambda x: isinstance(x, list) and len(x) == classes and all(map(is_number, x))
    for key, fits in checks.items():
        if not fits(card[key]):
            yield f"{key} is {str(card[key])[:80]}"
