"""The finished stages of a work directory, and the weights that a stage may start from."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.config import differences, require, to_dict
from rar_jax.errors import CheckpointError, ConfigError
from rar_jax.experiment import Experiment
from rar_jax.models import Model, token_spec
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.parallel.rules import param_shardings
from rar_jax.runs.bucket import Path
from rar_jax.runs.checkpoint import good_step, load_params, read_meta, save_params
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.runs.writers import import_wandb
from rar_jax.weights.loading import Weights, open_weights


def finished(experiment: Experiment, stage: str, workdir: Workdir) -> str | None:
    """Return the hash of a finished stage's last checkpoint, None if it is not finished.

    A stage is finished if its last checkpoint verifies and was evaluated. A generator also needs the tokenizer
    whose tokens it was trained on.
    """
    folder = workdir.checkpoints(stage)
    good = good_step(folder)
    if good is None or good[0] != experiment.last_step(stage):
        return None
    meta = from_main(lambda: read_meta(folder, good[0]))
    if meta.get("unevaluated") and evaluated(workdir, stage, good[0]) is None:
        return None
    if stage == "generator" and meta["tokenizer_sha256"] != finished(experiment, "tokenizer", workdir):
        return None
    return good[1]


def evaluated(workdir: Workdir, stage: str, step: int) -> dict[str, float] | None:
    """Return the metrics of the evaluation at a step, None if a preemption came before it."""

    def find() -> dict[str, float] | None:
        for row in read_metrics(workdir.path, stage):
            if row["step"] == step and any(name.startswith("validation/") for name in row):
                return {k: math.nan if v is None else v for k, v in row.items() if v is None or isinstance(v, float)}
        return None

    return from_main(find)


def trained_params(experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh) -> tuple[Any, str]:
    """Load the sharded parameters of a finished stage, and the hash of their checkpoint.

    Raises: CheckpointError if the stage is not finished.
    """
    sha256 = _require_finished(experiment, stage, workdir)
    shardings = model_shardings(experiment.model(stage), mesh)
    return load_params(workdir.checkpoints(stage), experiment.last_step(stage), shardings), sha256


def _require_finished(experiment: Experiment, stage: str, workdir: Workdir) -> str:
    if (sha256 := finished(experiment, stage, workdir)) is None:
        raise CheckpointError(f"{workdir.root} has no finished {stage}: run `rar-jax train --stage {stage}` first")
    return sha256


def model_shardings(model: Model, mesh: Mesh) -> Any:
    """Return the shardings of a model's parameters. Raises: ConfigError if one does not divide over the mesh."""
    return param_shardings(model.module.axes(model.config), model.param_shapes(), mesh)


def check_start(experiment: Experiment, workdir: Workdir) -> None:
    """Check the weights that a run starts from, and its logging, before anything is written.

    Raises: ConfigError if weights do not fit or a package is missing; what `open_weights` raises.
    """
    if experiment.wandb is not None and is_main():
        import_wandb()
    if experiment.tokenizer_weights and good_step(workdir.checkpoints("tokenizer")) is None:
        _open_tokenizer(experiment)
    if experiment.init_from and good_step(workdir.checkpoints("generator")) is None:
        open_init_from(experiment)


def open_init_from(experiment: Experiment) -> Weights:
    """Open the weights of config.init_from. Raises: ConfigError if they cannot be adapted."""
    weights, module = (
        open_weights(str(experiment.init_from), "generators", like=experiment.generator),
        experiment.generator.module,
    )
    other = weights.model
    require(other.module is module, f"init_from {weights.path} is a {other.module.__name__}, not a {module.__name__}")
    adapt = functools.partial(module.adapt, experiment.generator.config, other_config=other.config)
    shapes = experiment.generator.param_shapes(), other.param_shapes()
    jax.eval_shape(lambda ours, theirs: adapt(ours, other_params=theirs), *shapes)
    return weights


def copy_tokenizer(experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
    """Copy the weights of config.tokenizer.weights into a work directory, as its finished tokenizer.

    Raises: ConfigError if they do not fit config.tokenizer; what `open_weights` raises.
    """
    if finished(experiment, "tokenizer", workdir):
        return
    weights = _open_tokenizer(experiment)
    made_from = {"path": str(weights.path), "sha256": origin_sha256(weights)}
    save_params(workdir.checkpoints("tokenizer"), weights.place(mesh), {"stage": "tokenizer", "made_from": made_from})


def _open_tokenizer(experiment: Experiment) -> Weights:
    assert experiment.tokenizer_weights is not None
    weights = open_weights(experiment.tokenizer_weights, "tokenizers", like=experiment.tokenizer)
    check_tokenizer(experiment, weights, f"tokenizer.weights {weights.path}")
    return weights


def check_tokenizer(experiment: Experiment, weights: Weights, name: str) -> None:
    """Raise ConfigError unless the weights called `name` have the architecture of config.tokenizer."""
    ours, theirs = experiment.tokenizer, weights.model
    for kind, specs in {
        "images": [model.module.image_spec(model.config) for model in (ours, theirs)],
        "tokens": [token_spec(model) for model in (ours, theirs)],
        "parameters": [model.param_shapes() for model in (ours, theirs)],
    }.items():
        if specs[0] != specs[1]:
            lines = differences(to_dict(theirs.config), to_dict(ours.config))
            raise ConfigError(f"{name} has other {kind} than config.tokenizer: {'; '.join(lines)}")


def origin_sha256(weights: Weights) -> str:
    """Return the sha256 that identifies a tokenizer: of the file it was copied or converted from, or its own."""
    if weights.path.is_dir() and not weights.raw:
        folder = Workdir(weights.path).checkpoints("tokenizer")
        if (good := good_step(folder)) is not None:
            return _read_origin(folder, good)
    return weights.sha256()


def stage_origin_sha256(experiment: Experiment, workdir: Workdir) -> str:
    """Return `origin_sha256` of a work directory's tokenizer. Raises: CheckpointError if it is not finished."""
    sha256 = _require_finished(experiment, "tokenizer", workdir)
    return _read_origin(workdir.checkpoints("tokenizer"), (experiment.last_step("tokenizer"), sha256))


def _read_origin(folder: Path, good: tuple[int, str]) -> str:
    return from_main(lambda: read_meta(folder, good[0])).get("made_from", {}).get("sha256", good[1])
