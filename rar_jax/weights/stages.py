"""The stages of a run and what each has left behind: tokenizer, classifier, generator."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.config import differences, require, to_dict
from rar_jax.errors import CheckpointError, ConfigError
from rar_jax.experiment import Experiment
from rar_jax.models import Model
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.parallel.rules import param_shardings
from rar_jax.runs.checkpoint import good_step, load_params, read_meta, save_params
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.runs.writers import import_wandb
from rar_jax.weights.loading import Weights, open_weights
from rar_jax.weights.registry import locate

STAGES = ("tokenizer", "classifier", "generator")


def finished(experiment: Experiment, stage: str, workdir: Workdir) -> str | None:
    """The hash of the stage's last checkpoint if it is trained to the end and evaluated, and verifies, else None.

    A generator counts only with the tokenizer whose tokens it was trained on.
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
    """The numbers that the evaluation of a step told, as process 0 sees them; None if a preemption came before it."""

    def told() -> dict[str, float] | None:
        for row in read_metrics(workdir.path, stage):
            if row["step"] == step and any(name.startswith("validation/") for name in row):
                numbers = {name: math.nan if value is None else value for name, value in row.items()}
                return {name: value for name, value in numbers.items() if isinstance(value, float)}
        return None

    return from_main(told)


def trained_params(experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh) -> tuple[Any, str]:
    """Parameters of a finished stage, placed as rules.py says, and the hash of their checkpoint.

    Raises: CheckpointError if the stage is not trained to its end.
    """
    if (sha256 := finished(experiment, stage, workdir)) is None:
        raise CheckpointError(
            f"{workdir.path} has no finished {stage}: run `rar-jax train --stage {stage}` with this config and work directory"
        )
    params = load_params(
        workdir.checkpoints(stage), experiment.last_step(stage), model_shardings(experiment.model(stage), mesh)
    )
    return params, sha256


def model_shardings(model: Model, mesh: Mesh) -> Any:
    """Where a model's parameters lie on a mesh. Raises: ConfigError if one does not divide."""
    shapes = jax.eval_shape(functools.partial(model.module.init, model.config), jax.random.key(0))
    return param_shardings(model.module.axes(model.config), shapes, mesh)


def check_start(experiment: Experiment, workdir: Workdir) -> None:
    """Looks at names and shapes of the weights that a run starts from, and for whom it shall tell, before it makes anything.

    Raises: ConfigError if they cannot be made to fit, or a package is missing; what `open_weights` raises.
    """
    if experiment.wandb is not None and is_main():
        import_wandb()
    if experiment.tokenizer_weights and good_step(workdir.checkpoints("tokenizer")) is None:
        _given_tokenizer(experiment)
    if experiment.init_from and good_step(workdir.checkpoints("generator")) is None:
        given_generator(experiment)


def given_generator(experiment: Experiment) -> Weights:
    """What `init_from` names. Raises: ConfigError if it cannot be made to fit."""
    weights, module = open_weights(locate(str(experiment.init_from)), "generators"), experiment.generator.module
    other = weights.model
    require(other.module is module, f"init_from {weights.path} is a {other.module.__name__}, not a {module.__name__}")
    adapt = functools.partial(module.adapt, experiment.generator.config, other_config=other.config)
    shapes = [
        jax.eval_shape(functools.partial(module.init, m.config), jax.random.key(0))
        for m in (experiment.generator, other)
    ]
    jax.eval_shape(lambda ours, theirs: adapt(ours, other_params=theirs), *shapes)
    return weights


def origin_sha256(weights: Weights) -> str:
    """The sha256 by which weights are known wherever they lie: of the file they were taken over or converted from, or
    else their own."""
    if weights.path.is_dir():
        folder = Workdir(weights.path).checkpoints("tokenizer")
        if (good := good_step(folder)) is not None:
            return _origin(folder, good)
    return weights.sha256()


def stage_origin_sha256(experiment: Experiment, workdir: Workdir) -> str:
    """`origin_sha256` of a work directory's finished tokenizer. Raises: CheckpointError if it is not finished."""
    folder = workdir.checkpoints("tokenizer")
    if finished(experiment, "tokenizer", workdir) is None or (good := good_step(folder)) is None:
        raise CheckpointError(f"{workdir.path} has no finished tokenizer: run `rar-jax train --stage tokenizer`")
    return _origin(folder, good)


def _origin(folder: pathlib.Path, good: tuple[int, str]) -> str:
    return from_main(lambda: read_meta(folder, good[0])).get("made_from", {}).get("sha256", good[1])


def take_over_tokenizer(experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
    """Makes the weights that `tokenizer.weights` names the finished tokenizer stage of a work directory.

    Raises: ConfigError if they are not of the experiment's architecture; what `open_weights` raises.
    """
    if finished(experiment, "tokenizer", workdir):
        return
    weights = _given_tokenizer(experiment)
    made_from = {"path": str(weights.path), "sha256": origin_sha256(weights)}
    save_params(workdir.checkpoints("tokenizer"), weights.place(mesh), {"stage": "tokenizer", "made_from": made_from})


def _given_tokenizer(experiment: Experiment) -> Weights:
    assert experiment.tokenizer_weights is not None
    num_tokens = experiment.tokenizer.module.token_spec(experiment.tokenizer.config).shape[0]
    weights = open_weights(locate(experiment.tokenizer_weights), "tokenizers", num_tokens=num_tokens)
    check_tokenizer(experiment, weights, f"tokenizer.weights {weights.path}")
    return weights


def check_tokenizer(experiment: Experiment, weights: Weights, name: str) -> None:
    """Raises ConfigError unless weights, called `name`, are of the architecture in config.tokenizer."""
    for what, ours, theirs in zip(
        ("images", "tokens", "parameters"), _specs(experiment.tokenizer), _specs(weights.model), strict=True
    ):
        if ours != theirs:
            lines = differences(to_dict(weights.model.config), to_dict(experiment.tokenizer.config))
            raise ConfigError(f"{name} has other {what} than config.tokenizer: {'; '.join(lines)}")


def _specs(model: Model) -> tuple[Any, Any, Any]:
    module, config = model.module, model.config
    params = jax.eval_shape(functools.partial(module.init, config), jax.random.key(0))
    return module.image_spec(config), module.token_spec(config), params
