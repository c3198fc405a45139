"""Token stores: memory-mapped .npy files of records, and their metadata.

    DIR/card.json                     written last: a folder without it is not a store
    DIR/shard-00000-of-00004.npy      structured array: tokens of the card's spec, label <i4, source_id <i8, crop <i2

Record i of the store is record i of the concatenated shards. Plain .npy is faster than ArrayRecord here, see
docs/measurements/token_store.md. tokens/writer.py writes stores.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rar_jax.errors import StoreError
from rar_jax.models import TokenSpec
from rar_jax.runs.bucket import BucketPath, Path, make_path
from rar_jax.runs.manifest import file_sha256

SCHEMA_VERSION = 4
# Given by the maker of a store; further keys are kept.
CARD_KEYS = ("spec", "num_classes", "class_names", "crops", "source", "tokenizer_sha256")
# Types of all keys that are read; int is 0..2**31-1.
_SHARD = {"name": str, "records": int, "sha256": str, "span": [int], "bad_records": [int]}
_SPEC = {"shape": [int], "dtype": str, "vocab": int | None}
_CARD: dict[str, Any] = {
    "spec": _SPEC, "num_classes": int, "class_names": [str], "crops": [str], "source": str,
    "tokenizer_sha256": str | None, "num_records": int, "num_images": int, "num_bad_records": int,
    "num_bad_images": int, "records_per_class": [int], "records_per_crop": [int], "shards": [_SHARD], "sha256": str,
}  # fmt: skip
STORED_DTYPES = ("uint8", "uint16", "uint32", "int32", "float16", "float32")


def read_spec(card: Mapping[str, Any]) -> TokenSpec:
    """Return the spec of a card."""
    spec = card["spec"]
    return TokenSpec(tuple(spec["shape"]), spec["dtype"], spec["vocab"])


def record_dtype(spec: TokenSpec) -> np.dtype:
    """Return the dtype of a record, little-endian."""
    token = np.dtype(spec.dtype).newbyteorder("<")
    return np.dtype([("tokens", token, spec.shape), ("label", "<i4"), ("source_id", "<i8"), ("crop", "<i2")])


class TokenStore:
    """Random access to a finished store; also a source for `grain.MapDataset.source`.

    Raises: StoreError if the folder is not a finished store of this version, its metadata is damaged, or a shard has a
      wrong size. Contents are checked by `verify` and, for ranges, by `gather`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder: Path = make_path(folder)
        self.card: dict[str, Any] = _read_card(self.folder)
        # Shards of a store in a bucket are mapped from a cache of this machine.
        names = [shard["name"] for shard in self.card["shards"]]
        self._local: pathlib.Path = _cache_files(self.folder, names, key=card_sha256(self.card))
        self.num_classes: int = self.card["num_classes"]
        self.class_names: tuple[str, ...] = tuple(self.card["class_names"])
        self.spec: TokenSpec = read_spec(self.card)
        self._dtype = record_dtype(self.spec)
        self._shards = [self._map_shard(shard) for shard in self.card["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if (total := int(self._ends[-1])) != self.card["num_records"]:
            raise StoreError(f"{self.folder}: shards hold {total} records, the card {self.card['num_records']}")

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map pickles as its content; a worker process opens the files itself.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"tokens": (*spec.shape), "labels": int32, "ids": int64}, see `gather`."""
        return {key: array[0] for key, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Gather "tokens" (b, *spec.shape), "labels" int32 (b,), "ids" int64 (b,).

        Tokens are int32 if they are ids, else of the stored dtype.

        Raises: IndexError for an index outside [0, len); StoreError naming file and record of a value out of range.
        """
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.folder}: indices {indices.min()}..{indices.max()}, it has 0..{len(self) - 1}")
        # Sorted, so that each shard is read once and the pages of a file come in order.
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        bounds = [0, *np.searchsorted(ascending, self._ends)]
        records = np.empty(len(indices), self._dtype)
        for j, shard in enumerate(self._shards):
            begin, end = bounds[j], bounds[j + 1]
            if begin < end:
                records[order[begin:end]] = shard[ascending[begin:end] - (self._ends[j] - len(shard))]
        labels = records["label"].astype(np.int32)
        tokens = records["tokens"].astype(self.spec.dtype if self.spec.vocab is None else np.int32)
        try:
            check_ranges(tokens, labels, records["crop"], self.card, "", 0)
        except StoreError:  # find the file and record
            for k, index in enumerate(indices):
                j, row = int(np.searchsorted(self._ends, index, side="right")), slice(k, k + 1)
                path, at = (
                    str(self.folder / self.card["shards"][j]["name"]),
                    index - self._ends[j] + len(self._shards[j]),
                )
                check_ranges(tokens[row], labels[row], records["crop"][row], self.card, path, int(at))
        return {"tokens": tokens, "labels": labels, "ids": records["source_id"].astype(np.int64)}

    def verify(self, *, seen: Any = iter) -> None:
        """Check checksums, ranges and counts. Raises: StoreError naming the record.

        seen: the list of shards is passed through it, to show progress.
        """
        card, path = self.card, self.folder / "card.json"
        per_class, per_crop, end = np.zeros(self.num_classes, np.int64), np.zeros(len(card["crops"]), np.int64), 0
        for shard, records in zip(seen(card["shards"]), self._shards, strict=True):
            name = self._local / shard["name"]
            if (found := file_sha256(name)) != shard["sha256"]:
                if isinstance(self.folder, BucketPath):
                    name.unlink()  # the next start caches it again
                raise StoreError(f"{name} is damaged: sha256 is {found}, the card says {shard['sha256']}")
            check_ranges(records["tokens"], records["label"], records["crop"], card, str(name), 0)
            per_class += np.bincount(records["label"], minlength=len(per_class))
            per_crop += np.bincount(records["crop"], minlength=len(per_crop))
            begin, end_before = shard["span"][0], end
            end = shard["span"][1]
            if begin != end_before or end - begin != shard["records"] + len(shard["bad_records"]):
                raise StoreError(f"{path}: the span of {shard['name']} does not fit its records")
        for key, counted in (("records_per_class", per_class), ("records_per_crop", per_crop)):
            if counted.tolist() != card[key]:
                raise StoreError(f"{path}: {key} is not what the shards hold: run tokenize again")

    def _map_shard(self, shard: Mapping[str, Any]) -> np.ndarray:
        path = self._local / shard["name"]
        header = npy_header(shard["records"], self._dtype)
        size = len(header) + shard["records"] * self._dtype.itemsize
        if not path.is_file():
            raise StoreError(f"{path} is missing")
        if path.stat().st_size != size:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, expected {size}")
        # Mapped with the card's dtype: the file's own header is never interpreted.
        if shard["records"] == 0:
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(path, self._dtype, mode="r", offset=len(header), shape=(shard["records"],)))


def _cache_files(folder: Path, names: Iterable[str], *, key: str) -> pathlib.Path:
    """Return a folder on this machine with the files of a folder in a bucket, or the folder itself if it is on a disk.

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


def npy_header(records: int, dtype: np.dtype) -> bytes:
    """Return the header of a one-dimensional structured .npy file."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (records,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def card_sha256(card: Mapping[str, Any]) -> str:
    """Hex sha256 of a card without its "sha256"; it covers the shards' hashes."""
    rest = {key: value for key, value in card.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_ranges(
    tokens: np.ndarray, labels: np.ndarray, crops: np.ndarray, card: Mapping[str, Any], where: str, first: int
) -> None:
    """Raise StoreError naming the first record with a value out of range, or a latent that is not finite."""
    limits = [("label", labels, card["num_classes"]), ("crop", crops, len(card["crops"]))]
    if card["spec"]["vocab"] is None:
        if not (finite := np.isfinite(tokens).reshape(len(tokens), -1).all(axis=1)).all():
            raise StoreError(f"{where}: record {first + int(np.argmin(finite))} has a latent that is not finite")
    else:
        limits.insert(0, ("token", tokens, card["spec"]["vocab"]))
    for name, values, limit in limits:
        if not np.issubdtype(values.dtype, np.integer):
            raise StoreError(f"{where}: {name}s are {values.dtype}, not integers")
        if values.size and (values.min() < 0 or values.max() >= limit):
            values = values.reshape(len(values), -1)
            row, at = np.argwhere((values < 0) | (values >= limit))[0]
            raise StoreError(f"{where}: record {first + row} has {name} {values[row, at]}, outside 0..{limit - 1}")


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
    if type(version) is not int or version != SCHEMA_VERSION:
        raise StoreError(f"{path} has schema version {version}, expected {SCHEMA_VERSION}: run tokenize again")
    if missing := [key for key in _CARD if key not in card]:
        raise StoreError(f"{path} lacks {', '.join(missing)}: run tokenize again")
    if card_sha256(card) != card["sha256"]:
        raise StoreError(f"{path} is damaged: its sha256 does not match. Restore it or run tokenize again")
    # A fitting sha256 does not prove who wrote the card.
    if wrong := next((key for key, kind in _CARD.items() if not _is_kind(card[key], kind)), None) or _find_misfit(card):
        raise StoreError(f"{path} is damaged: {wrong} is {str(card[wrong])[:80]}. Restore it or run tokenize again")
    return card


def _is_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_kind(x, kind[0]) for x in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(key in value and _is_kind(value[key], kind[key]) for key in kind)
    if kind is int:
        return type(value) is int and 0 <= value < 2**31
    return isinstance(value, kind)


def _find_misfit(card: Mapping[str, Any]) -> str | None:
    """Return a key whose value has the right type and cannot be used."""
    names, spec = [shard["name"] for shard in card["shards"]], card["spec"]
    # Bare names: a card must not make us read other files.
    bare = all(name.isprintable() and "/" not in name and name not in ("", ".", "..") for name in names)
    fits = {
        "spec": 0 < math.prod(spec["shape"]) < 2**24 and spec["dtype"] in STORED_DTYPES and spec["vocab"] != 0,
        "crops": len(card["crops"]) > 0,
        "records_per_class": len(card["records_per_class"]) == card["num_classes"] > 0,
        "shards": bare and len(names) > 0 and all(len(shard["span"]) == 2 for shard in card["shards"]),
    }
    return next((key for key, fit in fits.items() if not fit), None)
