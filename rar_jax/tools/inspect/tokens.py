"""`inspect` of a token store."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import numpy as np

from rar_jax.errors import StoreError
from rar_jax.metrics.reconstruction import measure_code_usage
from rar_jax.runs.progress import track_progress
from rar_jax.tokens.store import TokenStore
from rar_jax.tools.inspect.text import LISTED, Report, class_lines, problem_lines, readable

_BLOCK = 65_536  # records of a store at a time


def inspect_tokens(what: str, *, problems: int = LISTED, quiet: bool = False) -> Report:
    """Verifies and counts a token store.

    Returns: a report; of a damaged store "codes" and "per_class" are None.
    Raises: StoreError if it cannot be opened.
    """
    store = TokenStore(what)
    card, found = store.card, []
    shown = functools.partial(track_progress, quiet=quiet)
    codes: dict[str, Any] | None = None
    per_class = np.zeros(store.num_classes, np.int64)
    try:
        store.verify(seen=functools.partial(shown, description=f"verify {what}", unit="shards"))
    except StoreError as error:
        found.append([what, str(error)])
    else:
        used = np.zeros(store.codebook_size, np.int64)
        for start in shown(range(0, len(store), _BLOCK), description=f"count {what}", unit="blocks"):
            rows = store.gather(np.arange(start, min(start + _BLOCK, len(store))))
            used += np.bincount(rows["tokens"].reshape(-1), minlength=len(used))
            per_class += np.bincount(rows["labels"], minlength=len(per_class))
        codes = {"used": int((used > 0).sum()), **measure_code_usage(used)}
    files = [store.folder / shard["name"] for shard in card["shards"]]
    keys = ("source", "tokenizer_sha256", "codebook_size", "grid", "crops", "num_classes")
    return {
        "kind": "token store",
        "name": what,
        **{key: card[key] for key in keys},
        "tokenizer": card.get("tokenizer"),
        "records": len(store),
        "images": card.get("num_images"),
        "bad_images": card.get("num_bad_images"),
        "shards": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "codes": codes,
        "class_names": list(store.class_names),
        "per_class": per_class.tolist() if codes else None,
        "problems": {"total": len(found), "first": found[:problems]},
    }


def tell_tokens(report: Report) -> list[str]:
    """The report of `inspect_tokens` as lines."""
    codes, tokenizer = report["codes"], report["tokenizer"] or {}
    made_by = f"{tokenizer.get('name', 'a tokenizer')}, sha256 {report['tokenizer_sha256'] or 'not known'}"
    lines = [
        f"{report['name']}, a token store",
        f"  source     {report['source']}",
        f"  tokenizer  {made_by}",
        f"  records    {report['records']:,} of a grid {report['grid']} of tokens, {report['codebook_size']:,} codes",
    ]
    if report["images"] is not None:
        crops = f"{len(report['crops'])} crop(s): {'; '.join(report['crops'])}"
        lines.append(f"  images     {report['images']:,}; {report['bad_images']:,} more could not be decoded")
        lines.append(f"  crops      {crops}")
    lines.append(f"  shards     {report['shards']:,}, {readable(report['bytes'])}")
    if codes:
        lines.append(f"  codes      {codes['used']:,} are used, perplexity {codes['perplexity']:,.1f}")
        lines += class_lines(report["class_names"], report["per_class"], "records")
        lines.append("  checksums  verified")
    lines += problem_lines(report)
    return [*lines, f"  pictures   rar-jax tokenize --verify {report['name']} --weights TOKENIZER"]


def is_store(what: str) -> bool:
    """Also an unfinished one, of which opening tells what is missing."""
    folder = pathlib.Path(what)
    return (folder / "card.json").is_file() or (folder / "making.json").is_file()
