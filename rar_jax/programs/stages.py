"""The stages of a run and what each has left behind: tokenizer, classifier, generator."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.parallel.rules import param_shardings
from rar_jax.programs.experiment import Experiment
from rar_jax.training.checkpoint import CheckpointError, good_step, load_params, read_meta
from rar_jax.training.workdir import Workdir

STAGES = ("tokenizer", "classifier", "generator")


def finished(experiment: Experiment, stage: str, workdir: Workdir) -> str | None:
    """The hash of the stage's last checkpoint if it is trained to the end and verifies, else None.

    A generator counts only with the tokenizer whose tokens it was trained on.
    """
    folder = workdir.checkpoints(stage)
    good = good_step(folder)
    if good is None or good[0] != experiment.recipe(stage).steps:
        return None
    if stage == "generator" and read_meta(folder, good[0])["tokenizer_sha256"] != finished(
        experiment, "tokenizer", workdir
    ):
        return None
    return good[1]


def trained_params(experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh) -> tuple[Any, str]:
    """Parameters of a finished stage, placed as rules.py says, and the hash of their checkpoint.

    Raises: CheckpointError if the stage is not trained to its end.
    """
    if (sha256 := finished(experiment, stage, workdir)) is None:
        raise CheckpointError(
            f"{workdir.path} has no finished {stage}: run `rar-jax train --stage {stage}` with this config and work directory"
        )
    params = load_params(workdir.checkpoints(stage), experiment.recipe(stage).steps)
    model = experiment.model(stage)
    return jax.device_put(params, param_shardings(model.module.axes(model.config), params, mesh)), sha256
