"""Looks at token stores: checks one, draws a sample of it as images, brings one in from JSONL and out again."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from rar_jax.config import require
from rar_jax.data import imagenet
from rar_jax.errors import ConfigError, StoreError
from rar_jax.experiment import Experiment
from rar_jax.runs.pictures import save_image_grid
from rar_jax.sampling import to_uint8
from rar_jax.tokens.jsonl import export_jsonl, import_jsonl
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import SHARD_RECORDS
from rar_jax.weights.loading import open_weights
from rar_jax.weights.registry import locate
from rar_jax.weights.stages import origin_sha256

ROWS, COLUMNS = 8, 8  # classes, and images of each, in the picture


def verify_tokens(
    folder: pathlib.Path,
    *,
    weights: str | None = None,
    out: pathlib.Path | None = None,
    download: bool = False,
    quiet: bool = False,
) -> str:
    """Reads and checks a whole store; with the tokenizer's weights, decodes a sample of it into a PNG.

    Args:
      weights: the tokenizer's file, directory or released name. out: the PNG, default folder/verify.png.

    Returns: a summary, some lines.
    Raises: StoreError if the store is damaged, or was made by another tokenizer than `weights`; ConfigError, WeightsError
      or CheckpointError if the weights cannot be used.
    """
    require(
        weights is not None or out is None, "--out is for the picture, which needs the tokenizer: give --weights too"
    )
    store = TokenStore(folder)
    store.verify(seen=_shown(f"verify {folder.name}", "shards", quiet))
    lines = [summary(store)]
    if weights is not None:
        out = out or folder / "verify.png"
        lines.append(f"  picture    {_draw(store, weights, out, download)}")
    return "\n".join(lines)


def summary(store: TokenStore) -> str:
    """What a store holds, some lines."""
    card = store.card
    lines = [
        f"{store.folder}: whole and undamaged",
        f"  records    {len(store):,} of {store.num_tokens} tokens, {card['codebook_size']:,} codes, in "
        f"{len(card['shards'])} shards",
    ]
    if card["schema_version"] > 1:
        per_class = card["records_per_class"]
        lines += [
            f"  images     {card['num_images']:,}, each in {len(card['crops'])} crop(s); {card['num_bad_images']:,} could "
            "not be decoded and are left out",
            f"  classes    {card['num_classes']:,}, of {min(per_class):,} to {max(per_class):,} records",
        ]
    lines += [f"  source     {card['source']}", f"  tokenizer  {card['tokenizer_sha256'] or 'not known'}"]
    return "\n".join(lines)


def sample_of(store: TokenStore, rows: int = ROWS, columns: int = COLUMNS) -> tuple[np.ndarray, list[int]]:
    """Records for a picture: the first `columns` of each of `rows` classes, evenly spread over those that have records.

    Returns: indices int64 (classes * columns,), class after class, with fewer columns where a class has fewer records;
      and the classes.
    """
    found: dict[int, list[int]] = {}
    count, at = len(store), 0
    while at < count:  # a block at a time: labels of a large store do not belong in memory
        labels = store.gather(np.arange(at, min(at + 65_536, count)))["labels"]
        for label in np.unique(labels).tolist():
            first = found.setdefault(label, [])
            if len(first) < columns:
                first += (at + np.flatnonzero(labels == label)[: columns - len(first)]).tolist()
        at += len(labels)
    known = sorted(found)
    shown = [known[i] for i in np.unique(np.linspace(0, len(known) - 1, rows).astype(int))]
    width = min(len(found[label]) for label in shown)
    return np.array([i for label in shown for i in found[label][:width]], np.int64), shown


def _draw(store: TokenStore, weights: str, out: pathlib.Path, download: bool) -> pathlib.Path:
    given = open_weights(locate(weights, download=download), "tokenizers", num_tokens=store.num_tokens)
    made_by = store.card["tokenizer_sha256"]
    if made_by is not None and made_by not in (origin_sha256(given), given.sha256()):
        raise StoreError(
            f"{store.folder} was made by the tokenizer with sha256 {made_by[:12]}..., {given.path} has "
            f"{origin_sha256(given)[:12]}...: its pictures would mean nothing. Give the tokenizer that made it"
        )
    module, config = given.model.module, given.model.config
    num_tokens = int(np.prod(module.token_spec(config).shape))
    if (num_tokens, config.codebook_size) != (store.num_tokens, store.codebook_size):
        raise StoreError(
            f"{store.folder} has {store.num_tokens} tokens of {store.codebook_size} codes, {given.path} decodes "
            f"{num_tokens} of {config.codebook_size}: give the tokenizer that made it"
        )
    indices, shown = sample_of(store)
    decode = jax.jit(lambda params, tokens: to_uint8(module.decode(config, params, tokens)))
    params, tokens = given.place(), store.gather(indices)["tokens"]
    # A row at a time: 64 images of full size are more than a small machine may hold.
    rows = np.split(tokens, len(shown))
    images = np.concatenate([np.asarray(decode(params, row)) for row in rows])
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
    shard_records: int = SHARD_RECORDS,
    quiet: bool = False,
) -> TokenStore:
    """Makes a token store of the authors' maskgitvq.jsonl. What is not given is the experiment's, or else 1024 codes,
    1000 classes and 256 tokens.

    Raises: StoreError naming the file and line that is wrong, or if `out` holds another store; ConfigError.
    """
    num_tokens, class_names = 256, ()
    if experiment is not None:
        tokenizer, data = experiment.tokenizer, experiment.data
        num_tokens = int(np.prod(tokenizer.module.token_spec(tokenizer.config).shape))
        codebook_size = codebook_size or tokenizer.config.codebook_size
        num_classes = num_classes or data.num_classes
        class_names = data.class_names if num_classes == data.num_classes else ()
    codebook_size, num_classes = codebook_size or 1024, num_classes or 1000
    require(codebook_size > 0 and num_classes > 0 and shard_records > 0, "the numbers of --import must be positive")
    if not class_names:
        class_names = imagenet.class_names() if num_classes == 1000 else tuple(str(i) for i in range(num_classes))
    if not path.is_file():
        raise ConfigError(f"--import {path}: no such file, look for a mistyped path")
    store = import_jsonl(
        path,
        out,
        codebook_size=codebook_size,
        class_names=class_names,
        num_tokens=num_tokens,
        shard_records=shard_records,
        seen=_shown(f"import {path.name}", "shards", quiet),
    )
    if not quiet:
        print(summary(store))
    return store


def export_tokens(folder: pathlib.Path, out: pathlib.Path, *, quiet: bool = False) -> None:
    """Writes a token store as the authors' code reads it, maskgitvq.jsonl. Raises: StoreError, ConfigError."""
    require(not out.exists(), f"--out {out} exists: choose another, or move it away")
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}")
    store = TokenStore(folder)
    store.verify(seen=_shown(f"verify {folder.name}", "shards", quiet))
    export_jsonl(store, out, seen=_shown(f"export {folder.name}", "blocks", quiet))


def _shown(description: str, unit: str, quiet: bool) -> Any:
    return functools.partial(track_progress, description=description, unit=unit, quiet=quiet)
