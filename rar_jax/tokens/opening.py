"""The tokens that a generator is trained on: of the work directory, or stores made elsewhere; checked against the config."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from rar_jax.data.loader import Source
from rar_jax.data.mixing import MixedSource
from rar_jax.data.sources import Split
from rar_jax.errors import CheckpointError, ConfigError
from rar_jax.experiment import Experiment
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.tokenize import tokenized
from rar_jax.weights.stages import finished, stage_origin_sha256

log: logging.Logger = logging.getLogger(__name__)


def open_tokens(experiment: Experiment, workdir: Workdir, split: Split) -> Source:
    """The tokens of a split: config.data.tokens, tokens_heldout or mix where given, else workdir/tokens/<split>.

    Raises: CheckpointError if the work directory has no finished tokenizer or no good tokens of it; StoreError for a
      given folder that is no store; ConfigError for one that does not fit the config.
    """
    if (manifest := finished(experiment, "tokenizer", workdir)) is None:
        raise CheckpointError(
            f"{workdir.path} has no finished tokenizer: run `rar-jax train --stage tokenizer`, then `rar-jax tokenize`"
        )
    hashes = (manifest, stage_origin_sha256(experiment, workdir))
    given = experiment.data.given_tokens(split)
    if not given:
        if not tokenized(workdir, split, hashes):
            raise CheckpointError(
                f"{workdir.tokens(split)} holds no good tokens of this tokenizer: run `rar-jax tokenize`"
            )
        store = TokenStore(workdir.tokens(split))
        check_store(store, experiment, hashes)
        return store
    stores = [TokenStore(folder) for folder, _ in given]
    for store in stores:
        check_store(store, experiment, hashes)
    return stores[0] if len(stores) == 1 else MixedSource(stores, [weight for _, weight in given])


def check_store(store: TokenStore, experiment: Experiment, hashes: Sequence[str]) -> None:
    """Raises ConfigError, one line, if a store's card says other than the config; warns where the tokenizer is not known.

    Args:
      hashes: the sha256s that the experiment's tokenizer goes by.
    """
    card, data = store.card, experiment.data
    spec = experiment.generator.module.token_spec(experiment.generator.config)
    mend = "use tokens made with this config, or change the config"
    for what, theirs, ours in (
        ("tokens an image (grid)", int(np.prod(card["grid"])), int(np.prod(spec.shape))),
        ("codes (codebook_size)", card["codebook_size"], experiment.tokenizer.config.codebook_size),
        ("classes", card["num_classes"], data.num_classes),
    ):
        if theirs != ours:
            raise ConfigError(f"{store.folder} has {theirs} {what}, the config {ours}: {mend}")
    numbers = [str(i) for i in range(data.num_classes)]
    theirs, ours = list(card["class_names"]), list(data.class_names)
    if theirs != ours and numbers not in (theirs, ours):  # numbers stand for names that are not known
        i = next(i for i in range(len(ours)) if theirs[i] != ours[i])
        raise ConfigError(f"{store.folder} calls class {i} '{theirs[i]}', the config '{ours[i]}': {mend}")
    if card["tokenizer_sha256"] is None:
        log.warning(
            "%s does not say which tokenizer made it: that it is this run's cannot be checked. "
            "`rar-jax tokenize --verify` draws its tokens",
            store.folder,
        )
    elif card["tokenizer_sha256"] not in hashes:
        raise ConfigError(
            f"{store.folder} was made by the tokenizer with sha256 {card['tokenizer_sha256'][:12]}..., this run has "
            f"{hashes[-1][:12]}...: set tokenizer.weights to the one that made it, or tokenize again"
        )
