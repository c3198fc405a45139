"""Tokens on disk: fixed-width records in a few memory-mapped .npy files, and a card that says what they are.

    DIR/card.json                     written last: a folder without it is not a store
    DIR/shard-00000-of-00004.npy      structured array: tokens <u2 or <u4 (n,), label <i4, source_id <i8, crop <i2

Record i of the store is record i of the shards laid end to end. Plain .npy and not ArrayRecord, by
measurement: docs/measurements/token_store.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

SCHEMA_VERSION = 1
# Keys of card.json that the maker of a store gives; the writer adds schema_version, num_tokens, dtype and shards.
CARD_KEYS = (
    "num_records",
    "codebook_size",
    "grid",
    "num_classes",
    "class_names",
    "crops",
    "source",
    "tokenizer_sha256",
)
_VERIFY_RECORDS = 65_536


class StoreError(ValueError):
    """A token store is missing, unfinished or damaged, or was given wrong records: the message names the file."""


def record_dtype(*, num_tokens: int, codebook_size: int) -> np.dtype:
    """The structured dtype of one record; 2 bytes a token as long as the codebook allows it."""
    token = "<u2" if codebook_size <= 65_536 else "<u4"
    return np.dtype([("tokens", token, (num_tokens,)), ("label", "<i4"), ("source_id", "<i8"), ("crop", "<i2")])


class TokenStoreWriter:
    """Writes a store record after record, in memory that does not grow with it.

    with TokenStoreWriter(folder, card, num_shards=4) as writer:
        writer.append(tokens, labels, source_ids, crops)

    A shard has its name only when it is whole, and the card is written last: a killed writer leaves no store.

    Args:
      folder: made if missing; must not hold a finished store.
      card: the CARD_KEYS. num_records is needed at the start: it says where each shard ends, and the writer
        refuses to finish with another number. num_tokens is the product of grid.
      num_shards: number of files; shard j holds records [j*n//S, (j+1)*n//S).

    Raises: StoreError for a wrong card, wrong records, a wrong number of them, or a folder that holds a store.
    """

    def __init__(self, folder: str | os.PathLike[str], card: Mapping[str, Any], num_shards: int = 1) -> None:
        self.folder = pathlib.Path(folder)
        if missing := [key for key in CARD_KEYS if key not in card]:
            raise StoreError(f"the card for {self.folder} lacks {', '.join(missing)}")
        if not 1 <= num_shards <= max(1, card["num_records"]):
            raise StoreError(f"{self.folder}: {card['num_records']} records cannot be cut into {num_shards} shards")
        if (self.folder / "card.json").exists():
            raise StoreError(f"{self.folder} already holds a finished store: remove it or choose another folder")
        self._num_tokens = int(np.prod(card["grid"]))
        self._dtype = record_dtype(num_tokens=self._num_tokens, codebook_size=card["codebook_size"])
        self._card = {
            "schema_version": SCHEMA_VERSION,
            **card,
            "num_tokens": self._num_tokens,
            "dtype": self._dtype["tokens"].base.name,
        }
        self._ends = [(j + 1) * card["num_records"] // num_shards for j in range(num_shards)]
        self._shards: list[dict[str, Any]] = []
        self._written = 0
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, tokens: np.ndarray, labels: np.ndarray, source_ids: np.ndarray, crops: np.ndarray) -> None:
        """Adds records: tokens ints (b, n), labels ints (b,), source_ids ints (b,), crops ints (b,).

        Raises: StoreError, before anything is written, for a wrong shape, a token outside the codebook, a label
          outside the classes, or more records than the card has.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self._num_tokens:
            raise StoreError(f"{self.folder}: tokens are {tokens.shape}, expected (b, {self._num_tokens})")
        if not len(tokens) == len(labels) == len(source_ids) == len(crops):
            raise StoreError(f"{self.folder}: tokens, labels, source_ids and crops differ in length")
        if self._written + len(tokens) > self._ends[-1]:
            raise StoreError(f"{self.folder}: more than the card's {self._ends[-1]} records were appended")
        # Checked before the cast to two bytes, which would wrap a wrong token round into a valid one.
        _check_ranges(tokens, np.asarray(labels), self._card, str(self.folder), self._written)
        records = np.empty(len(tokens), self._dtype)
        records["tokens"], records["label"], records["source_id"], records["crop"] = tokens, labels, source_ids, crops
        while len(records):
            room = self._ends[len(self._shards)] - self._written
            self._write(records[:room])
            records = records[room:]

    def close(self) -> None:
        """Finishes the store. Raises StoreError if records are missing; the folder is then not a store."""
        if self._written != self._ends[-1]:
            raise StoreError(f"{self.folder}: {self._written} records were appended, the card says {self._ends[-1]}")
        if not self._shards:
            self._write(np.empty(0, self._dtype))
        temporary = self.folder / "card.json.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({**self._card, "shards": self._shards}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "card.json")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._file is not None:
                self._file.close()
                self._temporary.unlink()

    @property
    def _name(self) -> str:
        return f"shard-{len(self._shards):05d}-of-{len(self._ends):05d}.npy"

    @property
    def _temporary(self) -> pathlib.Path:
        return self.folder / f"{self._name}.tmp"

    def _write(self, records: np.ndarray) -> None:
        """Writes records that belong to the open shard, and gives it its name if they are its last."""
        begin, end = [0, *self._ends][len(self._shards)], self._ends[len(self._shards)]
        if self._file is None:
            self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed below, or in __exit__)
            self._sha256 = hashlib.sha256()
            self._put(_npy_header(end - begin, self._dtype))
        self._put(records.tobytes())
        self._written += len(records)
        if self._written < end:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._temporary, self.folder / self._name)
        self._shards.append({"name": self._name, "records": end - begin, "sha256": self._sha256.hexdigest()})

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._sha256.update(data)


class TokenStore:
    """Random access to a finished store; also a source for `grain.MapDataset.source`.

    Opening checks the card and the sizes of the files; `verify` reads everything. Shards are memory-mapped:
    memory does not grow with the store.

    Raises: StoreError if the folder is not a store, unfinished, of another schema, or a shard has a wrong size.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        self.card = _read_card(self.folder)
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

        Raises: IndexError for an index outside [0, len).
        """
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.folder}: asked for {indices.min()}..{indices.max()}, it has 0..{len(self) - 1}")
        records = np.empty(len(indices), self._dtype)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for j in np.unique(shard_of):
            here = shard_of == j
            records[here] = self._shards[j][indices[here] - (self._ends[j] - len(self._shards[j]))]
        return {
            "tokens": records["tokens"].astype(np.int32),
            "labels": records["label"].astype(np.int32),
            "ids": records["source_id"].astype(np.int64),
        }

    def verify(self) -> None:
        """Reads the whole store. Raises StoreError naming the file of a wrong checksum, or the file and record of
        a token outside the codebook or a label outside the classes."""
        for shard, records in zip(self.card["shards"], self._shards, strict=True):
            path = self.folder / shard["name"]
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise StoreError(f"{path} is damaged: sha256 is {found}, the card says {shard['sha256']}")
            for start in range(0, len(records), _VERIFY_RECORDS):
                part = records[start : start + _VERIFY_RECORDS]
                _check_ranges(part["tokens"], part["label"], self.card, str(path), start)

    def _open(self, shard: Mapping[str, Any]) -> np.ndarray:
        path = self.folder / shard["name"]
        header = _npy_header(shard["records"], self._dtype)
        size = len(header) + shard["records"] * self._dtype.itemsize
        if not path.is_file():
            raise StoreError(f"{path} is missing: the card names it")
        if path.stat().st_size != size:
            raise StoreError(f"{path} has {path.stat().st_size} bytes, expected {size}")
        # Mapped by the card's dtype: the file's own header, which could say anything, is never interpreted.
        if shard["records"] == 0:
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(path, self._dtype, mode="r", offset=len(header), shape=(shard["records"],)))


def _npy_header(records: int, dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (records,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _read_card(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "card.json"
    if not path.is_file():
        if any(folder.glob("shard-*")):
            raise StoreError(f"{folder} has shards but no card.json: tokenize was interrupted, run it again")
        raise StoreError(f"{folder} is not a token store: it has no card.json; make one with tokenize")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version = card["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error!r}): run tokenize again") from None
    if version != SCHEMA_VERSION:
        raise StoreError(f"{path} has schema version {version}, expected {SCHEMA_VERSION}: run tokenize again")
    if missing := [key for key in (*CARD_KEYS, "num_tokens", "shards") if key not in card]:
        raise StoreError(f"{path} lacks {', '.join(missing)}: run tokenize again")
    return card


def _check_ranges(tokens: np.ndarray, labels: np.ndarray, card: Mapping[str, Any], where: str, first: int) -> None:
    """Raises StoreError naming the first record whose tokens (b, n) or label (b,) are out of range."""
    for name, values, limit in (("token", tokens, card["codebook_size"]), ("label", labels, card["num_classes"])):
        if not np.issubdtype(values.dtype, np.integer):
            raise StoreError(f"{where}: {name}s are {values.dtype}, not integers")
        if not values.size or (values.min() >= 0 and values.max() < limit):
            continue
        values = values.reshape(len(values), -1)
        record, place = np.argwhere((values < 0) | (values >= limit))[0]
        raise StoreError(f"{where}: record {first + record} has {name} {values[record, place]}, outside 0..{limit - 1}")
