"""Trains one thing: the tokenizer, the classifier or the generator. One loop for all; the objective says which.

Read from top to bottom: how it is validated, the state and its step, then the loop; what is trained is in objective.py. The
position in the data is the step, the randomness of a step comes from (seed, step), so a run that was killed and started again is
the run that was not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.data.loader import Source, batches
from rar_jax.errors import CheckpointError, Preempted, TrainingError
from rar_jax.experiment import Experiment
from rar_jax.models import Model
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import drop_metadata, local_rows, make_global_batch, prefetch_batches, put_on_mesh
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.parallel.rules import batch_sharding, param_shardings, replicated, sharded
from rar_jax.runs.checkpoint import IRREGULAR, Checkpointer, good_step, mark_if_best, read_meta
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.logging import Reporter
from rar_jax.runs.session import Session
from rar_jax.runs.workdir import Workdir
from rar_jax.sections import Recipe
from rar_jax.training import guard
from rar_jax.training.live import Numbers, best_by, live_scorers
from rar_jax.training.live_grids import live_grid
from rar_jax.training.objective import Objective, encoded, make_objective
from rar_jax.training.optimizer import optimizer
from rar_jax.training.step import Batch, State, make_init, make_train_step, state_shardings
from rar_jax.training.telling import Telling
from rar_jax.weights.stages import STAGES, evaluated, given_generator, take_over_tokenizer, trained_params

# ---------------------------------------------------------------- validation


def make_validation(objective: Objective, records: int, mesh: Mesh, frozen: Any = None) -> Numbers:
    """Mean metrics of parameters over the first held-out `records` (rounded down to divide over the mesh).

    frozen: parameters of the objective's encoder, if it has one: held-out images are encoded once, here.
    """
    parts, records = batch_divisor(mesh), min(records, len(objective.heldout))
    count = math.ceil(records / 512)
    size = max(records // count // parts, 1) * parts
    batches_by_variant: list[tuple[str, Batch]] = []
    encode = jax.jit(functools.partial(encoded, objective.encoder), out_shardings=batch_sharding(mesh))
    for i in range(count):
        places = (i * size + local_rows(mesh, size)) % len(objective.heldout)
        batch = make_global_batch(drop_metadata(objective.heldout.gather(places)), mesh)
        if objective.encoder is not None:
            with sharded(mesh):
                batch = encode(frozen, batch)
        for name, extra in objective.variants(size).items():
            batches_by_variant.append((name and f"{name}_", {**batch, **put_on_mesh(extra, batch_sharding(mesh))}))
    loss = jax.jit(
        lambda params, batch: objective.model.loss(objective.config, params, batch, key=None, step=0)[1],
        out_shardings=replicated(mesh),
    )

    def compile(params: Any) -> None:
        shapes = {str(jax.tree.map(jnp.shape, batch)): batch for _, batch in batches_by_variant}
        for batch in shapes.values():
            loss.lower(params, batch).compile()

    def validate(params: Any, poll: Callable[[], None]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for prefix, batch in batches_by_variant:
            poll()
            for name, value in loss(params, batch).items():
                key = f"validation/{prefix}{name}"
                totals[key] = totals.get(key, 0.0) + float(value) / count
        return totals

    return Numbers(compile, validate)


# ---------------------------------------------------------------- state and step


class Setup(NamedTuple):
    """A training, sharded over a mesh: `init` (key -> state) and `step` ((state, batch, root key, parameters of the
    encoder, if there is one) -> (state, metrics)), both jitted, the step with the state donated; `abstract_state` has the
    shapes and shardings."""

    abstract_state: State
    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, dict[str, jax.Array]]]


def compile_training(model: Any, config: Any, recipe: Recipe, mesh: Mesh, encoder: Model | None = None) -> Setup:
    """Sets up the training of a contract module: parameters and optimizer lie as its axes and rules.py say.

    encoder: a tokenizer that makes tokens of the images in a batch, inside the step.

    Raises: ConfigError if a parameter does not divide over the mesh.
    """
    tx = optimizer(recipe, model.decay_mask(config))
    init_state = make_init(functools.partial(model.init, config), tx, recipe)
    shapes = jax.eval_shape(init_state, jax.random.key(0))
    params_at = param_shardings(model.axes(config), shapes["params"], mesh)
    at = state_shardings(shapes, params_at, replicated(mesh), tx)
    after_step = getattr(model, "after_step", None)

    def step(state: State, batch: Batch, root: jax.Array, frozen: Any = None) -> tuple[State, dict[str, jax.Array]]:
        # Each encodes for itself, so that of an accumulated batch only a part's activations are there at a time.
        def on_tokens(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda params, batch, **rest: function(config, params, encoded(encoder, frozen, batch), **rest)

        train_step = make_train_step(on_tokens(model.loss), tx, recipe, after_step and on_tokens(after_step))
        return train_step(state, batch, root)

    return Setup(
        jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, at),
        jax.jit(init_state, out_shardings=at),
        jax.jit(step, donate_argnums=0, out_shardings=(at, replicated(mesh))),
    )


def start_from(experiment: Experiment, state: State, setup: Setup, mesh: Mesh) -> tuple[State, dict[str, str]]:
    """A fresh state with the parameters of `config.init_from` made to fit, and what they were made from.

    Raises: ConfigError if they cannot be made to fit; what `open_weights` raises.
    """
    weights, module = given_generator(experiment), experiment.generator.module
    adapt = functools.partial(module.adapt, experiment.generator.config, other_config=weights.model.config)
    adapt = jax.jit(adapt, out_shardings=jax.tree.map(lambda s: s.sharding, setup.abstract_state["params"]))
    params = adapt(state["params"], other_params=weights.place(mesh))
    extra = {name: jax.tree.map(jnp.copy, params) for name in state["extra"]}  # an EMA starts from the parameters
    return {**state, "params": params, "extra": extra}, {"path": str(weights.path), "sha256": weights.sha256()}


def what_takes_memory(experiment: Experiment, stage: str) -> tuple[str, str]:
    """What a training's memory depends on, and what to change where it is too much: for `memory.exhaustion`."""
    recipe, section = experiment.recipe(stage), {"tokenizer": "tokenizer_train", "classifier": "classifier.train"}
    where, mesh = f"config.{section.get(stage, 'train')}", experiment.mesh
    assert recipe is not None
    has = f"{where}.batch_size {recipe.batch_size}, accumulation {recipe.accumulation}, mesh fsdp {mesh.fsdp}, tensor {mesh.tensor}"
    remat = getattr(experiment.model(stage).config, "remat", None)
    advice = f"give a larger {where}.accumulation (the same training in smaller parts) or a smaller batch_size"
    advice += f", config.{stage}.remat=True" if remat is False else ""
    return f"training the {stage}, {has}", f"{advice}, or lay the weights over more devices with config.mesh.fsdp"


# ---------------------------------------------------------------- the loop


def train(
    experiment: Experiment,
    stage: str,
    workdir: Workdir,
    mesh: Mesh,
    *,
    quiet: bool = False,
    session: Session | None = None,
) -> None:
    """Trains a stage to its recipe's last step, from the newest good checkpoint if there is one; a tokenizer whose weights
    are given is taken over.

    Raises: TrainingError if too many updates are bad (guard.py); CheckpointError if a stage before is missing, or saves keep
      failing; Preempted after a save.
    """
    session = session or Session()
    recipe = experiment.recipe(stage)
    if recipe is None and stage == "tokenizer":
        take_over_tokenizer(experiment, workdir, mesh)
        return
    objective = make_objective(experiment, stage, workdir)
    # The encoder's parameters, an argument of the step: neither donated nor saved.
    frozen = trained_params(experiment, "tokenizer", workdir, mesh)[0] if objective.encoder else None
    assert recipe is not None  # a classifier that is not there has been refused by now
    folder, ledger = workdir.checkpoints(stage), session.ledger
    _refuse_other_tokens(folder, objective)

    # ---- keys: one for the parameters, one that every step folds its number into
    root = jax.random.fold_in(jax.random.key(experiment.seed, impl="threefry2x32"), STAGES.index(stage))
    init_key, step_key = jax.random.split(root)

    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.exhaustion(*what_takes_memory(experiment, stage)))
        # ---- the state, restored or created where it shall live
        setup = compile_training(objective.model, objective.config, recipe, mesh, objective.encoder)
        checkpointer = stack.enter_context(contextlib.closing(checkpointer_of(stage, folder, recipe, ledger)))

        def newest(before: int | None = None) -> State:
            """The newest good state below a step, or a fresh one."""
            unguarded = {
                "guard": put_on_mesh(guard.init(), replicated(mesh))
            }  # checkpoints from before there was a guard
            state = checkpointer.restore(setup.abstract_state, before=before, added=unguarded)
            if state is None:
                state = setup.init(init_key)
                if stage == "generator" and experiment.init_from:
                    state, objective.meta["init_from"] = start_from(experiment, state, setup, mesh)
            return state

        state = newest()
        step = start = begun = int(state["step"])  # begun: where it went on from last
        if start and not quiet and is_main():
            print(f"{stage}: goes on from step {start} of {recipe.steps}")

        # ---- the data: a function of (seed, place in the stream); the place is the step and what the guard passed over
        data = batches_after(state, objective.train, experiment, recipe, mesh, stack)
        numbers = [make_validation(objective, recipe.eval_records, mesh, frozen)]
        numbers += live_scorers(experiment, workdir, mesh) if stage == "generator" else []
        draw = live_grid(experiment, stage, workdir, mesh)

        # ---- what is told
        reporter = stack.enter_context(
            Reporter(workdir.path, stage, total_steps=recipe.steps, quiet=quiet, wandb=experiment.wandb)
        )
        reporter.resume_from(start)
        telling = Telling(stage, recipe, reporter, session, state, numbers, draw)

        def due(step: int) -> tuple[bool, bool]:
            """Whether a step is to be evaluated, and saved."""
            last = step == recipe.steps
            return last or step % recipe.eval_every == 0, last or step % recipe.checkpoint_every == 0

        def amid_bad(step: int) -> bool:
            """Whether the way may lead back: then a step is not saved, but for the last, unless a signal came."""
            return telling.bad_in_a_row > 0 and step < recipe.steps

        def save(step: int, state: State, score: tuple[str, float] | None = None, *, preempted: bool = False) -> None:
            ledger.lap("training")
            meta = objective.meta | {"step": step}
            if preempted and step == recipe.steps:
                meta["unevaluated"] = True  # a stage is finished when its last step has been evaluated
            if preempted and amid_bad(step):
                meta[IRREGULAR] = True
            checkpointer.save(step, state, meta, score, retain=not preempted)
            ledger.lap("saving")

        # ---- the loop
        stack.enter_context(sharded(mesh))
        pending: tuple[int, dict[str, Any]] | None = None
        compiled = False
        ledger.lap("starting")
        ledger.row("stage", stage=stage, step=start, steps=recipe.steps)
        try:
            if start < recipe.steps:
                if not quiet and is_main():
                    print(f"{stage}: compiling")
                telling.compile(state)  # before there is a step to save: now a signal ends the process at once
                ledger.lap("starting")
            evaluate_now, save_now = due(start)
            if start and evaluate_now:
                told = evaluated(workdir, stage, start)
                if told is None:  # it was preempted there
                    told = telling.evaluate(start, state)
                    if start == recipe.steps and evaluated(workdir, stage, start) is None:
                        raise TrainingError(
                            f"{stage}: the evaluation of the last step could not be written to {workdir.path}, and counts only "
                            "then: make room and give the same command again"
                        )
                score = best_by(told) if recipe.keep_best and save_now and not amid_bad(start) else None
                if score is not None:
                    from_main(lambda: mark_if_best(folder, start, *score))
            while step < recipe.steps:
                step += 1
                batch = next(data)
                state, metrics = setup.step(state, batch, step_key, frozen)
                if not compiled:
                    compiled = True  # and there is something to save
                    stack.enter_context(session.watch.saving())
                    ledger.lap("starting")
                # The metrics of the step before are fetched while this one runs: the device never waits for the host.
                if pending is not None:
                    telling.record(*pending)
                pending = (step, metrics)
                if telling.bad_in_a_row >= recipe.most_skips:
                    first_bad = step - telling.bad_in_a_row
                    ledger.lap("training")
                    checkpointer.wait()
                    every = recipe.checkpoint_every
                    nowhere = first_bad > every and good_step(folder, before=first_bad, every=every) is None
                    if nowhere or int(state["guard"]["rewinds"]) >= recipe.most_rewinds:
                        raise TrainingError(give_up(workdir, stage, recipe, state, batch))
                    back = newest(before=first_bad)
                    back["guard"] = guard.sent_back(back["guard"], state["guard"], steps=step - int(back["step"]))
                    ledger.row("rewind", stage=stage, step=step, to=int(back["step"]))
                    state, pending = back, None
                    step = begun = int(state["step"])
                    telling.go_on_from(state)
                    data = batches_after(state, objective.train, experiment, recipe, mesh, stack)
                    reporter.resume_from(step)
                    continue
                reporter.progress(step, **telling.shown)
                checkpointer.poll()
                session.poll()
                evaluate_now, save_now = due(step)
                if evaluate_now or save_now:
                    telling.record(*pending)
                    pending = None
                told = telling.evaluate(step, state) if evaluate_now else {}
                # Last, so that a resumed run has the rows of this step.
                if save_now and not amid_bad(step):
                    save(step, state, best_by(told) if recipe.keep_best else None)
            checkpointer.wait()  # here, where a signal does not cut the last save off
        except Preempted:
            if pending is not None:
                telling.record(*pending)
            if step != begun:
                save(step, state, preempted=True)
            raise
    if session.watch.noticed:  # during the last save
        raise Preempted


def checkpointer_of(stage: str, folder: pathlib.Path, recipe: Recipe, ledger: Ledger) -> Checkpointer:
    """The stage's checkpoints; what counts, and a full disk, is told to the ledger."""
    return Checkpointer(
        folder,
        keep=recipe.keep_checkpoints,
        every=recipe.checkpoint_every,
        verify=recipe.verify_saves,
        on_saved=lambda step: ledger.row("saved", stage=stage, step=step),
        on_full_disk=lambda step: ledger.row("save_failed", stage=stage, step=step, reason="the disk is full"),
    )


def batches_after(
    state: State, source: Source, experiment: Experiment, recipe: Recipe, mesh: Mesh, stack: contextlib.ExitStack
) -> Iterator[Batch]:
    """The batches of the steps that follow, on the devices; the stack ends the workers."""
    stream = batches(
        source,
        global_batch=recipe.batch_size,
        seed=experiment.seed,
        start_step=int(state["step"]) + int(state["guard"]["data_offset"]),
        rows=local_rows(mesh, recipe.batch_size),
        num_workers=experiment.data.workers,
    )
    stack.callback(getattr(stream, "close", lambda: None))
    return prefetch_batches(stream, mesh)


def give_up(workdir: Workdir, stage: str, recipe: Recipe, state: State, batch: Batch) -> str:
    """Leaves behind what a person needs to see why a training goes nowhere, and says so.

    WORKDIR/dump/<stage>/<step>/ is a checkpoint of the state, which bad updates have not touched; batch.<process>.npz the rows of the
    last batch on this process.
    """
    folder, step = workdir.path / "dump" / stage, int(state["step"])
    from_main(lambda: shutil.rmtree(folder / str(step), ignore_errors=True))  # of an earlier time
    with contextlib.closing(Checkpointer(folder, keep=2)) as checkpointer:
        checkpointer.save(step, state, {"step": step, "stage": stage})
    here = {name: [np.asarray(s.data) for s in x.addressable_shards if s.replica_id == 0] for name, x in batch.items()}
    rows = {name: np.concatenate(parts) for name, parts in here.items() if parts}
    np.savez(folder / f"batch.{jax.process_index()}.npz", allow_pickle=False, **rows)
    seen = {name: int(state["guard"][name]) for name in ("skipped", "rewinds", "data_offset")}
    return (
        f"{stage}: {recipe.most_skips} updates in a row were bad (loss or gradient not finite, or a spike) by step {step}, after going "
        f"back {seen['rewinds']} time(s), as often as it may or can; {seen['skipped']} were left out in all. The state and the last batch are in {folder}. Train in "
        "a new --workdir with a lower learning_rate or a longer warmup; this one keeps its last good checkpoint"
    )


def _refuse_other_tokens(folder: pathlib.Path, objective: Objective) -> None:
    good = good_step(folder)
    known = objective.meta.get("tokenizer_sha256")
    if (
        good is not None
        and known is not None
        and from_main(lambda: read_meta(folder, good[0]))["tokenizer_sha256"] != known
    ):
        raise CheckpointError(
            f"{folder} was trained on the tokens of another tokenizer than the one in this work directory: move it away"
        )
