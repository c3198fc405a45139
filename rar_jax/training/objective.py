"""What a stage trains: its model, its data, and what its checkpoints say of themselves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from rar_jax.data.loader import Source
from rar_jax.experiment import Experiment, open_source
from rar_jax.models import Model
from rar_jax.parallel.mesh import with_device_dtype
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.opening import open_tokens
from rar_jax.training.step import Batch
from rar_jax.weights.stages import finished


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the loop needs to know of a stage. `model` is a module with the contract functions init, axes, loss, ...

    variants: held-out losses to watch, each a name and what it adds to a batch. meta: what each checkpoint says of itself.
    encoder: the tokenizer, if the sources hold images and the loss takes tokens.
    """

    model: Any
    config: Any
    train: Source
    heldout: Source
    variants: Callable[[int], dict[str, dict[str, np.ndarray]]]
    meta: dict[str, Any]
    encoder: Model | None = None


def make_objective(experiment: Experiment, stage: str, workdir: Workdir) -> Objective:
    """The stage's model and data. Raises CheckpointError, ConfigError or StoreError where the data does not fit."""
    module, config = experiment.model(stage).module, with_device_dtype(experiment.model(stage).config)
    meta: dict[str, Any] = {"experiment": experiment.name, "stage": stage}
    on_the_fly = stage == "generator" and experiment.data.on_the_fly
    if stage == "generator" and not on_the_fly:
        train, heldout = (open_tokens(experiment, workdir, split) for split in ("train", "heldout"))
    else:
        train, heldout = open_source(experiment, "train"), open_source(experiment, "heldout")
    if stage == "generator":
        meta["tokenizer_sha256"] = finished(experiment, "tokenizer", workdir)
    plain: Callable[[int], dict[str, dict[str, np.ndarray]]] = lambda size: {"": {}}  # noqa: E731
    offered = getattr(module, "validation_variants", None)
    variants = functools.partial(offered, config) if offered else plain
    encoder = Model(experiment.tokenizer.module, with_device_dtype(experiment.tokenizer.config)) if on_the_fly else None
    return Objective(module, config, train, heldout, variants, meta, encoder)


def encoded(encoder: Model | None, params: Any, batch: Batch) -> Batch:
    """The batch with its images as tokens, as a token store would have them; without an encoder, the batch. Traceable."""
    if encoder is None:
        return batch
    tokens = encoder.module.encode(encoder.config, params, batch["images"])
    return {**{name: x for name, x in batch.items() if name != "images"}, "tokens": tokens}
