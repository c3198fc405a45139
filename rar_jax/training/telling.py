"""What a training tells of its steps, evaluations and bad updates while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rar_jax.runs.logging import RunLogger
from rar_jax.runs.session import Session
from rar_jax.sections import Recipe
from rar_jax.training.live import Numbers
from rar_jax.training.live_grids import Draw
from rar_jax.training.step import State, evaluated_params


class Telling:
    """Writes metrics and the ledger. shown: the numbers of the progress line. bad_in_a_row: as of the last step recorded.

    Args:
      state: where the training begins. numbers: of an evaluation. draw: its picture.
    """

    def __init__(
        self,
        stage: str,
        recipe: Recipe,
        reporter: RunLogger,
        session: Session,
        state: State,
        numbers: Sequence[Numbers],
        draw: Draw | None,
    ) -> None:
        self._stage, self._recipe, self._reporter, self._session = stage, recipe, reporter, session
        self._numbers, self._draw = numbers, draw
        self.shown: dict[str, float] = {}
        self.go_on_from(state)

    def go_on_from(self, state: State) -> None:
        """The next step recorded is the one after this state."""
        self._skipped = int(state["guard"]["skipped"])
        self.bad_in_a_row: int = int(state["guard"]["in_a_row"])

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Fetches and writes the metrics of a finished step."""
        values = {name: float(value) for name, value in metrics.items()}
        self.bad_in_a_row, before = int(values.pop("in_a_row")), self._skipped
        self._skipped = int(values["skipped"])
        bad = self._skipped > before
        if bad:
            told = {name: repr(values[name]) for name in ("loss", "grad_norm")}
            self._session.ledger.row("skipped", stage=self._stage, step=step, **told)
        self.shown["loss"] = values["loss"]
        if step % self._recipe.log_every == 0 or step == self._recipe.steps or bad:
            self._reporter.write_metrics(step, values)

    def compile(self, state: State) -> None:
        """Compiles what `evaluate` calls."""
        params = evaluated_params(state)
        for each in (*self._numbers, *([] if self._draw is None else [self._draw])):
            each.compile(params)

    def evaluate(self, step: int, state: State) -> dict[str, float]:
        """Validates and scores; all of it is told, and returned. Raises: Preempted between two batches."""
        self._session.ledger.lap("training")
        params = evaluated_params(state)
        told: dict[str, float] = {}
        for each in self._numbers:
            told |= each.of(params, self._session.poll)
        if self._draw is not None:
            self._session.poll()
            name = "reconstructions" if self._stage == "tokenizer" else "samples"
            self._reporter.write_grid(step, name, self._draw.of(params))
        self._reporter.write_metrics(step, told)  # last: they say that the step was evaluated
        of_note, ends = ("fd_", "fid_", "acc"), ("bits", "psnr")
        watched = {name.removeprefix("validation/"): value for name, value in told.items()}
        self.shown |= {k: v for k, v in watched.items() if k.endswith(ends) or k.startswith(of_note)}
        self._session.ledger.lap("evaluating")
        return told
