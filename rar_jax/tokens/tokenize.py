"""Tokenize images into a token store, of a work directory or any source.

Each shard is made independently from its records of the source, so an interrupted run resumes with the first missing
shard. Each process makes its own shards on its own devices, at its own pace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import require, to_dict
from rar_jax.data.loader import Batch, sequential_batches
from rar_jax.data.sources import ImageSource, Split
from rar_jax.errors import StoreError
from rar_jax.experiment import Experiment, open_images, open_source
from rar_jax.models import Model, store_spec
from rar_jax.parallel.arrays import make_global_batch
from rar_jax.parallel.mesh import batch_divisor, own_mesh, with_device_dtype
from rar_jax.parallel.processes import barrier, from_main, is_main
from rar_jax.parallel.rules import replicated, sharded
from rar_jax.runs.bucket import remove_tree
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import TokenStoreWriter, find_difference, remove_leftovers
from rar_jax.weights.loading import Reading, open_weights
from rar_jax.weights.stages import check_tokenizer, origin_sha256, stage_origin_sha256, trained_params

log: logging.Logger = logging.getLogger(__name__)
BATCH = 256
# The crops of each way to cut an image, in the order of their ids.
_FIVE = ("upper left", "upper right", "lower left", "lower right", "center")
CROPS: dict[str, tuple[str, ...]] = {
    "pad": ("whole image",),
    "center": ("center",),
    "ten": (*_FIVE, *(f"{name}, mirrored" for name in _FIVE)),
}


# ---------------------------------------------------------------- entry points


def tokenize(experiment: Experiment, workdir: Workdir, mesh: Mesh, split: Split, *, quiet: bool = False) -> None:
    """Write workdir/tokens/<split>: each image once, in the source's order.

    A valid store is kept, an interrupted one is resumed, and one of another tokenizer or source is recreated. A split
    whose tokens are configured (config.data.tokens) is skipped. Raises: CheckpointError, ConfigError.
    """
    require(not experiment.data.on_the_fly, "data.on_the_fly is set: images are encoded in training")
    if experiment.data.given_tokens(split):
        return
    params, manifest = trained_params(experiment, "tokenizer", workdir, own_mesh(mesh))
    origin = stage_origin_sha256(experiment, workdir)
    if has_tokens(workdir, split, (manifest, origin)):
        return
    source = open_source(experiment, split)
    card = _make_card(experiment, source, f"{experiment.data.source} ({split})", origin)
    folder = workdir.tokens(split)
    make_writer = functools.partial(TokenStoreWriter, folder, card, source_records=len(source))

    def claim_folder() -> None:
        if (folder / "card.json").exists():
            remove_tree(folder)  # damaged, or of another tokenizer
        try:
            make_writer()
        except StoreError:  # the beginning of another store
            remove_tree(folder)
            make_writer()

    from_main(claim_folder)
    writer = make_writer(**_this_process())
    workers, name = experiment.data.workers, f"tokenize {split}"
    write_store(writer, source, experiment.tokenizer, params, mesh, num_workers=workers, name=name, quiet=quiet)


def tokenize_source(
    experiment: Experiment,
    mesh: Mesh,
    *,
    source: str,
    weights: str,
    out: pathlib.Path,
    crops: str | None = None,
    split: Split = "train",
    shard_records: int | None = None,
    batch_size: int = BATCH,
    reading: Reading = Reading(),
    quiet: bool = False,
) -> None:
    """Write a store of the images of `source` into `out`, or resume one.

    Args:
      experiment: defines images and tokenizer; its own source and tokenizer weights are not used.
      weights: the tokenizer's file, directory or released name.
      crops: one of CROPS; default, the source's own.

    Raises: ConfigError, WeightsError, CheckpointError; StoreError if `out` holds another store.
    """
    require(crops is None or crops in CROPS, f"--crops {crops}: choose one of {', '.join(CROPS)}")
    require(batch_size >= 1, f"--batch-size is {batch_size}: it must be at least 1")
    require(shard_records is None or shard_records >= 1, f"--shard-records is {shard_records}: it must be at least 1")
    tokenizer = open_weights(weights, "tokenizers", reading=reading, like=experiment.tokenizer)
    check_tokenizer(experiment, tokenizer, f"--weights {tokenizer.path}")
    images = open_images(experiment.data, source, split, crop=crops)
    card = _make_card(experiment, images, f"{source} ({split})", origin_sha256(tokenizer))
    if from_main(lambda: _check_finished(out, card, len(images))):
        return
    writer = TokenStoreWriter(out, card, source_records=len(images), shard_records=shard_records, **_this_process())
    params, workers, name = tokenizer.place(own_mesh(mesh)), experiment.data.workers, f"tokenize {source}"
    options = {"batch_size": batch_size, "num_workers": workers, "name": name, "quiet": quiet}
    write_store(writer, images, experiment.tokenizer, params, mesh, **options)


def has_tokens(workdir: Workdir, split: Split, hashes: Sequence[str]) -> bool:
    """Return whether a valid store is of these tokenizer hashes; all processes call."""

    def check() -> bool:
        try:
            store = TokenStore(workdir.tokens(split))
            store.verify()
        except StoreError as error:
            if (workdir.tokens(split) / "card.json").is_file():  # otherwise it is only unfinished
                log.warning("%s", error)
            return False
        if store.card["tokenizer_sha256"] not in hashes:
            return False
        remove_leftovers(store.folder, store.card)
        return True

    return from_main(check)


# ---------------------------------------------------------------- writing


class Written(NamedTuple):
    """Result of `write_store`. seconds: with compilation. waited: for the loader."""

    records: int
    seconds: float
    waited: float


def write_store(
    writer: TokenStoreWriter,
    source: ImageSource,
    tokenizer: Model,
    params: Any,
    mesh: Mesh,
    *,
    batch_size: int = BATCH,
    num_workers: int = 0,
    name: str = "tokenize",
    quiet: bool = False,
) -> Written:
    """Encode the records of the writer's missing shards and finish the store.

    Batches do not cross the end of a shard, so a record's batch, and every bit of its tokens, does not depend on where
    a run was interrupted.

    Args:
      params: the tokenizer's, on `own_mesh(mesh)`.
      mesh: of all processes; `batch_size` images are spread over its devices.
    """
    batch_size = round(batch_size * own_mesh(mesh).size / mesh.size)
    mesh = own_mesh(mesh)
    size = -(-batch_size // batch_divisor(mesh)) * batch_divisor(mesh)
    encode = jit_encode(Model(tokenizer.module, with_device_dtype(tokenizer.config)), mesh)
    missing = writer.missing()
    spans = [writer.span(j) for j in missing]
    sizes = [min(size, end - at) for begin, end in spans for at in range(begin, end, size)]
    stream = sequential_batches(source, global_batch=size, num_workers=num_workers, spans=spans)
    encode_images = lambda x: encode(params, make_global_batch({"images": x}, mesh)["images"])  # noqa: E731
    began, waits = time.perf_counter(), []
    with sharded(mesh), contextlib.closing(stream):
        rows = track_progress(
            _encode_batches(stream, encode_images, waits),
            total=writer.source_records,
            description=name,
            unit="images",
            quiet=quiet,
            sizes=sizes,
            done=writer.source_records - sum(sizes),
        )
        for j, (begin, end) in zip(missing, spans, strict=True):
            with writer.shard(j) as shard:
                while shard.seen < end - begin:
                    batch, tokens = next(rows)
                    real = batch["weights"] > 0
                    none = np.zeros(len(real), np.int16)
                    crops, bad = batch.get("crops", none), batch.get("bad", none > 0)
                    shard.append(tokens[real], batch["labels"][real], batch["ids"][real], crops[real], bad[real])
        assert next(rows, None) is None  # so that the progress line shows the end
    barrier(f"{name}: all shards written")
    if not from_main(writer.finish):
        raise StoreError(f"{writer.folder}: shards are missing: run tokenize again")
    written = Written(sum(sizes), time.perf_counter() - began, sum(waits))
    if not quiet and is_main():
        _print_summary(TokenStore(writer.folder), source, written, name)
    return written


def jit_encode(tokenizer: Model, mesh: Mesh) -> Any:
    """Jit (params, images (b, y, x, c) uint8) -> what a store keeps (b, ...), replicated over the mesh."""
    encode = functools.partial(tokenizer.module.encode, tokenizer.config)
    return jax.jit(encode, out_shardings=replicated(mesh))


def _encode_batches(stream: Iterator[Batch], encode: Any, waits: list[float]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches with tokens while the next is encoded; time waits."""
    queue: list[tuple[Batch, jax.Array]] = []
    while True:
        began = time.perf_counter()
        batch = next(stream, None)
        waits.append(time.perf_counter() - began)
        if batch is not None:
            queue.append((batch, encode(batch["images"])))
        if not queue:
            return
        if batch is None or len(queue) == 2:
            before, tokens = queue.pop(0)
            yield before, np.asarray(tokens)


def _print_summary(store: TokenStore, source: ImageSource, written: Written, name: str) -> None:
    if written.records:  # on stderr, as the progress
        rate, share = written.records / written.seconds, written.waited / written.seconds
        speed = f"{written.seconds:,.1f} s, {rate:.3g} records/s, loader wait {share:.1%}"
        print(f"{name}: {written.records:,} records in {speed}", file=sys.stderr)
    if store.card["num_bad_images"]:
        print(f"{store.card['num_bad_images']} images could not be decoded and were left out:")
        # Those of this process, without the problems of listing the source.
        problems: Iterable[tuple[str, str]] = getattr(source, "problems", ())
        listed = len(getattr(source, "listed", ()))
        for image, reason in itertools.islice(problems, listed, listed + 10):
            print(f"  {image}: {reason}")


def _this_process() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _make_card(experiment: Experiment, source: ImageSource, what: str, tokenizer_sha256: str) -> dict[str, Any]:
    crop = getattr(source, "crop", "pad")  # sources of one image size do not crop
    require(crop in CROPS, f"{what}: {crop} crops cannot be tokenized: choose one of {', '.join(CROPS)}")
    tokenizer = experiment.tokenizer
    return {
        "spec": dataclasses.asdict(store_spec(tokenizer)),
        "num_classes": experiment.data.num_classes,
        "class_names": list(experiment.data.class_names),
        "crops": list(CROPS[crop]),
        "source": what,
        "tokenizer_sha256": tokenizer_sha256,
        "tokenizer": {"name": tokenizer.name, **to_dict(tokenizer.config)},
    }


def _check_finished(out: pathlib.Path, card: dict[str, Any], source_records: int) -> bool:
    """Return whether `out` is finished. Raises: StoreError if it is another store."""
    if not (out / "card.json").exists():
        return False
    store = TokenStore(out)
    store.verify()
    there = store.card | {"source_records": store.card["shards"][-1]["span"][1]}
    now = json.loads(json.dumps(card)) | {"source_records": source_records}
    if difference := find_difference({key: there.get(key) for key in now}, now):
        finished = f"{out} holds a finished store of something else ({difference})"
        raise StoreError(f"{finished}: choose another --out, or remove it")
    remove_leftovers(out, store.card)
    return True
