"""The authors' file of tokens: one JSON object a line, {"class_id": int, "tokens": [256 ints]} (maskgitvq.jsonl).

Read and written a line at a time: theirs has about 15 GB.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rar_jax.errors import StoreError
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import SHARD_RECORDS, TokenStoreWriter

_ROWS = 4096  # lines at a time


class Rows(NamedTuple):
    """Some lines: tokens int64 (b, n), labels int64 (b,)."""

    tokens: np.ndarray
    labels: np.ndarray


def count_lines(path: pathlib.Path) -> int:
    """Lines of a file; the last one need not end in a newline."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 18):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def import_jsonl(
    path: pathlib.Path,
    out: pathlib.Path,
    *,
    codebook_size: int,
    class_names: Sequence[str],
    num_tokens: int = 256,
    shard_records: int = SHARD_RECORDS,
    tokenizer_sha256: str | None = None,
    seen: Any = iter,
) -> TokenStore:
    """Makes a token store of a JSONL file, or goes on with one that was interrupted. Source ids are line numbers from 0.

    Args:
      tokenizer_sha256: of the tokenizer that made the tokens, where it is known.
      seen: what an iterable of blocks of lines is passed through, to show progress.

    Raises: StoreError naming the file and line that is not such an object, has another number of tokens, or a token or
      class out of range; OSError if the file cannot be read.
    """
    size = path.stat().st_size
    if not (lines := count_lines(path)):
        raise StoreError(f"{path} is empty")
    card: Mapping[str, Any] = {
        "codebook_size": codebook_size,
        "grid": [num_tokens],
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "crops": ["as in the file"],
        "source": f"{path.name} ({size} bytes)",
        "tokenizer_sha256": tokenizer_sha256,
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
                for rows in _parse(file, path, begin, end, num_tokens, codebook_size, len(class_names)):
                    ids = np.arange(begin + shard.seen, begin + shard.seen + len(rows.labels))
                    shard.append(rows.tokens, rows.labels, ids, np.zeros(len(ids), np.int16))
    writer.finish()
    return TokenStore(out)


def _parse(
    file: Any, path: pathlib.Path, begin: int, end: int, num_tokens: int, codebook_size: int, num_classes: int
) -> Iterator[Rows]:
    """The lines [begin, end), from the file's position, in blocks."""
    for start in range(begin, end, _ROWS):
        count = min(_ROWS, end - start)
        tokens, labels = np.empty((count, num_tokens), np.int64), np.empty(count, np.int64)
        for i in range(count):
            line = file.readline()
            try:
                labels[i], tokens[i] = _line(line, num_tokens, num_classes)
            except (ValueError, OverflowError) as error:
                raise StoreError(f"{path} line {start + i + 1}: {error}") from None
        if tokens.min() < 0 or tokens.max() >= codebook_size:
            i, n = np.argwhere((tokens < 0) | (tokens >= codebook_size))[0]
            raise StoreError(
                f"{path} line {start + i + 1}: token {n} is {tokens[i, n]}, outside 0..{codebook_size - 1}; a tokenizer "
                "with more codes needs --codebook-size"
            )
        yield Rows(tokens, labels)


def _line(line: bytes, num_tokens: int, num_classes: int) -> tuple[int, list[int]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'this is not JSON ({error}): a line is {{"class_id": int, "tokens": [ints]}}') from None
    if not isinstance(record, dict) or "class_id" not in record or "tokens" not in record:
        raise ValueError('this is no object {"class_id": int, "tokens": [ints]}')
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
    """Writes a store as the authors' code reads it; the file is whole or not there. Crop and image ids are lost.

    Raises: OSError if it cannot be written.
    """
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
