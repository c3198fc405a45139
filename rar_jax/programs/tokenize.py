"""Turns the images of a split into a token store, with the work directory's tokenizer."""

from __future__ import annotations

import functools
import shutil

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.data.loader import sequential_batches
from rar_jax.data.sources import load_source
from rar_jax.data.token_store import StoreError, TokenStore, TokenStoreWriter
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.processes import global_batch
from rar_jax.parallel.rules import replicated, sharded
from rar_jax.programs.experiment import Experiment
from rar_jax.training.checkpoint import CheckpointError, good_step, load_params
from rar_jax.training.report import progress
from rar_jax.training.workdir import Workdir

BATCH = 256


def tokenize(experiment: Experiment, workdir: Workdir, mesh: Mesh, split: str, *, quiet: bool = False) -> None:
    """Writes workdir/tokens/<split>: each image of the split once, in the source's order.

    Raises: CheckpointError if there is no trained tokenizer.
    """
    folder = workdir.tokens(split)
    if (good := good_step(workdir.checkpoints("tokenizer"))) is None:
        raise CheckpointError(f"{workdir.path} has no good tokenizer checkpoint: run `rar-jax train --stage tokenizer`")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    data, (module, config) = experiment.data, (experiment.tokenizer.module, experiment.tokenizer.config)
    source = load_source(data.source, split, image_size=data.image_size)  # pyright: ignore[reportArgumentType]
    params = jax.device_put(load_params(workdir.checkpoints("tokenizer"), good[0]), replicated(mesh))
    encode = jax.jit(functools.partial(module.encode, config), out_shardings=replicated(mesh))
    card = {
        "num_records": len(source),
        "codebook_size": config.codebook_size,
        "grid": [config.grid, config.grid],
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "crops": ["whole image"],
        "source": f"{data.source} ({split})",
        "tokenizer_sha256": good[1],
    }
    size = -(-BATCH // batch_divisor(mesh)) * batch_divisor(mesh)
    with sharded(mesh), TokenStoreWriter(folder, card) as writer:
        rows = sequential_batches(source, global_batch=size)
        for batch in progress(rows, -(-len(source) // size), f"tokenize {split}", "batches", quiet):
            real = batch["weights"] > 0
            tokens = np.asarray(encode(params, global_batch({"images": batch["images"]}, mesh)["images"]))
            writer.append(tokens[real], batch["labels"][real], batch["ids"][real], np.zeros(real.sum(), np.int16))


def tokenized(workdir: Workdir, split: str, tokenizer_sha256: str) -> bool:
    """Whether the split's store is whole, undamaged and of this tokenizer."""
    try:
        store = TokenStore(workdir.tokens(split))
        store.verify()
    except StoreError:
        return False
    return store.card["tokenizer_sha256"] == tokenizer_sha256
