"""Write a token store shard by shard; an interrupted one is resumed.

An unfinished store also holds making.json, which says what is being made, and a sidecar per finished shard,
shard-00000-of-00004.json, with its counts and sha256. Shard j is made from records [j*S, (j+1)*S) of the *source*;
records whose image cannot be decoded are left out. An interrupted store becomes bitwise identical to a straight one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rar_jax.errors import CheckpointError, StoreError
from rar_jax.runs.bucket import Path, make_path, write_file
from rar_jax.runs.manifest import file_sha256
from rar_jax.tokens.store import (
    CARD_KEYS,
    SCHEMA_VERSION,
    card_sha256,
    check_ranges,
    npy_header,
    read_spec,
    record_dtype,
)

SHARD_BYTES = 2**26  # held in memory; 101 shards of ImageNet's ten crops at 256 ids


class TokenStoreWriter:
    """Writes a store, or resumes an interrupted one.

    writer = TokenStoreWriter(folder, card, source_records=len(source), shard_records=10_000)
    for j in writer.missing():
        with writer.shard(j) as shard:
            for rows in ...:                   # records [begin, end) = writer.span(j) of the source, in order
                shard.append(tokens, labels, source_ids, crops, bad)
    writer.finish()

    Holds one shard in memory. Each process writes shards j % process_count == process_index; process 0 finishes.

    Args:
      card: the CARD_KEYS, JSON values.
      source_records: records of the source, bad ones included.
      shard_records: source records per shard, by default as many as fill SHARD_BYTES.

    Raises: StoreError for a wrong card, or a folder that holds a finished store or the beginning of another one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        card: Mapping[str, Any],
        *,
        source_records: int,
        shard_records: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self.folder: Path = make_path(folder)
        if missing := [key for key in CARD_KEYS if key not in card]:
            raise StoreError(f"the card for {self.folder} lacks {', '.join(missing)}")
        card = json.loads(json.dumps(card))  # as it will be read: tuples are lists
        self.dtype: np.dtype = record_dtype(read_spec(card))
        if shard_records is None:
            shard_records = max(1, SHARD_BYTES // self.dtype.itemsize)
        if shard_records < 1 or source_records < 1:
            raise StoreError(f"{self.folder}: {source_records} records cannot be split into shards of {shard_records}")
        if self.card_file.exists():
            raise StoreError(f"{self.folder} already holds a finished store: remove it or choose another folder")
        self.card: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **card}
        self.source_records: int = source_records
        self.shard_records: int = shard_records
        self.num_shards: int = -(-source_records // shard_records)
        self._process = (process_index, process_count)
        self._written: dict[int, dict[str, Any]] = {}
        self._claim_folder()

    @property
    def card_file(self) -> Path:
        return self.folder / "card.json"

    def span(self, j: int) -> tuple[int, int]:
        """Records [begin, end) of the source that shard j is made from."""
        return j * self.shard_records, min((j + 1) * self.shard_records, self.source_records)

    def missing(self) -> list[int]:
        """Unfinished shards of this process, ascending. Finished ones are verified."""
        index, count = self._process
        return [j for j in range(index, self.num_shards, count) if self._read_sidecar(j) is None]

    @contextlib.contextmanager
    def shard(self, j: int) -> Iterator[Shard]:
        """Take exactly the records of a shard's span, write it on exit."""
        (begin, end), path = self.span(j), self.folder / self.name(j)
        shard = Shard(self.card, self.dtype, begin, end, str(path))
        yield shard
        if shard.seen != end - begin:
            raise StoreError(f"{path}: {shard.seen} of {end - begin} records were appended")
        records = shard.records[: shard.kept]
        content = npy_header(shard.kept, self.dtype) + records.tobytes()
        write_file(path, content)
        self._written[j] = {
            "name": self.name(j),
            "span": [begin, end],
            "records": shard.kept,
            "bad_records": shard.bad,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bad_per_crop": shard.bad_per_crop.tolist(),
            "records_per_class": np.bincount(records["label"], minlength=self.card["num_classes"]).tolist(),
            "records_per_crop": np.bincount(records["crop"], minlength=len(self.card["crops"])).tolist(),
        }
        write_file(self.folder / self.name(j, "json"), json.dumps(self._written[j]).encode())

    def finish(self) -> bool:
        """Write the card on process 0 if all shards exist; return if it is finished."""
        if self._process[0] != 0:
            return self.card_file.is_file()
        sidecars = [self._read_sidecar(j) for j in range(self.num_shards)]
        shards = [sidecar for sidecar in sidecars if sidecar is not None]
        if len(shards) < self.num_shards:
            return False
        per_class, per_crop, bad_per_crop = (
            np.sum([shard[key] for shard in shards], axis=0).tolist()
            for key in ("records_per_class", "records_per_crop", "bad_per_crop")
        )
        card = self.card | {
            "num_records": sum(per_class),
            # Every image has every crop once, so the most frequent crop counts the images.
            "num_images": max(per_crop),
            "num_bad_records": sum(bad_per_crop),
            "num_bad_images": max(bad_per_crop),
            "records_per_class": per_class,
            "records_per_crop": per_crop,
            "shards": [{k: s[k] for k in ("name", "span", "records", "bad_records", "sha256")} for s in shards],
        }
        if not card["num_records"]:
            raise StoreError(f"{self.folder}: no image of {card['source']} could be decoded")
        card["sha256"] = card_sha256(card)
        write_file(self.card_file, json.dumps(card, indent=1).encode())
        remove_leftovers(self.folder, card)
        return True

    def name(self, j: int, suffix: str = "npy") -> str:
        """File name of shard j ("npy") or its sidecar ("json")."""
        return f"shard-{j:05d}-of-{self.num_shards:05d}.{suffix}"

    def _claim_folder(self) -> None:
        """Write making.json, or check that the existing one is equal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "making.json"
        making = self.card | {"source_records": self.source_records, "shard_records": self.shard_records}
        if not path.is_file():
            write_file(path, json.dumps(making, indent=1).encode())
            return
        try:
            there = json.loads(path.read_bytes())
        except ValueError as error:
            raise StoreError(f"{path} cannot be read ({error}): remove {self.folder} to start again") from None
        if difference := find_difference(there, making):
            beginning = f"{self.folder} holds the beginning of another store ({difference})"
            raise StoreError(f"{beginning}: remove it, or choose another folder")

    def _read_sidecar(self, j: int) -> dict[str, Any] | None:
        """Return the sidecar of shard j if the shard's bytes have its sha256."""
        if j not in self._written:
            try:
                sidecar = json.loads((self.folder / self.name(j, "json")).read_bytes())
                found = file_sha256(self.folder / self.name(j))
                if sidecar["span"] != list(self.span(j)) or sidecar["sha256"] != found:
                    return None
            except (FileNotFoundError, CheckpointError, ValueError, KeyError, TypeError):
                return None
            self._written[j] = sidecar
        return self._written[j]


class Shard:
    """Takes the records of one shard. Made by `TokenStoreWriter.shard`."""

    def __init__(self, card: Mapping[str, Any], dtype: np.dtype, begin: int, end: int, where: str) -> None:
        self.records: np.ndarray = np.empty(end - begin, dtype)
        self.seen: int = 0
        self.kept: int = 0
        self.bad: list[int] = []
        self.bad_per_crop: np.ndarray = np.zeros(len(card["crops"]), np.int64)
        self._card, self._begin, self._where = card, begin, where

    def append(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        source_ids: np.ndarray,
        crops: np.ndarray,
        bad: np.ndarray | None = None,
    ) -> None:
        """Append the next records: tokens (b, *spec.shape), the others ints (b,).

        bad: bool (b,), records whose image could not be decoded: they are counted and left out.

        Raises: StoreError for a wrong shape, a value out of range, or too many records.
        """
        tokens, labels, crops = np.asarray(tokens), np.asarray(labels), np.asarray(crops)
        stored = self.records.dtype["tokens"]
        if tokens.shape[1:] != stored.shape:
            shape = ", ".join(map(str, stored.shape))
            raise StoreError(f"{self._where}: tokens are {tokens.shape}, expected (b, {shape})")
        if not len(tokens) == len(labels) == len(source_ids) == len(crops):
            raise StoreError(f"{self._where}: tokens, labels, source_ids and crops differ in length")
        if self.seen + len(tokens) > len(self.records):
            raise StoreError(f"{self._where}: more than its {len(self.records)} records were appended")
        good = np.ones(len(tokens), bool) if bad is None else ~np.asarray(bad)
        if self._card["spec"]["vocab"] is None:
            with np.errstate(over="ignore"):  # infinity is an error below
                tokens = tokens.astype(stored.base)  # not ids: their cast could make a wrong one valid
        check_ranges(tokens, labels, crops, self._card, self._where, self._begin + self.seen)
        records = self.records[self.kept : self.kept + good.sum()]
        records["tokens"], records["label"] = tokens[good], labels[good]
        records["source_id"], records["crop"] = np.asarray(source_ids)[good], crops[good]
        self.bad += (self._begin + self.seen + np.flatnonzero(~good)).tolist()
        self.bad_per_crop += np.bincount(crops[~good], minlength=len(self.bad_per_crop))
        self.seen += len(tokens)
        self.kept += len(records)


def find_difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe the first key that differs between two cards."""
    key = next((key for key in sorted({*there, *now}) if there.get(key) != now.get(key)), None)
    return key and f"{key}: {json.dumps(there.get(key))[:80]}, now {json.dumps(now.get(key))[:80]}"


def remove_leftovers(folder: Path, card: Mapping[str, Any]) -> None:
    """Remove from a finished store what was needed to make it, and old shards."""
    keep = {"card.json", *(shard["name"] for shard in card["shards"])}
    for path in [*folder.glob("shard-*"), folder / "making.json", *folder.glob("*.tmp")]:
        if path.name not in keep:
            path.unlink(missing_ok=True)
