"""Writing a token store shard by shard, so that a killed run goes on with the first shard that is missing.

While a store is being made its folder also holds

    making.json                       what is being made: shards of anything else are never mixed in
    shard-00000-of-00004.json         beside each whole shard, written after it: its counts and its sha256

Shard j is made from records [j*S, (j+1)*S) of the *source*, whatever becomes of them: a record whose image could not be
decoded is left out, and the shard is shorter. So every shard can be made without the others, by any process. At the end
`finish` writes the card and removes these files: a store that was made with interruptions has the same bytes.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rar_jax.errors import CheckpointError, StoreError
from rar_jax.runs.bucket import BucketPath, Path, make_path
from rar_jax.runs.manifest import file_sha256
from rar_jax.tokens.store import CARD_KEYS, SCHEMA_VERSION, Counts, card_sha256, check_ranges, npy_header, record_dtype

SHARD_RECORDS = 65_536  # 34 MB at 256 tokens of two bytes; 196 shards of ImageNet's ten crops


def shards_of(process_index: int, process_count: int, *, num_shards: int) -> range:
    """The shards that a process writes: j with j % process_count == process_index."""
    return range(process_index, num_shards, process_count)


class TokenStoreWriter:
    """Makes a store, or goes on with one that was interrupted.

    writer = TokenStoreWriter(folder, card, source_records=len(source), shard_records=65536)
    for j in writer.missing():
        with writer.shard(j) as shard:
            for rows in ...:                   # the records [begin, end) = writer.span(j) of the source, in order
                shard.append(tokens, labels, source_ids, crops, bad)
    writer.finish()

    Memory holds one shard at a time. Processes that share a folder each write their own shards; process 0 finishes.

    Args:
      folder: made if missing; must not hold a finished store.
      card: the CARD_KEYS, JSON values; further keys are kept. The number of tokens is the product of grid, crop k is
        named crops[k], tokenizer_sha256 is None where the tokenizer is not known.
      source_records: number of records of the source, bad ones included.
      shard_records: source records a shard.

    Raises: StoreError for a wrong card, or a folder that holds a store or the beginning of another one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        card: Mapping[str, Any],
        *,
        source_records: int,
        shard_records: int = SHARD_RECORDS,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self.folder: Path = make_path(folder)
        if missing := [key for key in CARD_KEYS if key not in card]:
            raise StoreError(f"the card for {self.folder} lacks {', '.join(missing)}")
        if shard_records < 1 or source_records < 1:
            raise StoreError(f"{self.folder}: {source_records} records cannot be cut into shards of {shard_records}")
        if (self.folder / "card.json").exists():
            raise StoreError(f"{self.folder} already holds a finished store: remove it or choose another folder")
        num_tokens = int(np.prod(card["grid"]))
        self.dtype: np.dtype = record_dtype(num_tokens=num_tokens, codebook_size=card["codebook_size"])
        self.card: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            **json.loads(json.dumps(card)),  # as it will be read again: tuples are lists
            "num_tokens": num_tokens,
            "dtype": self.dtype["tokens"].base.name,
        }
        self.source_records: int = source_records
        self.shard_records: int = shard_records
        self.num_shards: int = -(-source_records // shard_records)
        self._process = (process_index, process_count)
        self._written: dict[int, dict[str, Any]] = {}
        self._claim()

    def span(self, j: int) -> tuple[int, int]:
        """The records [begin, end) of the source that shard j is made from."""
        return j * self.shard_records, min((j + 1) * self.shard_records, self.source_records)

    def missing(self) -> list[int]:
        """This process's shards that are not there whole, ascending. Each one found is read and checked once."""
        return [j for j in shards_of(*self._process, num_shards=self.num_shards) if self._sidecar(j) is None]

    @contextlib.contextmanager
    def shard(self, j: int) -> Iterator[Shard]:
        """Context in which a shard gets its records; it is on disk, whole, when the context ends without an exception.

        Raises: StoreError if other than the records of its span were appended.
        """
        begin, end = self.span(j)
        shard = Shard(self.card, self.dtype, begin, end, str(self.folder / self.name(j)))
        yield shard
        if shard.seen != end - begin:
            raise StoreError(f"{self.folder / self.name(j)}: {shard.seen} of {end - begin} records were appended")
        records = shard.records[: shard.kept]
        content = [npy_header(shard.kept, self.dtype), records.tobytes()]
        _write_whole(self.folder / self.name(j), content)
        sha256 = hashlib.sha256(content[0])
        sha256.update(content[1])
        counts = Counts(self.card["num_classes"])
        counts.add(records["label"], records["crop"])
        sidecar = {
            "name": self.name(j),
            "span": [begin, end],
            "records": shard.kept,
            "bad_records": shard.bad,
            "sha256": sha256.hexdigest(),
            "bad_per_crop": shard.bad_per_crop,
            "records_per_class": counts.per_class.tolist(),
            "records_per_crop": counts.per_crop,
        }
        _write_whole(self.folder / self.name(j, "json"), [json.dumps(sidecar).encode()])
        self._written[j] = sidecar

    def finish(self) -> bool:
        """Process 0 writes the card if every shard of every process is there. Returns: whether the store is finished."""
        if self._process[0] != 0:
            return (self.folder / "card.json").is_file()
        sidecars = [self._sidecar(j) for j in range(self.num_shards)]
        whole = [sidecar for sidecar in sidecars if sidecar is not None]
        if len(whole) < self.num_shards:
            return False
        per_class = np.sum([sidecar["records_per_class"] for sidecar in whole], axis=0)
        per_crop, bad_per_crop = (_total(whole, name) for name in ("records_per_crop", "bad_per_crop"))
        card = self.card | {
            "num_records": int(per_class.sum()),
            # Every image has every crop once, so the crop that most have counts the images.
            "num_images": max(per_crop.values(), default=0),
            "num_bad_records": sum(bad_per_crop.values()),
            "num_bad_images": max(bad_per_crop.values(), default=0),
            "records_per_class": per_class.tolist(),
            "records_per_crop": per_crop,
            "shards": [{k: s[k] for k in ("name", "span", "records", "bad_records", "sha256")} for s in whole],
        }
        if not card["num_records"]:
            raise StoreError(
                f"{self.folder}: not one image of {card['source']} could be decoded: there is no store to make"
            )
        card["sha256"] = card_sha256(card)
        _write_whole(self.folder / "card.json", [json.dumps(card, indent=1).encode()])
        sweep(self.folder, card)
        return True

    def name(self, j: int, suffix: str = "npy") -> str:
        """File name of shard j, or of what stands beside it."""
        return f"shard-{j:05d}-of-{self.num_shards:05d}.{suffix}"

    def _claim(self) -> None:
        """Writes making.json, or checks that the one which is there says the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "making.json"
        making = self.card | {"source_records": self.source_records, "shard_records": self.shard_records}
        if not path.is_file():
            _write_whole(path, [json.dumps(making, indent=1).encode()])
            return
        try:
            there = json.loads(path.read_bytes())
        except ValueError as error:
            raise StoreError(f"{path} cannot be read ({error}): remove {self.folder} to start anew") from None
        if other := [key for key in sorted({*there, *making}) if there.get(key) != making.get(key)]:
            was, now = (json.dumps(x.get(other[0]))[:80] for x in (there, making))
            raise StoreError(
                f"{self.folder} holds the beginning of another store ({other[0]}: {was}, now {now}): remove it, choose "
                "another folder, or give the command that began it"
            )

    def _sidecar(self, j: int) -> dict[str, Any] | None:
        """What stands beside shard j, if the shard is whole: its bytes have the sha256 that was written then."""
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
        self.bad_per_crop: dict[str, int] = {}
        self._card, self._begin, self._where = card, begin, where

    def append(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        source_ids: np.ndarray,
        crops: np.ndarray,
        bad: np.ndarray | None = None,
    ) -> None:
        """Adds the next records of the source: tokens ints (b, n), labels, source_ids and crops ints (b,).

        bad: bool (b,), True for a record to leave out and count, since its image could not be decoded.

        Raises: StoreError, before anything is taken, for a wrong shape, a token outside the codebook, a label outside
          the classes, a crop that the card does not name, or more records than the span has.
        """
        tokens, labels, crops = np.asarray(tokens), np.asarray(labels), np.asarray(crops)
        if tokens.ndim != 2 or tokens.shape[1] != self._card["num_tokens"]:
            raise StoreError(f"{self._where}: tokens are {tokens.shape}, expected (b, {self._card['num_tokens']})")
        if not len(tokens) == len(labels) == len(source_ids) == len(crops):
            raise StoreError(f"{self._where}: tokens, labels, source_ids and crops differ in length")
        if self.seen + len(tokens) > len(self.records):
            raise StoreError(f"{self._where}: more than its {len(self.records)} records were appended")
        good = np.ones(len(tokens), bool) if bad is None else ~np.asarray(bad)
        # Checked before the cast to two bytes, which would wrap a wrong token round into a valid one.
        check_ranges(tokens, labels, crops, self._card, self._where, self._begin + self.seen)
        records = self.records[self.kept : self.kept + good.sum()]
        records["tokens"], records["label"] = tokens[good], labels[good]
        records["source_id"], records["crop"] = np.asarray(source_ids)[good], crops[good]
        self.bad += (self._begin + self.seen + np.flatnonzero(~good)).tolist()
        for crop in crops[~good].tolist():
            self.bad_per_crop[str(crop)] = self.bad_per_crop.get(str(crop), 0) + 1
        self.seen += len(tokens)
        self.kept += len(records)


def sweep(folder: Path, card: Mapping[str, Any]) -> None:
    """Removes from a finished store what was only needed to make it, and shards of an earlier one."""
    keep = {"card.json", *(shard["name"] for shard in card["shards"])}
    for path in [*folder.glob("shard-*"), folder / "making.json", *folder.glob("*.tmp")]:
        if path.name not in keep:
            path.unlink(missing_ok=True)


def _total(sidecars: list[dict[str, Any]], name: str) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for sidecar in sidecars:
        total.update(sidecar[name])
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def _write_whole(path: Path, content: list[bytes]) -> None:
    """A file is whole under its name or not there at all; the temporary one is this process's own."""
    if isinstance(path, BucketPath):
        path.write_bytes(b"".join(content))
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
