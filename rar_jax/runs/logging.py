"""What a run tells: metrics.jsonl, grids of images and TensorBoard (writers.py) for later, one progress line for now.

Process 0 of a run tells; a Reporter of another process does nothing. Rows of metrics.jsonl are {"stage", "step", "time", ...}: time
is seconds since 1970, every other value a finite number or null.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import rich.console
import rich.progress
import rich.table

from rar_jax.parallel.processes import is_main
from rar_jax.runs import grids
from rar_jax.runs.disk import append, is_full
from rar_jax.runs.writers import TensorBoard, WandB, Writer

T = TypeVar("T")
Row = dict[str, Any]

PLAIN_SECONDS = 10.0  # between lines when the output is a file
CELL = 48  # pixels that an image has at least in TensorBoard and Weights & Biases
RATE_WINDOW = 30  # calls over which the rate is taken, so that it follows a change of speed
log: logging.Logger = logging.getLogger(__name__)
_in_files = False  # see progress_in_files


class Reporter:
    """Records one stage ("tokenizer", "classifier", "generator") of a run in `workdir`; a context manager.

    Args:
      workdir: folder of the run, made if absent.
      stage: name in the rows and folder under tensorboard/.
      total_steps: where the progress line ends.
      quiet: print nothing; files are written all the same.
      wandb: project of Weights & Biases that is told the same as TensorBoard; None is none.
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
        self.stage = stage
        self._tells = is_main()
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._jsonl = self._workdir / "metrics.jsonl"
        self._line = _Line(stage, total_steps, "steps", quiet)
        self._quiet, self._wandb = quiet, wandb
        self._open: list[Writer] | None = None
        self._said_full = False
        self._purge_step: int | None = None
        # A killed process may have left half a line, which the next row would be glued to.
        self._rewrite(lambda row: True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()
        for writer in self._open or ():
            with self._room_or_without():
                writer.close()
        self._open = None

    def resume_from(self, step: int) -> None:
        """Forgets rows and grids of this stage after `step`: a crash leaves some ahead of the last checkpoint.

        Call it before the first row. metrics.jsonl is replaced in one move; TensorBoard hides its points.
        """
        self._rewrite(lambda row: row["stage"] != self.stage or row["step"] <= step)
        if self._tells:
            grids.forget_after(self._workdir / "grids" / self.stage, step)
        self._purge_step = step + 1

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row; values are numbers or 0-d arrays, and NaN or infinity becomes null. A full disk costs the row."""
        if not self._tells:
            return
        finite = {name: x if math.isfinite(x := float(value)) else None for name, value in values.items()}
        row = {"stage": self.stage, "step": int(step), "time": round(time.time(), 3), **finite}
        with self._room_or_without():
            append(self._jsonl, row)
        known = {name: value for name, value in finite.items() if value is not None}
        self.scalars(step, known)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows finite numbers in TensorBoard and Weights & Biases alone: what result.json keeps."""
        if self._tells:
            self._tell_writers(lambda writer: writer.scalars(values, int(step)))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Shows a uint8 (height, width, 1 or 3) image in TensorBoard and Weights & Biases."""
        if self._tells:
            self._tell_writers(lambda writer: writer.image(name, image, int(step)))

    def grid(self, name: str, grid: grids.Grid, step: int) -> None:
        """Keeps a grid for the report (grids.py) and shows it as `image` does, small cells enlarged."""
        if not self._tells:
            return
        with self._room_or_without():
            grids.save(self._workdir / "grids" / self.stage, int(step), grid)
        scale = max(1, math.ceil(CELL / min(grid.images.shape[2:4])))
        self.image(name, grid.sheet().repeat(scale, axis=0).repeat(scale, axis=1), step)

    def progress(self, step: int, **shown: float) -> None:
        """Redraws the progress line: `step` of the total are done, and these numbers are the last known."""
        self._line.update(step, **shown)

    def _tell_writers(self, tell: Callable[[Writer], None]) -> None:
        """A writer that a full disk stopped within what it wrote is told no more: nobody could read what follows."""
        with self._room_or_without():
            if self._open is None:  # made late, since only here is it known whether the stage resumed
                self._open = []
                self._open.append(TensorBoard(self._workdir / "tensorboard" / self.stage, self._purge_step))
                if self._wandb is not None:
                    self._open.append(WandB(self._workdir, self.stage, self._wandb, quiet=self._quiet))
        for writer in self._open or ():
            with self._room_or_without():
                tell(writer)
                continue
            self._open = [other for other in self._open or () if other is not writer]

    @contextlib.contextmanager
    def _room_or_without(self) -> Iterator[None]:
        """A full disk is said once, and what it has no room for is left out."""
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            if not self._said_full:
                told = "rows and pictures are left out until there is room; the training goes on"
                log.warning("the disk of %s is full: %s", self._workdir, told)
            self._said_full = True

    def _rewrite(self, keep: Callable[[Row], bool]) -> None:
        """Keeps these rows and whole lines only; readers see the old file or the new one."""
        if not self._tells or not self._jsonl.exists():
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


def read_metrics(workdir: str | os.PathLike[str], stage: str | None = None) -> list[Row]:
    """Rows of workdir/metrics.jsonl in the order written, of one stage or of all; [] if there is no file.

    A half-written line, which a crash or a full disk leaves, is left out.
    Raises: ValueError naming the line if any other line is not JSON, or no row.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[Row] = []
    for number, line in enumerate([*lines, rest], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number > len(lines) or line.startswith("{"):  # what follows the last newline may be empty, or anything
                continue
            raise ValueError(f"{path} line {number} is not JSON ({error}): delete that line") from None
        if not isinstance(row, dict) or not {"stage", "step", "time"} <= row.keys():
            raise ValueError(f"{path} line {number} is no row with a stage, a step and a time: delete that line")
        rows.append(row)
    return [row for row in rows if stage is None or row["stage"] == stage]


def progress_in_files(on: bool) -> None:
    """Whether long work prints plain lines where stderr is no terminal: one at the start, every 10 s, and one at the end.

    Of this process; `--progress` of the command line. Without it there are none.
    """
    global _in_files
    _in_files = on


def progress(
    iterable: Iterable[T],
    total: int | None = None,
    description: str = "",
    unit: str = "items",
    quiet: bool = False,
    *,
    sizes: Sequence[int] | None = None,
    done: int = 0,
) -> Iterator[T]:
    """Yields from `iterable` and shows on a terminal how far it is, the rate and the time left; see `progress_in_files`.

    Args:
      total: number of items; by default len(iterable), which it must then have.
      description: what is being done.  unit: what an item is, in the plural.  quiet: print nothing.
      sizes: how many units each item is; by default one.  done: units that were done before.
    """
    line = _Line(description, len(iterable) if total is None else total, unit, quiet)  # pyright: ignore[reportArgumentType]
    try:
        line.update(done)
        for i, item in enumerate(iterable):
            yield item
            done += 1 if sizes is None else sizes[i]
            line.update(done)
    finally:
        line.close()


# ---------------------------------------------------------------- the line


class _Line:
    """One line that moves on a terminal. Elsewhere nothing, or plain lines: see `progress_in_files`."""

    def __init__(self, description: str, total: int, unit: str, quiet: bool) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._quiet = quiet or not is_main()
        # (time, done) of the last calls. The first call is the zero point, so what comes before it (the
        # compilation, where the loop reports after its first step) does not spoil the rate.
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=RATE_WINDOW)
        self._printed_at = -math.inf
        self._unprinted = ""
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def update(self, done: int, **shown: float) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        self._times.append((now, done))
        text = self._text(done, shown)
        if self._bar is None and (console := rich.console.Console(stderr=True)).is_terminal:
            self._start_bar(console)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            return
        if not _in_files:
            return
        self._unprinted = f"{self._description}  {text}".lstrip()
        if now - self._printed_at >= PLAIN_SECONDS or done >= self._total:
            self._print(now)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._unprinted:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        print(self._unprinted, file=sys.stderr, flush=True)
        self._printed_at, self._unprinted = now, ""

    def _start_bar(self, console: rich.console.Console) -> None:
        # On a narrow terminal the bar goes first, then the last of the numbers, and never what is being done.
        whole = rich.table.Column(no_wrap=True, min_width=min(len(self._description), console.width // 2))
        columns = (
            rich.progress.TextColumn("{task.description}", table_column=whole),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[text]}"),
        )
        self._bar = rich.progress.Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._bar.add_task(self._description, total=self._total, text="")
        self._bar.start()

    def _text(self, done: int, shown: Mapping[str, float]) -> str:
        parts = [f"{done}/{self._total} {self._unit}"]
        (first_time, first_done), (last_time, last_done) = self._times[0], self._times[-1]
        if last_done > first_done and last_time > first_time:
            rate = (last_done - first_done) / (last_time - first_time)
            parts.append(f"{rate:.3g} {self._unit}/s")
            if done < self._total:
                parts.append(f"{_duration((self._total - done) / rate)} left")
        parts += [f"{name} {float(value):.4g}" for name, value in shown.items()]
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
