"""Turns images into a token store: those of an experiment, for its work directory, or of any source, into a folder.

One code path for both, and for one or many processes: each shard of the store is made by itself from its records of the
source, so that a run that was killed goes on with the first shard that is missing. Each process makes its own shards on its own
devices, at its own pace.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import pathlib
import shutil
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
from rar_jax.models import Model
from rar_jax.parallel.arrays import global_batch
from rar_jax.parallel.mesh import batch_divisor, on_device, own_mesh
from rar_jax.parallel.processes import barrier, from_main, is_main
from rar_jax.parallel.rules import replicated, sharded
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.writer import SHARD_RECORDS, TokenStoreWriter, sweep
from rar_jax.weights.loading import open_weights
from rar_jax.weights.registry import locate
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


# ---------------------------------------------------------------- the two forms


def tokenize(experiment: Experiment, workdir: Workdir, mesh: Mesh, split: Split, *, quiet: bool = False) -> None:
    """Writes workdir/tokens/<split>: each image of the split once, in the source's order. A good store is kept, one that
    was begun is finished, and one of another tokenizer or source is made anew.

    A split whose tokens are given (config.data.tokens) is passed over.

    Raises: CheckpointError if the tokenizer is not trained to its end; ConfigError if the source does not fit, or the
      experiment encodes its images on the fly.
    """
    require(
        not experiment.data.on_the_fly, "data.on_the_fly is set: images are encoded in training, there are no tokens"
    )
    if experiment.data.given_tokens(split):
        return
    params, manifest = trained_params(experiment, "tokenizer", workdir, own_mesh(mesh))
    origin = stage_origin_sha256(experiment, workdir)
    if tokenized(workdir, split, (manifest, origin)):
        return
    source = open_source(experiment, split)
    card = _card(experiment, source, f"{experiment.data.source} ({split})", origin)
    folder = workdir.tokens(split)

    def make_way() -> None:
        if (folder / "card.json").exists():
            shutil.rmtree(folder)  # damaged, or of another tokenizer
        try:
            TokenStoreWriter(folder, card, source_records=len(source))
        except StoreError:  # the beginning of another one
            shutil.rmtree(folder)
            TokenStoreWriter(folder, card, source_records=len(source))

    from_main(make_way)
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    writer = TokenStoreWriter(folder, card, source_records=len(source), **processes)
    workers = experiment.data.workers
    write_store(
        writer, source, experiment.tokenizer, params, mesh, num_workers=workers, name=f"tokenize {split}", quiet=quiet
    )


def tokenize_source(
    experiment: Experiment,
    mesh: Mesh,
    *,
    source: str,
    weights: str,
    out: pathlib.Path,
    crops: str | None = None,
    split: Split = "train",
    shard_records: int = SHARD_RECORDS,
    batch_size: int = BATCH,
    download: bool = False,
    quiet: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
) -> bool:
    """Writes a store of the images of `source` into the folder `out`, or goes on with one that was begun.

    Args:
      experiment: says what the images and the tokenizer are; its own source and tokenizer weights are not used.
      weights: the tokenizer's file, directory or released name.
      crops: "pad" (whole images), "center" or "ten"; default, the source's own.
      process_index, process_count: which shards to write, by default those of this JAX process.

    Returns: whether the store is finished; with several processes it is when each has written its shards and process 0
      came last, or is called again.
    Raises: ConfigError, WeightsError or CheckpointError for a source or tokenizer that does not fit; StoreError if `out`
      holds another store, or the beginning of one.
    """
    require(crops is None or crops in CROPS, f"--crops {crops}: give one of {', '.join(CROPS)}")
    require(batch_size >= 1 and shard_records >= 1, "--batch-size and --shard-records must be at least 1")
    num_tokens = experiment.tokenizer.module.token_spec(experiment.tokenizer.config).shape[0]
    given = open_weights(locate(weights, download=download), "tokenizers", num_tokens=num_tokens)
    check_tokenizer(experiment, given, f"--weights {given.path}")
    images = open_images(experiment.data, source, split, crop=crops)
    card = _card(experiment, images, f"{source} ({split})", origin_sha256(given))

    def finished() -> bool:
        if there := (out / "card.json").exists():
            _check_finished(out, card, len(images))
        return there

    if from_main(finished):
        return True
    writer = TokenStoreWriter(
        out,
        card,
        source_records=len(images),
        shard_records=shard_records,
        process_index=jax.process_index() if process_index is None else process_index,
        process_count=jax.process_count() if process_count is None else process_count,
    )
    return write_store(
        writer,
        images,
        experiment.tokenizer,
        given.place(own_mesh(mesh)),
        mesh,
        batch_size=batch_size,
        num_workers=experiment.data.workers,
        name=f"tokenize {source}",
        quiet=quiet,
    ).finished


def tokenized(workdir: Workdir, split: Split, hashes: Sequence[str]) -> bool:
    """Whether the split's store is whole, undamaged and of the tokenizer that goes by these sha256s. All processes call this."""

    def look() -> bool:
        try:
            store = TokenStore(workdir.tokens(split))
            store.verify()
        except StoreError as error:
            if (workdir.tokens(split) / "card.json").is_file():  # else it is not finished yet, which is no damage
                log.warning("%s", error)
            return False
        if store.card["tokenizer_sha256"] not in hashes:
            return False
        sweep(store.folder, store.card)  # what a kill between the card and the last removal left
        return True

    return from_main(look)


# ---------------------------------------------------------------- the one path


class Written(NamedTuple):
    """What `write_store` did. finished: whether the store is. records: of the source, that it encoded or left out as bad.
    seconds: of the loop, compilation included. waited: those of them in which it stood and waited for the loader."""

    finished: bool
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
    """Encodes the records of the writer's missing shards and finishes the store if all shards are then there.

    Batches do not reach over the end of a shard, so that a record's batch, and with it every bit of its tokens, does not
    depend on where a run was interrupted.

    Args:
      params: the tokenizer's, on `own_mesh(mesh)`.
      mesh: of all processes; `batch_size` is over its devices, so that each has as many images at a time however they are
        shared out.
    """
    share = own_mesh(mesh).size / mesh.size
    mesh = own_mesh(mesh)
    size = -(-round(batch_size * share) // batch_divisor(mesh)) * batch_divisor(mesh)
    encode = jit_encode(Model(tokenizer.module, on_device(tokenizer.config)), mesh)
    missing = writer.missing()
    spans = [writer.span(j) for j in missing]
    sizes = [min(size, end - at) for begin, end in spans for at in range(begin, end, size)]
    stream = sequential_batches(source, global_batch=size, num_workers=num_workers, spans=spans)
    began, batches = time.perf_counter(), _Timed(stream)
    with sharded(mesh), contextlib.closing(stream):
        done = writer.source_records - sum(sizes)
        rows = track_progress(
            _encoded(batches, lambda images: encode(params, global_batch({"images": images}, mesh)["images"])),
            total=writer.source_records,
            description=name,
            unit="images",
            quiet=quiet,
            sizes=sizes,
            done=done,
        )
        for j, (begin, end) in zip(missing, spans, strict=True):
            with writer.shard(j) as shard:
                while shard.seen < end - begin:
                    batch, tokens = next(rows)
                    real = batch["weights"] > 0
                    none = np.zeros(len(real), np.int16)
                    crops, bad = batch.get("crops", none), batch.get("bad", none > 0)
                    shard.append(tokens[real], batch["labels"][real], batch["ids"][real], crops[real], bad[real])
        assert next(rows, None) is None  # and the progress line shows the end
    barrier(f"{name}: all shards written")
    finished = from_main(writer.finish)
    written = Written(finished, sum(sizes), time.perf_counter() - began, batches.waited)
    if not quiet and is_main():
        _tell(writer, source, written, name)
    return written


def jit_encode(tokenizer: Model, mesh: Mesh) -> Any:
    """The jitted function of (params, images (b, y, x, c) uint8) to tokens, which every process of the mesh can read."""
    encode = functools.partial(tokenizer.module.encode, tokenizer.config)
    return jax.jit(encode, out_shardings=replicated(mesh))


class _Timed:
    """The batches of a stream. waited: the seconds that passed in asking for them.

    While one is asked for, the device encodes the one before: it stands still for less than this.
    """

    def __init__(self, stream: Iterator[Batch]) -> None:
        self._stream, self.waited = stream, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self._stream)
        finally:
            self.waited += time.perf_counter() - began


def _encoded(stream: Iterable[Batch], encode: Any) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with its tokens, one behind: the device encodes the next batch while the host stores this one."""
    before: tuple[Batch, jax.Array] | None = None
    for batch in stream:
        tokens = encode(batch["images"])
        if before is not None:
            yield before[0], np.asarray(before[1])
        before = batch, tokens
    if before is not None:
        yield before[0], np.asarray(before[1])


def _tell(writer: TokenStoreWriter, source: ImageSource, written: Written, name: str) -> None:
    if written.records:  # with the progress, which it closes: nobody reads it from a pipe
        rate, share = written.records / written.seconds, written.waited / written.seconds
        print(
            f"{name}: {written.records:,} records in {written.seconds:,.1f} s, {rate:.3g} records/s, "
            f"loader wait {share:.1%}",
            file=sys.stderr,
        )
    if not written.finished:
        print(
            f"{writer.folder}: shards of other processes are missing; process 0 finishes the store when they are there"
        )
        return
    card = TokenStore(writer.folder).card
    if card["num_bad_images"]:
        print(f"{card['num_bad_images']} images could not be decoded and were left out:")
        # Those that this process met; the card has the numbers of all their records. What was wrong when the source was
        # listed comes first, and is no image.
        problems: Iterable[tuple[str, str]] = getattr(source, "problems", ())
        listed = len(getattr(source, "listed", ()))
        for name, reason in itertools.islice(problems, listed, listed + 10):
            print(f"  {name}: {reason}")


def _card(experiment: Experiment, source: ImageSource, what: str, tokenizer_sha256: str) -> dict[str, Any]:
    crop = getattr(source, "crop", "pad")  # sources whose images have one size do not crop
    require(crop in CROPS, f"{what}: tokens are made once, {crop} crops cannot be: choose one of {', '.join(CROPS)}")
    module, config = experiment.tokenizer.module, experiment.tokenizer.config
    return {
        "codebook_size": config.codebook_size,
        "grid": list(module.token_spec(config).shape),
        "num_classes": experiment.data.num_classes,
        "class_names": list(experiment.data.class_names),
        "crops": list(CROPS[crop]),
        "source": what,
        "tokenizer_sha256": tokenizer_sha256,
        "tokenizer": {"name": module.__name__.rpartition(".")[2], **to_dict(config)},
    }


def _check_finished(out: pathlib.Path, card: dict[str, Any], source_records: int) -> None:
    """Raises StoreError unless the store in `out` is whole and what would be made now."""
    store = TokenStore(out)
    store.verify()
    there = store.card | {"source_records": store.card["shards"][-1].get("span", [0, 0])[1]}
    for key, now in {**json.loads(json.dumps(card)), "source_records": source_records}.items():
        if there.get(key) != now:
            raise StoreError(
                f"{out} holds a finished store of something else ({key}: {str(there.get(key))[:80]}, now "
                f"{str(now)[:80]}): choose another --out, or remove it"
            )
    sweep(out, store.card)
