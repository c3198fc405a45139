"""What a stage trains: its model, its data, the state it starts from, and the metadata of its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rar_jax.data.loader import Source
from rar_jax.errors import CheckpointError
from rar_jax.experiment import Experiment, open_source
from rar_jax.models import Model
from rar_jax.parallel.mesh import with_device_dtype
from rar_jax.parallel.processes import from_main
from rar_jax.runs.bucket import Path
from rar_jax.runs.checkpoint import good_step, read_meta
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.opening import open_tokens
from rar_jax.training.step import Setup, State
from rar_jax.weights.stages import finished, open_init_from

Variants = Callable[[int, jax.Array], dict[str, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the loop needs to know about a stage. `model` is a module with the contract functions init, axes, loss, ...

    variants: (batch size, key) -> validation losses by name, each what it adds to a batch. meta: metadata of each checkpoint.
    tokenizer: of a generator. on_the_fly: it encodes images while the generator is trained.
    """

    model: Any
    config: Any
    train: Source
    heldout: Source
    variants: Variants
    meta: dict[str, Any]
    tokenizer: Model | None = None
    on_the_fly: bool = False


def make_objective(experiment: Experiment, stage: str, workdir: Workdir) -> Objective:
    """Resolve a stage's model and data. Raises CheckpointError, ConfigError or StoreError if the data does not fit."""
    module, config = experiment.model(stage).module, with_device_dtype(experiment.model(stage).config)
    meta: dict[str, Any] = {"experiment": experiment.name, "stage": stage}
    on_the_fly = stage == "generator" and experiment.data.on_the_fly
    if stage == "generator" and not on_the_fly:
        train, heldout = (open_tokens(experiment, workdir, split) for split in ("train", "heldout"))
    else:
        train, heldout = open_source(experiment, "train"), open_source(experiment, "heldout")
    if stage == "generator":
        meta["tokenizer_sha256"] = finished(experiment, "tokenizer", workdir)
        _check_tokenizer(workdir.checkpoints(stage), meta["tokenizer_sha256"])
    offered = getattr(module, "validation_variants", None)
    variants = functools.partial(offered, config) if offered else lambda size, key: {"": {}}
    tokenizer = Model(experiment.tokenizer.module, with_device_dtype(experiment.tokenizer.config))
    of_generator = tokenizer if stage == "generator" else None
    return Objective(module, config, train, heldout, variants, meta, of_generator, on_the_fly)


def _check_tokenizer(folder: Path, sha256: str | None) -> None:
    good = good_step(folder)
    if good is None or sha256 is None:
        return
    if from_main(lambda: read_meta(folder, good[0]))["tokenizer_sha256"] != sha256:
        raise CheckpointError(f"{folder} was trained on another tokenizer's tokens than this directory's: move it away")


def start_from(experiment: Experiment, state: State, setup: Setup, mesh: Mesh) -> tuple[State, dict[str, str]]:
    """Replace the parameters of a fresh state by those of `config.init_from`, made to fit; return it and their origin.

    Raises: ConfigError if they cannot be made to fit; what `open_weights` raises.
    """
    weights, module = open_init_from(experiment), experiment.generator.module
    adapt = functools.partial(module.adapt, experiment.generator.config, other_config=weights.model.config)
    adapt = jax.jit(adapt, out_shardings=jax.tree.map(lambda s: s.sharding, setup.abstract_state["params"]))
    params = adapt(state["params"], other_params=weights.place(mesh))
    ema = jax.tree.map(jnp.copy, params) if state["ema"] else {}
    return {**state, "params": params, "ema": ema}, {"path": str(weights.path), "sha256": weights.sha256()}
