"""Open the tokens a generator is trained on, and check them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rar_jax.data.loader import Source
from rar_jax.data.mixing import MixedSource
from rar_jax.data.sources import Split
from rar_jax.errors import CheckpointError, ConfigError
from rar_jax.experiment import Experiment
from rar_jax.models import store_spec
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.tokenize import has_tokens
from rar_jax.weights.stages import finished, stage_origin_sha256

log: logging.Logger = logging.getLogger(__name__)


def open_tokens(experiment: Experiment, workdir: Workdir, split: Split) -> Source:
    """Open the configured tokens or mix, else workdir/tokens/<split>.

    Raises: CheckpointError if the work directory has no finished tokenizer or no valid tokens of it; StoreError for a
      configured folder that is no store; ConfigError for one that does not fit the config.
    """
    if (manifest := finished(experiment, "tokenizer", workdir)) is None:
        raise CheckpointError(
            f"{workdir.root} has no finished tokenizer: run `rar-jax train --stage tokenizer`, then `rar-jax tokenize`"
        )
    hashes = (manifest, stage_origin_sha256(experiment, workdir))
    given = experiment.data.given_tokens(split)
    if not given and not has_tokens(workdir, split, hashes):
        raise CheckpointError(
            f"{workdir.tokens(split)} holds no valid tokens of this tokenizer: run `rar-jax tokenize`"
        )
    stores = [TokenStore(folder) for folder, _ in given or ((workdir.tokens(split), 1.0),)]
    for store in stores:
        check_store(store, experiment, hashes)
    return stores[0] if len(stores) == 1 else MixedSource(stores, [weight for _, weight in given])


def check_store(store: TokenStore, experiment: Experiment, hashes: Sequence[str]) -> None:
    """Raise ConfigError if a store does not fit; warn of an unknown tokenizer.

    hashes: sha256s of the experiment's tokenizer.
    """
    card, data = store.card, experiment.data
    fix = "use tokens made with this config, or change the config"
    if store.spec != (spec := store_spec(experiment.tokenizer)):
        raise ConfigError(f"{store.folder} holds {store.spec}, config.tokenizer makes {spec}: {fix}")
    if card["num_classes"] != data.num_classes:
        raise ConfigError(f"{store.folder} has {card['num_classes']} classes, the config {data.num_classes}: {fix}")
    numbers = [str(i) for i in range(data.num_classes)]
    theirs, ours = list(card["class_names"]), list(data.class_names)
    if theirs != ours and numbers not in (theirs, ours):  # numbers stand for unknown names
        i = next(i for i in range(len(ours)) if theirs[i] != ours[i])
        raise ConfigError(f"{store.folder} calls class {i} '{theirs[i]}', the config '{ours[i]}': {fix}")
    if (sha256 := card["tokenizer_sha256"]) is None:
        log.warning("%s does not name its tokenizer. Check it with `rar-jax tokenize --verify`", store.folder)
    elif sha256 not in hashes:
        raise ConfigError(
            f"{store.folder} was made by the tokenizer with sha256 {sha256[:12]}..., this run has "
            f"{hashes[-1][:12]}.... Set tokenizer.weights to the one that made it, or tokenize again"
        )
