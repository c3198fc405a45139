"""Train one stage: the tokenizer, the classifier or the generator. objective.py says what differs between them.

The position in the data is the step plus the batches that rollbacks skipped, and the randomness of a step comes from
(seed, step): a run that was killed and resumed is bitwise identical to one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.data.loader import batches
from rar_jax.errors import Preempted, TrainingError
from rar_jax.experiment import Experiment
from rar_jax.keys import training_keys
from rar_jax.parallel import memory
from rar_jax.parallel.arrays import local_rows, prefetch_batches, put_on_mesh
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.parallel.rules import replicated, sharded
from rar_jax.runs.checkpoint import Checkpointer, good_step, mark_if_best
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.session import Session
from rar_jax.runs.workdir import Workdir
from rar_jax.sections import Recipe
from rar_jax.training import guard
from rar_jax.training.failures import dump_failure, oom_hint
from rar_jax.training.live import Evaluator, Validator, make_live_evaluators, select_score
from rar_jax.training.objective import Objective, make_objective, start_from
from rar_jax.training.step import Batch, Setup, State, compile_training, evaluated_params
from rar_jax.weights.stages import copy_tokenizer, evaluated, trained_params


class Rollback(Exception):
    """The updates from step `args[0]` on are bad: roll back to an earlier step."""


def train(
    experiment: Experiment,
    stage: str,
    workdir: Workdir,
    mesh: Mesh,
    *,
    quiet: bool = False,
    session: Session | None = None,
) -> None:
    """Train a stage to its recipe's last step, from its newest good checkpoint if there is one.

    A tokenizer whose weights are given is copied instead.

    Raises: TrainingError if bad updates persist (guard.py); CheckpointError if an earlier stage is missing, or saves
      keep failing; Preempted after a save.
    """
    session, recipe = session or Session(), experiment.recipe(stage)
    if recipe is None and stage == "tokenizer":
        copy_tokenizer(experiment, workdir, mesh)
        return
    objective = make_objective(experiment, stage, workdir)
    assert recipe is not None  # `make_objective` refuses a missing classifier
    frozen = trained_params(experiment, "tokenizer", workdir, mesh)[0] if objective.on_the_fly else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.exhaustion(*oom_hint(experiment, stage)))
        stack.enter_context(sharded(mesh))
        reporter = RunLogger(workdir.path, stage, total_steps=recipe.steps, quiet=quiet, wandb=experiment.wandb)
        trainer = Trainer(experiment, objective, frozen, recipe, workdir, mesh, session, stack.enter_context(reporter))
        stack.enter_context(contextlib.closing(trainer))
        trainer.resume_from(trainer.restore_or_init())
        session.ledger.lap("starting")
        session.ledger.row("stage", stage=stage, step=trainer.step, steps=recipe.steps)
        if not quiet and is_main():
            resumed = f"resuming from step {trainer.step} of {recipe.steps}, " if trainer.step else ""
            print(f"{stage}: {resumed}compiling", flush=True)
        trainer.compile()
        session.ledger.lap("starting")
        stack.enter_context(session.preemption.listening(mesh))
        trainer.run()


@dataclasses.dataclass(eq=False)
class Trainer:
    """The training of one stage.

    frozen: the tokenizer's parameters where it encodes images: an argument of the step, neither donated nor saved.
    state, step: the current ones. saved_step: the newest step on disk. in_flight: a step that the devices may still
    compute, and its metrics. skipped, consecutive_bad: the guard's counts after the last logged step. shown: metrics
    of the progress line.
    """

    experiment: Experiment
    objective: Objective
    frozen: Any
    recipe: Recipe
    workdir: Workdir
    mesh: Mesh
    session: Session
    reporter: RunLogger

    def __post_init__(self) -> None:
        experiment, objective, recipe = self.experiment, self.objective, self.recipe
        workdir, mesh = self.workdir, self.mesh
        self.ledger: Ledger = self.session.ledger
        self.stage: str = objective.meta["stage"]
        stage = self.stage
        self.keys: Any = training_keys(experiment.seed, stage)  # of the initialization and of the steps
        self.setup: Setup = compile_training(objective.model, objective.config, recipe, mesh, objective.tokenizer)
        self.evaluators: list[Evaluator] = [Validator(objective, recipe.eval_records, mesh, self.frozen)]
        self.evaluators += make_live_evaluators(experiment, stage, workdir, mesh, self.reporter)
        self.checkpointer: Checkpointer = Checkpointer(
            workdir.checkpoints(stage),
            before_commit=workdir.send,
            keep=recipe.keep_checkpoints,
            every=recipe.checkpoint_every,
            verify=recipe.verify_saves,
            on_saved=lambda step: self.ledger.row("saved", stage=stage, step=step),
            on_full_disk=lambda step: self.ledger.row("save_failed", stage=stage, step=step, reason="the disk is full"),
        )
        self.step: int = 0
        self.saved_step: int = 0
        self.skipped: int = 0
        self.consecutive_bad: int = 0
        self.state: State = {}
        self.batch: Batch = {}
        self.batches: Iterator[Batch] = iter(())
        self.stream: Any = None
        self.in_flight: tuple[int, Any] | None = None
        self.shown: dict[str, float] = {}

    # ---------------------------------------------------------------- the loop

    def run(self) -> None:
        """Train to the last step. Bad updates roll back; a preemption saves the current step, and is raised."""
        try:
            self.rerun_evaluation()
            while self.step < self.recipe.steps:
                try:
                    self.batch = next(self.batches)
                    self.state, metrics = self.setup.step(self.state, self.batch, self.keys[1], self.frozen)
                    self.step += 1
                    # The metrics of the previous step are fetched while this one runs: devices never wait for the host.
                    self.log_step_in_flight()
                    self.in_flight = self.step, metrics
                    self.checkpointer.poll()
                    self.session.poll()
                    if self.is_due(self.recipe.eval_every) or self.is_due(self.recipe.checkpoint_every):
                        self.log_step_in_flight()
                        self.evaluate_and_save()
                except Rollback as rollback:
                    self.roll_back(*rollback.args)
            self.checkpointer.wait()
        except Preempted:
            self.save_preempted()
            raise
        if self.session.preemption.agree():  # a signal during the last save
            raise Preempted

    def log_step_in_flight(self) -> None:
        """Log the metrics of the step in flight, if any. Raises: Rollback after too many consecutive bad updates."""
        if self.in_flight is None:
            return
        (step, metrics), self.in_flight = self.in_flight, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = int(values["skipped"]) > self.skipped
        self.skipped, self.consecutive_bad = int(values["skipped"]), int(values.pop("consecutive"))
        if bad:
            self.ledger.row("skipped", stage=self.stage, step=step, **{k: repr(values[k]) for k in guard.MONITORED})
        if step % self.recipe.log_every == 0 or step == self.recipe.steps or bad:
            self.reporter.write_metrics(step, values)
        self.shown["loss"] = values["loss"]
        self.reporter.show_progress(step, **self.shown)
        if self.consecutive_bad >= self.recipe.max_consecutive_skips:
            raise Rollback(step - self.consecutive_bad + 1)

    def is_due(self, every: int) -> bool:
        """Whether the current step is on a schedule; the last step is on all of them."""
        return self.step == self.recipe.steps or self.step % every == 0

    def evaluate_and_save(self) -> None:
        """Evaluate and save the current step if they are due. Within bad updates nothing is saved but the last step."""
        metrics = self.evaluate() if self.is_due(self.recipe.eval_every) else {}
        if self.is_due(self.recipe.checkpoint_every) and (not self.consecutive_bad or self.step == self.recipe.steps):
            # After the evaluation, so that a run which resumes from this step has its metrics.
            self.save(self.objective.meta, select_score(metrics) if self.recipe.keep_best else None)

    def evaluate(self) -> dict[str, float]:
        """Evaluate the current state; log and return the metrics. Raises: Preempted between two batches."""
        self.ledger.lap("training")
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators:
            metrics |= evaluator.evaluate(evaluated_params(self.state), self.step, self.session.poll)
        self.reporter.write_metrics(self.step, metrics)  # last: this row says that the step was evaluated
        short = {name.removeprefix("validation/"): value for name, value in metrics.items()}
        shown = [k for k in short if k.startswith(("fd_", "fid_", "acc")) or k.endswith(("bits", "psnr"))]
        self.shown |= {name: short[name] for name in shown}
        self.ledger.lap("evaluating")
        return metrics

    def rerun_evaluation(self) -> None:
        """Evaluate the restored step if it is due and a preemption came first."""
        if self.step == 0 or not self.is_due(self.recipe.eval_every):
            return
        metrics = evaluated(self.workdir, self.stage, self.step)
        score = select_score(self.evaluate() if metrics is None else metrics)
        if self.recipe.keep_best and self.is_due(self.recipe.checkpoint_every) and score is not None:
            from_main(lambda: mark_if_best(self.workdir.checkpoints(self.stage), self.step, *score))

    # ---------------------------------------------------------------- saving and restoring

    def save(self, meta: dict[str, Any], score: tuple[str, float] | None = None, *, retain: bool = True) -> None:
        """Start to save the current step in the background."""
        self.ledger.lap("training")
        self.checkpointer.save(self.step, self.state, meta | {"step": self.step}, score, retain=retain)
        self.saved_step = self.step
        self.ledger.lap("saving")

    def save_preempted(self) -> None:
        """Save the current step off schedule, unless its updates are bad."""
        with contextlib.suppress(Rollback):
            self.log_step_in_flight()
        if self.step == self.saved_step or self.consecutive_bad:
            return
        # A stage counts as finished once its last step has been evaluated.
        unevaluated = {"unevaluated": True} if self.step == self.recipe.steps else {}
        self.save(self.objective.meta | unevaluated, retain=False)
        self.checkpointer.wait()  # here, where a repeated signal does no harm

    def restore_or_init(self, before: int | None = None) -> State:
        """Restore the newest good checkpoint below a step, or initialize a state."""
        state = self.checkpointer.restore(self.setup.abstract_state, before=before)
        if state is None:
            state = self.setup.init(self.keys[0])
            if self.stage == "generator" and self.experiment.init_from:
                state, self.objective.meta["init_from"] = start_from(self.experiment, state, self.setup, self.mesh)
        return state

    def resume_from(self, state: State) -> None:
        """Continue from a restored or initial state: its step, its position in the data, and the metrics up to it."""
        self.state, self.in_flight = state, None
        self.step = self.saved_step = int(state["step"])
        self.skipped, self.consecutive_bad = (int(state["guard"][name]) for name in ("skipped", "consecutive"))
        self.reporter.resume_from(self.step)
        self.close_stream()
        self.stream = batches(
            self.objective.train,
            global_batch=self.recipe.batch_size,
            seed=self.experiment.seed,
            start_step=self.step + int(state["guard"]["data_offset"]),
            rows=local_rows(self.mesh, self.recipe.batch_size),
            num_workers=self.experiment.data.workers,
        )
        self.batches = prefetch_batches(self.stream, self.mesh)

    def roll_back(self, first_bad: int) -> None:
        """Resume from the newest good scheduled checkpoint before a step, and skip the batches since.

        Raises: TrainingError, with a dump, if there is none or after the maximum number of rollbacks.
        """
        self.ledger.lap("training")
        self.checkpointer.wait()
        current, every = jax.device_get(self.state["guard"]), self.recipe.checkpoint_every
        folder = self.workdir.checkpoints(self.stage)
        lost = first_bad > every and good_step(folder, before=first_bad, every=every) is None
        if lost or current["rollbacks"] >= self.recipe.max_rollbacks:
            raise TrainingError(dump_failure(self.workdir, self.stage, self.state, self.batch))
        jax.tree.map(lambda x: x.delete(), self.state)  # two states may not fit into memory
        state = self.restore_or_init(before=first_bad)
        to = int(state["step"])
        restored = guard.after_rollback(jax.device_get(state["guard"]), current, num_steps=self.step - to)
        self.ledger.row("rollback", stage=self.stage, step=self.step, to=to)
        self.resume_from({**state, "guard": put_on_mesh(restored, replicated(self.mesh))})

    # ---------------------------------------------------------------- around the loop

    def compile(self) -> None:
        """Compile every program of the loop, so that a signal during it is answered within seconds."""
        if self.step < self.recipe.steps:
            self.batch = next(self.batches)
            self.batches = itertools.chain([self.batch], self.batches)
            self.setup.step.lower(self.state, self.batch, self.keys[1], self.frozen).compile()
        for evaluator in self.evaluators:
            evaluator.compile(evaluated_params(self.state))

    def close_stream(self) -> None:
        """End the input workers."""
        getattr(self.stream, "close", lambda: None)()

    def close(self) -> None:
        """Finish the save that is under way, and end the input workers."""
        try:
            self.close_stream()
        finally:
            self.checkpointer.close()
