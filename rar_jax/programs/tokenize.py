"""Turns the images of a split into a token store, with the work directory's tokenizer."""

from __future__ import annotations

import functools
import shutil

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.data.loader import sequential_batches
from rar_jax.data.sources import Split
from rar_jax.data.token_store import StoreError, TokenStore, TokenStoreWriter
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.processes import global_batch
from rar_jax.parallel.rules import replicated, sharded
from rar_jax.programs.experiment import Experiment, open_source
from rar_jax.programs.stages import trained_params
from rar_jax.training.report import progress
from rar_jax.training.workdir import Workdir

BATCH = 256


def tokenize(experiment: Experiment, workdir: Workdir, mesh: Mesh, split: Split, *, quiet: bool = False) -> None:
    """Writes workdir/tokens/<split>: each image of the split once, in the source's order. A good store is kept.

    Raises: CheckpointError if the tokenizer is not trained to its end; ConfigError if the source does not fit.
    """
    params, sha256 = trained_params(experiment, "tokenizer", workdir, mesh)
    if tokenized(workdir, split, sha256):
        return
    data, (module, config) = experiment.data, (experiment.tokenizer.module, experiment.tokenizer.config)
    source = open_source(experiment, split)
    encode = jax.jit(functools.partial(module.encode, config), out_shardings=replicated(mesh))
    card = {
        "num_records": len(source),
        "codebook_size": config.codebook_size,
        "grid": list(module.token_spec(config).shape),
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "crops": ["whole image"],
        "source": f"{data.source} ({split})",
        "tokenizer_sha256": sha256,
    }
    size = -(-BATCH // batch_divisor(mesh)) * batch_divisor(mesh)
    folder = workdir.tokens(split)
    shutil.rmtree(folder, ignore_errors=True)  # unfinished, damaged, or of another tokenizer
    with sharded(mesh), TokenStoreWriter(folder, card) as writer:
        rows = sequential_batches(source, global_batch=size)
        for batch in progress(rows, -(-len(source) // size), f"tokenize {split}", "batches", quiet):
            real = batch["weights"] > 0
            tokens = np.asarray(encode(params, global_batch({"images": batch["images"]}, mesh)["images"]))
            writer.append(tokens[real], batch["labels"][real], batch["ids"][real], np.zeros(real.sum(), np.int16))


def tokenized(workdir: Workdir, split: Split, tokenizer_sha256: str) -> bool:
    """Whether the split's store is whole, undamaged and of this tokenizer."""
    try:
        store = TokenStore(workdir.tokens(split))
        store.verify()
    except StoreError:
        return False
    return store.card["tokenizer_sha256"] == tokenizer_sha256
