"""The authors' token file: lines of {"class_id": int, "tokens": [256 ints]}.

Read and written line by line: theirs has about 15 GB.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rar_jax.errors import StoreError
from rar_jax.models import TokenSpec
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter

_ROWS = 4096  # lines at a time


def import_jsonl(
    path: pathlib.Path,
    out: pathlib.Path,
    *,
    codebook_size: int,
    class_names: Sequence[str],
    num_tokens: int = 256,
    shard_records: int | None = None,
    seen: Any = iter,
) -> TokenStore:
    """Make or resume a store of a JSONL file. Source ids are line numbers from 0.

    seen: the shards are passed through it, to show progress.

    Raises: StoreError naming the file and line that is wrong; OSError if the file cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if not (lines := sum(1 for _ in file)):
            raise StoreError(f"{path} is empty")
    spec = TokenSpec((num_tokens,), "uint16" if codebook_size <= 2**16 else "uint32", codebook_size)
    card: Mapping[str, Any] = {
        "spec": dataclasses.asdict(spec),
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "crops": ["as in the file"],
        "source": f"{path.name} ({size} bytes)",
        "tokenizer_sha256": None,
    }
    writer = TokenStoreWriter(out, card, source_records=lines, shard_records=shard_records)
    missing = set(writer.missing())
    with open(path, "rb") as file:
        for j in seen(range(writer.num_shards)):
            begin, end = writer.span(j)
            if j not in missing:
                for _ in range(begin, end):
                    file.readline()
                continue
            with writer.shard(j) as shard:
                for tokens, labels in _parse_lines(file, path, begin, end, card):
                    ids = np.arange(begin + shard.seen, begin + shard.seen + len(labels))
                    shard.append(tokens, labels, ids, np.zeros(len(ids), np.int16))
    writer.finish()
    return TokenStore(out)


def _parse_lines(
    file: Any, path: pathlib.Path, begin: int, end: int, card: Mapping[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parse lines [begin, end) to blocks of tokens (b, n), labels (b,), int64."""
    (num_tokens,), codebook_size = card["spec"]["shape"], card["spec"]["vocab"]
    for start in range(begin, end, _ROWS):
        count = min(_ROWS, end - start)
        tokens, labels = np.empty((count, num_tokens), np.int64), np.empty(count, np.int64)
        for i in range(count):
            line = file.readline()
            try:
                labels[i], tokens[i] = _parse_line(line, num_tokens, card["num_classes"])
            except (ValueError, OverflowError) as error:
                raise StoreError(f"{path} line {start + i + 1}: {error}") from None
        if tokens.min() < 0 or tokens.max() >= codebook_size:
            i, n = np.argwhere((tokens < 0) | (tokens >= codebook_size))[0]
            raise StoreError(
                f"{path} line {start + i + 1}: token {n} is {tokens[i, n]}, outside 0..{codebook_size - 1}. "
                "For more codes give --codebook-size"
            )
        yield tokens, labels


def _parse_line(line: bytes, num_tokens: int, num_classes: int) -> tuple[int, list[int]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict) or "class_id" not in record or "tokens" not in record:
        raise ValueError('not an object {"class_id": int, "tokens": [ints]}')
    label, tokens = record["class_id"], record["tokens"]
    if type(label) is not int or not 0 <= label < num_classes:
        raise ValueError(f"class_id is {label!r}, outside 0..{num_classes - 1}")
    if not isinstance(tokens, list) or len(tokens) != num_tokens:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise ValueError(f"{count} tokens, expected a list of {num_tokens}")
    # NumPy would round 1.5 and take true for 1.
    if set(map(type, tokens)) != {int}:
        raise ValueError("a token is not an integer")
    return label, tokens


def export_jsonl(store: TokenStore, out: pathlib.Path, *, seen: Any = iter) -> None:
    """Write a store of ids (n,) as JSONL, atomically. Crop and image ids are lost.

    Raises: StoreError for other tokens.
    """
    if store.spec.vocab is None or len(store.spec.shape) != 1:
        raise StoreError(f"{store.folder} holds {store.spec}: JSONL has a line of ids for each image")
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            for start in seen(range(0, len(store), _ROWS)):
                rows = store.gather(np.arange(start, min(start + _ROWS, len(store))))
                for label, tokens in zip(rows["labels"].tolist(), rows["tokens"].tolist(), strict=True):
                    file.write(json.dumps({"class_id": label, "tokens": tokens}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
