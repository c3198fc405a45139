"""Verify token stores, draw a sample of one, convert from and to JSONL."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np

from rar_jax.config import require
from rar_jax.data import imagenet
from rar_jax.errors import ConfigError, StoreError
from rar_jax.experiment import Experiment
from rar_jax.models import draw_tokens, load_model, store_spec, token_spec
from rar_jax.runs.pictures import save_image_grid
from rar_jax.runs.progress import track_progress
from rar_jax.sampling import to_uint8
from rar_jax.tokens.jsonl import export_jsonl, import_jsonl
from rar_jax.tokens.store import TokenStore
from rar_jax.weights.loading import Reading, open_weights
from rar_jax.weights.stages import origin_sha256

ROWS, COLUMNS = 8, 8  # classes, and images of each, in the picture


def verify_tokens(
    folder: pathlib.Path,
    *,
    weights: str | None = None,
    out: pathlib.Path | None = None,
    reading: Reading = Reading(),
    quiet: bool = False,
) -> str:
    """Verify a store; with the tokenizer's weights, decode a sample into a PNG.

    Args:
      weights: the tokenizer's file, directory or released name. out: the PNG, default folder/verify.png.

    Returns: a summary of several lines.
    Raises: StoreError if the store is damaged, or was made by another tokenizer than `weights`.
    """
    require(weights is not None or out is None, "--out is the picture, which needs the tokenizer: give --weights too")
    store = TokenStore(folder)
    store.verify(seen=_show_progress(f"verify {folder.name}", "shards", quiet))
    text = summarize_store(store)
    if weights is None:
        return text
    return f"{text}\n  picture    {_draw_sample(store, weights, out or folder / 'verify.png', reading)}"


def summarize_store(store: TokenStore) -> str:
    """Describe a verified store in several lines."""
    card, per_class = store.card, store.card["records_per_class"]
    bad = f"{card['num_bad_images']:,} could not be decoded and are left out"
    return "\n".join(
        [
            f"{store.folder}: whole and undamaged",
            f"  records    {len(store):,} of {store.spec}, in {len(card['shards'])} shards",
            f"  images     {card['num_images']:,}, each in {len(card['crops'])} crop(s); {bad}",
            f"  classes    {card['num_classes']:,}, of {min(per_class):,} to {max(per_class):,} records",
            f"  source     {card['source']}",
            f"  tokenizer  {card['tokenizer_sha256'] or 'unknown'}",
        ]
    )


def select_sample(store: TokenStore, rows: int = ROWS, columns: int = COLUMNS) -> tuple[np.ndarray, list[int]]:
    """Select the first `columns` records of each of `rows` evenly spaced classes.

    Returns: indices int64 (classes * columns,), class after class, and the classes. All have as many as the smallest.
    """
    found: dict[int, list[int]] = {}
    for at in range(0, len(store), 65_536):  # in blocks: labels of a large store do not fit in memory
        labels = store.gather(np.arange(at, min(at + 65_536, len(store))))["labels"]
        for label in np.unique(labels).tolist():
            first = found.setdefault(label, [])
            if len(first) < columns:
                first += (at + np.flatnonzero(labels == label)[: columns - len(first)]).tolist()
    known = sorted(found)
    shown = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, rows).astype(int))]
    width = min(len(found[label]) for label in shown)
    return np.array([i for label in shown for i in found[label][:width]], np.int64), shown


def _draw_sample(store: TokenStore, weights: str, out: pathlib.Path, reading: Reading) -> pathlib.Path:
    made_with = store.card.get("tokenizer")
    like = load_model({"tokenizer": made_with}, "tokenizers") if made_with else None
    given = open_weights(weights, "tokenizers", reading=reading, like=like)
    made_by, ours = store.card["tokenizer_sha256"], origin_sha256(given)
    if made_by is not None and made_by not in (ours, given.sha256()):
        raise StoreError(
            f"{store.folder} was made by the tokenizer with sha256 {made_by[:12]}..., {given.path} has {ours[:12]}.... "
            "Give the tokenizer that made it"
        )
    module, config = given.model.module, given.model.config
    if store.spec != (spec := store_spec(given.model)):
        raise StoreError(
            f"{store.folder} holds {store.spec}, {given.path} makes {spec}: give the tokenizer that made it"
        )
    indices, shown = select_sample(store)

    @jax.jit
    def decode(params: Any, stored: jax.Array) -> jax.Array:
        return to_uint8(module.decode(config, params, draw_tokens(given.model, stored)))

    params, tokens = given.place(), store.gather(indices)["tokens"]
    # Row by row: 64 images of full size may not fit in memory.
    images = np.concatenate([np.asarray(decode(params, row)) for row in np.split(tokens, len(shown))])
    names = [store.class_names[label].split(",")[0] for label in shown]
    save_image_grid(images, names, out, title=f"decoded tokens of {store.folder.name}")
    return out


# ---------------------------------------------------------------- JSONL


def import_tokens(
    path: pathlib.Path,
    out: pathlib.Path,
    *,
    experiment: Experiment | None = None,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    shard_records: int | None = None,
    quiet: bool = False,
) -> TokenStore:
    """Make a token store of the authors' maskgitvq.jsonl.

    Sizes default to the experiment's, without one to 1024 codes, 1000 classes and 256 tokens.
    """
    num_tokens, class_names = 256, ()
    if experiment is not None:
        tokenizer, data = experiment.tokenizer, experiment.data
        spec = token_spec(tokenizer)
        num_tokens, codebook_size = math.prod(spec.shape), codebook_size or spec.vocab
        num_classes = num_classes or data.num_classes
        class_names = data.class_names if num_classes == data.num_classes else ()
    codebook_size, num_classes = codebook_size or 1024, num_classes or 1000
    positive = codebook_size > 0 and num_classes > 0 and (shard_records is None or shard_records > 0)
    require(positive, "the numbers of --import must be positive")
    if not class_names:
        class_names = imagenet.class_names() if num_classes == 1000 else tuple(str(i) for i in range(num_classes))
    if not path.is_file():
        raise ConfigError(f"--import {path}: no such file")
    store = import_jsonl(
        path,
        out,
        codebook_size=codebook_size,
        class_names=class_names,
        num_tokens=num_tokens,
        shard_records=shard_records,
        seen=_show_progress(f"import {path.name}", "shards", quiet),
    )
    if not quiet:
        print(summarize_store(store))
    return store


def export_tokens(folder: pathlib.Path, out: pathlib.Path, *, quiet: bool = False) -> None:
    """Write a store as the authors' JSONL. Raises: StoreError, ConfigError."""
    require(not out.exists(), f"--out {out} exists: choose another, or move it away")
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}")
    store = TokenStore(folder)
    store.verify(seen=_show_progress(f"verify {folder.name}", "shards", quiet))
    export_jsonl(store, out, seen=_show_progress(f"export {folder.name}", "blocks", quiet))


def _show_progress(description: str, unit: str, quiet: bool) -> Any:
    return functools.partial(track_progress, description=description, unit=unit, quiet=quiet)
