"""Trains one thing: the tokenizer, the classifier or the generator. One loop for all; the objective says which.

Read from top to bottom: what is trained, how it is validated, then the loop. The position in the data is the step, the
randomness of a step comes from (seed, step), so a run that was killed and started again is the run that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.data.loader import Source, batches
from rar_jax.data.sources import load_source
from rar_jax.data.token_store import TokenStore
from rar_jax.evaluation import classifier
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.processes import global_batch, is_main
from rar_jax.parallel.rules import param_shardings, replicated, sharded
from rar_jax.programs.evaluate import Scorer
from rar_jax.programs.experiment import Experiment
from rar_jax.training.checkpoint import Checkpointer, good_step
from rar_jax.training.recipe import Recipe, optimizer
from rar_jax.training.report import Reporter
from rar_jax.training.state import State, evaluated_params, make_init, make_train_step, state_shardings
from rar_jax.training.workdir import Workdir

STAGES = ("tokenizer", "classifier", "generator")


class TrainingError(RuntimeError):
    """Training cannot go on: the message says why and from where to resume."""


# ---------------------------------------------------------------- what is trained


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the loop needs to know of a stage. `model` is a module with the contract functions init, axes, loss, ...

    variants: held-out losses to watch, each a name and what it adds to the batch.
    """

    stage: str
    model: Any
    config: Any
    recipe: Recipe
    train: Source
    heldout: Source
    variants: dict[str, Callable[[Any], dict[str, np.ndarray]]] = dataclasses.field(
        default_factory=lambda: {"": lambda batch: {}}
    )


def make_objective(experiment: Experiment, stage: str, workdir: Workdir) -> Objective:
    """The stage's model, recipe and data. Raises ConfigError or StoreError where the data does not fit."""
    if stage == "generator":
        train, heldout = TokenStore(workdir.tokens("train")), TokenStore(workdir.tokens("heldout"))
        places = experiment.generator.module.token_spec(experiment.generator.config).shape[0]

        def random_orders(batch: Any) -> dict[str, np.ndarray]:
            rng = np.random.default_rng(0)  # the same orders at every validation, so that the curve has no noise of theirs
            return {"orders": np.argsort(rng.random((len(batch["labels"]), places)), axis=1).astype(np.int32)}

        model, variants = experiment.generator, {"raster": lambda batch: {}, "random": random_orders}
        return Objective(stage, model.module, model.config, experiment.train, train, heldout, variants)
    data = experiment.data
    train, heldout = (load_source(data.source, split, image_size=data.image_size) for split in ("train", "heldout"))
    if stage == "classifier":
        return Objective(stage, classifier, experiment.classifier, experiment.classifier_train, train, heldout)
    model = experiment.tokenizer
    return Objective(stage, model.module, model.config, experiment.tokenizer_train, train, heldout)


# ---------------------------------------------------------------- validation


def make_validation(objective: Objective, mesh: Mesh) -> Callable[[Any], dict[str, float]]:
    """Function params -> mean metrics over fixed held-out batches, without any dropout."""
    parts = batch_divisor(mesh)
    wanted = min(objective.recipe.eval_records, len(objective.heldout))
    count = math.ceil(wanted / 512)
    size = max(wanted // count // parts, 1) * parts
    batch_list = []
    for i in range(count):
        rows = objective.heldout.gather((np.arange(i * size, (i + 1) * size) % len(objective.heldout)).astype(np.int64))
        batch = {name: {**rows, **extra(rows)} for name, extra in objective.variants.items()}
        batch_list.append({name: global_batch(_local_rows(b), mesh) for name, b in batch.items()})
    loss = jax.jit(
        lambda params, batch: objective.model.loss(objective.config, params, batch, key=None, step=0)[1],
        out_shardings=replicated(mesh),
    )

    def validate(params: Any) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in batch_list:
            for variant, rows in batch.items():
                metrics = {k: float(v) for k, v in loss(params, rows).items()}
                if variant:  # a generator's loss is in nats a token; people compare bits
                    metrics = {"bits": metrics["loss"] / math.log(2)}
                for name, value in metrics.items():
                    key = f"validation/{variant}_{name}" if variant else f"validation/{name}"
                    totals[key] = totals.get(key, 0.0) + value / count
        return totals

    return validate


def _local_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    index, processes = jax.process_index(), jax.process_count()
    return {key: np.array_split(value, processes)[index] for key, value in batch.items()}


# ---------------------------------------------------------------- state and step


class Setup(NamedTuple):
    """A training, sharded over a mesh: `init` (key -> state) and `step` ((state, batch, root key) -> (state, metrics)),
    both jitted, the step with the state donated; `abstract_state` has the shapes and shardings."""

    abstract_state: State
    init: Callable[[jax.Array], State]
    step: Callable[[State, Any, jax.Array], tuple[State, dict[str, jax.Array]]]


def compile_training(model: Any, config: Any, recipe: Recipe, mesh: Mesh) -> Setup:
    """Sets up the training of a contract module: parameters and optimizer lie as its axes and rules.py say.

    Raises: ConfigError if a parameter does not divide over the mesh.
    """
    tx = optimizer(recipe, model.decay_mask(config))
    init_state = make_init(functools.partial(model.init, config), tx, recipe)
    shapes = jax.eval_shape(init_state, jax.random.key(0))
    params_at = param_shardings(model.axes(config), shapes["params"], mesh)
    at = state_shardings(shapes, params_at, replicated(mesh), tx)
    after_step = getattr(model, "after_step", None)
    step = make_train_step(
        functools.partial(model.loss, config), tx, recipe, after_step and functools.partial(after_step, config)
    )
    return Setup(
        jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, at),
        jax.jit(init_state, out_shardings=at),
        jax.jit(step, donate_argnums=0, out_shardings=(at, replicated(mesh))),
    )


# ---------------------------------------------------------------- the loop


def train(experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh, *, quiet: bool = False) -> None:
    """Trains a stage to its recipe's last step, from the newest good checkpoint if there is one.

    Raises: TrainingError if the loss stops being a number.
    """
    objective = make_objective(experiment, stage, workdir)
    recipe, config, model = objective.recipe, objective.config, objective.model

    # ---- the state, restored or created where it shall live
    root = jax.random.key(experiment.seed, impl="threefry2x32")
    setup = compile_training(model, config, recipe, mesh)
    checkpointer = Checkpointer(workdir.checkpoints(stage), keep=recipe.keep_checkpoints)
    state = checkpointer.restore(setup.abstract_state)
    if state is None:
        state = setup.init(jax.random.fold_in(root, STAGES.index(stage)))
    start = int(state["step"])

    # ---- the data: a function of (seed, step)
    stream = batches(
        objective.train,
        global_batch=recipe.batch_size,
        seed=experiment.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=experiment.data.workers,
    )
    validate = make_validation(objective, mesh)
    scorer = Scorer(experiment, workdir, mesh) if stage == "generator" and experiment.evaluate.live_samples else None

    with sharded(mesh), Reporter(workdir.path, stage, total_steps=recipe.steps, quiet=quiet or not is_main()) as reporter:
        reporter.resume_from(start)
        shown: dict[str, float] = {}

        def record(step: int, metrics: dict[str, Any]) -> None:
            """Fetches and writes the metrics of a finished step."""
            values = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(values["loss"]):
                raise TrainingError(
                    f"the loss of {stage} step {step} is {values['loss']}: lower {stage} learning_rate; "
                    "the last good checkpoint is kept and is where the same command resumes"
                )
            shown["loss"] = values["loss"]
            if step % recipe.log_every == 0 or step == recipe.steps:
                reporter.metrics(step, values)

        pending: tuple[int, dict[str, Any]] | None = None
        for step in range(start + 1, recipe.steps + 1):
            state, metrics = setup.step(state, global_batch(next(stream), mesh), root)
            # The metrics of the step before are fetched while this one runs: the device never waits for the host.
            if pending is not None:
                record(*pending)
            pending = (step, metrics)
            reporter.progress(step, **shown)
            checkpointer.poll()
            last = step == recipe.steps
            if last or step % recipe.eval_every == 0:
                params = evaluated_params(state)
                reporter.metrics(step, validate(params) | (scorer.live(params) if scorer else {}))
            if last or step % recipe.checkpoint_every == 0:
                record(*pending)
                pending = None
                checkpointer.save(step, state, {"experiment": experiment.name, "stage": stage, "step": step})
        checkpointer.close()


def finished(experiment: Experiment, stage: str, workdir: Workdir) -> str | None:
    """The hash of the stage's last checkpoint if it is trained to the end and verifies, else None."""
    recipe = {"tokenizer": experiment.tokenizer_train, "classifier": experiment.classifier_train}.get(
        stage, experiment.train
    )
    good = good_step(workdir.checkpoints(stage))
    return good[1] if good is not None and good[0] == recipe.steps else None
