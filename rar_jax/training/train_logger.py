"""Logging and periodic evaluation for the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rar_jax.runs.logging import Reporter
from rar_jax.runs.session import Session
from rar_jax.sections import Recipe
from rar_jax.training.live import Evaluator
from rar_jax.training.live_grids import ImageGrid
from rar_jax.training.step import State, evaluated_params

# Metrics of the progress line, by the end or the beginning of their names without "validation/".
SHOWN_ENDS, SHOWN_BEGINNINGS = ("bits", "psnr"), ("fd_", "fid_", "acc")


class TrainLogger:
    """Writes the metrics of steps and evaluations, and bad updates to the ledger.

    consecutive_bad: bad updates without a good one, as of the last step logged.
    """

    def __init__(
        self,
        stage: str,
        recipe: Recipe,
        reporter: Reporter,
        session: Session,
        evaluators: Sequence[Evaluator],
        grid: ImageGrid | None,
    ) -> None:
        self._stage, self._recipe, self._reporter, self._session = stage, recipe, reporter, session
        self._evaluators, self._grid = evaluators, grid
        self._shown: dict[str, float] = {}
        self._skipped = self.consecutive_bad = 0

    def compile(self, state: State) -> None:
        """Compile every program that `evaluate` calls."""
        params = evaluated_params(state)
        for each in (*self._evaluators, *([] if self._grid is None else [self._grid])):
            each.compile(params)

    def resume_from(self, state: State) -> None:
        """Drop what was logged after this state. The next step logged follows it."""
        self._reporter.resume_from(int(state["step"]))
        self._skipped, self.consecutive_bad = (int(state["guard"][name]) for name in ("skipped", "consecutive"))

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Fetch and log the metrics of a step."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.consecutive_bad, before = int(values.pop("consecutive")), self._skipped
        self._skipped = int(values["skipped"])
        if self._skipped > before:
            reasons = {name: repr(values[name]) for name in ("loss", "grad_norm")}
            self._session.ledger.row("skipped", stage=self._stage, step=step, **reasons)
        self._shown["loss"] = values["loss"]
        if step % self._recipe.log_every == 0 or step == self._recipe.steps or self._skipped > before:
            self._reporter.metrics(step, values)
        self._reporter.progress(step, **self._shown)

    def evaluate(self, step: int, state: State) -> dict[str, float]:
        """Validate, score and draw; log and return the metrics. Raises Preempted between two batches."""
        self._session.ledger.lap("training")
        params = evaluated_params(state)
        metrics: dict[str, float] = {}
        for evaluator in self._evaluators:
            metrics |= evaluator.evaluate(params, step, self._session.poll)
        if self._grid is not None:
            self._session.poll()
            name = "reconstructions" if self._stage == "tokenizer" else "samples"
            self._reporter.grid(name, self._grid.draw(params), step)
        self._reporter.metrics(step, metrics)  # last: this row says that the step was evaluated
        for name, value in metrics.items():
            short = name.removeprefix("validation/")
            if short.endswith(SHOWN_ENDS) or short.startswith(SHOWN_BEGINNINGS):
                self._shown[short] = value
        self._session.ledger.lap("evaluating")
        return metrics
