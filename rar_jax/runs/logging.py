"""Metrics and images of a run: metrics.jsonl, grids/ and, through writers.py, TensorBoard and Weights & Biases.

A row of metrics.jsonl is {"stage", "step", "time", ...}: time in seconds since 1970, other values finite or null.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeGuard

import numpy as np

from rar_jax.parallel.processes import is_main
from rar_jax.runs import grids
from rar_jax.runs.disk import append, is_full
from rar_jax.runs.progress import ProgressLine
from rar_jax.runs.writers import TensorBoardWriter, WandbWriter

Row = dict[str, Any]
Writer = TensorBoardWriter | WandbWriter

CELL = 48  # minimum pixels of an image in TensorBoard and Weights & Biases
log: logging.Logger = logging.getLogger(__name__)


class RunLogger:
    """Log one stage ("tokenizer", "classifier", "generator") of a run. Only process 0 writes. A context manager.

    A full disk costs the row or image, not the run.

    Args:
      total_steps: end of the progress line. quiet: do not draw it. wandb: project of Weights & Biases, or None.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        stage: str,
        *,
        total_steps: int,
        quiet: bool = False,
        wandb: str | None = None,
    ) -> None:
        self._workdir, self._stage, self._quiet, self._wandb = pathlib.Path(workdir), stage, quiet, wandb
        self._jsonl = self._workdir / "metrics.jsonl"
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._line = ProgressLine(stage, total_steps, "steps", quiet)
        self._writers: list[Writer] | None = None
        self._warned_full = False
        self._purge_step: int | None = None
        self._keep_rows(lambda row: True)  # removes damaged lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        for writer in self._writers or ():
            with self._skip_if_full():
                writer.close()
        self._writers = None

    def resume_from(self, step: int) -> None:
        """Drop rows and grids of this stage after `step`: those of steps that will be repeated."""
        self._keep_rows(lambda row: row["stage"] != self._stage or row["step"] <= step)
        if is_main():
            grids.drop_grids_after(self._workdir / "grids" / self._stage, step)
        self._purge_step = step + 1

    def write_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row of numbers or 0-d arrays; NaN and infinity become null, and are left out elsewhere."""
        if not is_main():
            return
        row = {name: x if math.isfinite(x := float(value)) else None for name, value in values.items()}
        with self._skip_if_full():
            append(self._jsonl, {"stage": self._stage, "step": int(step), "time": round(time.time(), 3), **row})
        self.write_scalars(step, {name: value for name, value in row.items() if value is not None})

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write finite numbers to TensorBoard and Weights & Biases only."""
        self._write(lambda writer: writer.write_scalars(int(step), values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 (height, width, 1 or 3) image to TensorBoard and Weights & Biases."""
        self._write(lambda writer: writer.write_image(int(step), name, image))

    def write_grid(self, step: int, name: str, grid: grids.Grid) -> None:
        """Save a grid for the report, and write it as an image, small cells enlarged."""
        if not is_main():
            return
        with self._skip_if_full():
            grids.save_grid(self._workdir / "grids" / self._stage, int(step), grid)
        scale = max(1, math.ceil(CELL / min(grid.images.shape[2:4])))
        self.write_image(step, name, grid.sheet().repeat(scale, axis=0).repeat(scale, axis=1))

    def show_progress(self, step: int, **shown: float) -> None:
        """Redraw the progress line after `step`, with the last known numbers."""
        self._line.update(step, **shown)

    def _write(self, write: Callable[[Writer], None]) -> None:
        if not is_main():
            return
        with self._skip_if_full():
            if self._writers is None:  # opened late: resume_from comes before
                self._writers = []
                self._writers.append(TensorBoardWriter(self._workdir / "tensorboard" / self._stage, self._purge_step))
                if self._wandb is not None:
                    self._writers.append(WandbWriter(self._workdir, self._stage, self._wandb, quiet=self._quiet))
        for writer in list(self._writers or ()):
            with self._skip_if_full():
                write(writer)
                continue
            assert self._writers is not None
            self._writers.remove(writer)  # a record that was cut short hides all that follows

    @contextlib.contextmanager
    def _skip_if_full(self) -> Iterator[None]:
        """Skip what a full disk has no room for, with one warning."""
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            if not self._warned_full:
                log.warning("the disk of %s is full: rows and images are skipped until there is room", self._workdir)
            self._warned_full = True

    def _keep_rows(self, keep: Callable[[Row], bool]) -> None:
        """Rewrite metrics.jsonl with these rows. Readers see the old file or the new one."""
        if not is_main() or not self._jsonl.exists():
            return
        text = "".join(json.dumps(row) + "\n" for row in read_metrics(self._workdir) if keep(row))
        if text.encode() == self._jsonl.read_bytes():
            return
        temporary = self._jsonl.with_suffix(".jsonl.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._jsonl)


def read_metrics(
    workdir: str | os.PathLike[str], stage: str | None = None, *, problems: list[str] | None = None
) -> list[Row]:
    """Read the rows of workdir/metrics.jsonl, of one stage or all; [] if there is no file. Damaged lines are skipped.

    problems: gets a message for each damaged line, except for a row that was cut short.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line)
            cut_short = False
        except (ValueError, RecursionError):
            row = None
            cut_short = not line.strip("\0 ") or line.startswith("{")
        if _is_row(row):
            rows.append(row)
        elif problems is not None and not cut_short:
            problems.append(f"{path} line {number} is not a row of metrics: delete that line")
    return [row for row in rows if stage is None or row["stage"] == stage]


def _is_row(row: Any) -> TypeGuard[Row]:
    if not isinstance(row, dict) or not {"stage", "step", "time"} <= row.keys():
        return False
    numbers = {name: value for name, value in row.items() if name != "stage" and value is not None}
    return isinstance(row["step"], int) and all(isinstance(x, int | float) for x in numbers.values())
