"""`inspect` of a token store."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from rar_jax.errors import StoreError
from rar_jax.metrics.reconstruction import measure_code_usage
from rar_jax.runs.progress import track_progress
from rar_jax.tokens.store import TokenStore
from rar_jax.tools.inspect.layout import LISTED, Summary

BLOCK = 65_536  # records that are counted at a time


def is_token_store(target: str) -> bool:
    """Whether it is a token store. Opening an unfinished one says what is missing."""
    return any((pathlib.Path(target) / name).is_file() for name in ("card.json", "making.json"))


def inspect_token_store(target: str, *, max_problems: int = LISTED, quiet: bool = False) -> Summary:
    """Verify a token store, and count its codes and classes.

    Raises: StoreError if it cannot be opened.
    """
    store = TokenStore(target)
    shown = functools.partial(track_progress, quiet=quiet)
    counted: dict[str, Any] = {"checksums": "verified"}
    problems = []
    try:
        store.verify(seen=functools.partial(shown, description=f"verify {target}", unit="shards"))
        blocks = shown(range(0, len(store), BLOCK), description=f"count {target}", unit="blocks")
        counted |= _measure_tokens(store, blocks)
        per_class = zip(store.card["records_per_class"], store.class_names, strict=True)
        counted["classes"] = [{"count": count, "class": name} for count, name in per_class]
    except StoreError as error:
        counted = {}
        problems.append({"name": target, "reason": str(error)})
    keys = ("source", "tokenizer", "tokenizer_sha256", "crops", "num_images", "num_bad_images")
    return {
        "kind": "token store",
        "name": target,
        "tokens": str(store.spec),
        **{key: store.card.get(key) for key in keys},
        "num_records": len(store),
        "num_shards": len(store.card["shards"]),
        "bytes": sum((store.folder / shard["name"]).stat().st_size for shard in store.card["shards"]),
        "num_classes": store.num_classes,
        **counted,
        "num_problems": len(problems),
        "problems": problems[:max_problems],
        "to_see_it": f"rar-jax tokenize --verify {target} --weights TOKENIZER",
    }


def _measure_tokens(store: TokenStore, blocks: Iterable[int]) -> dict[str, Any]:
    """Measure the use of codes, or the range, mean and standard deviation of latents."""
    per_code = np.zeros(store.spec.vocab or 0, np.int64)
    lowest, highest, sums = np.inf, -np.inf, np.zeros(2)
    for start in blocks:
        tokens = store.gather(np.arange(start, min(start + BLOCK, len(store))))["tokens"]
        if store.spec.vocab is not None:
            per_code += np.bincount(tokens.reshape(-1), minlength=len(per_code))
        else:
            lowest, highest = min(lowest, float(tokens.min())), max(highest, float(tokens.max()))
            sums += [tokens.sum(dtype=np.float64), np.square(tokens, dtype=np.float64).sum()]
    if store.spec.vocab is not None:
        return {"codes": {"used": int((per_code > 0).sum()), **measure_code_usage(per_code)}}
    mean, square = sums / (len(store) * math.prod(store.spec.shape))
    return {"latents": {"min": lowest, "max": highest, "mean": mean, "std": math.sqrt(max(square - mean**2, 0.0))}}
