"""Show on stderr how far a long job is: one live line on a terminal, nothing or plain lines elsewhere."""

from __future__ import annotations

import collections
import datetime
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import rich.console
import rich.progress
import rich.table

from rar_jax.parallel.processes import is_main

T = TypeVar("T")

PLAIN_SECONDS = 10.0  # between plain lines
RATE_WINDOW = 30  # updates in the moving average of the rate
log: logging.Logger = logging.getLogger(__name__)


def show_progress_in_files(on: bool) -> None:
    """Print plain lines if stderr is not a terminal: one at the start, every 10 s, and one at the end."""
    log.setLevel(logging.INFO if on else logging.WARNING)


def track_progress(
    iterable: Iterable[T],
    total: int | None = None,
    description: str = "",
    unit: str = "items",
    quiet: bool = False,
    *,
    sizes: Sequence[int] | None = None,
    done: int = 0,
) -> Iterator[T]:
    """Yield from `iterable`, and show the count, the rate and the time left.

    total: number of units, default len(iterable). unit: their name, in the plural. sizes: units of each item, default
    1. done: units that are done before the first item.
    """
    total = len(iterable) if total is None else total  # pyright: ignore[reportArgumentType]
    line = ProgressLine(description, total, unit, quiet)
    try:
        line.update(done)
        for i, item in enumerate(iterable):
            yield item
            done += 1 if sizes is None else sizes[i]
            line.update(done)
    finally:
        line.close()


class ProgressLine:
    """The line. `close` leaves it as it was last."""

    def __init__(self, description: str, total: int, unit: str, quiet: bool) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._quiet = quiet or not is_main()
        # (time, done). The first update is the zero point: a training step before it is mostly compilation.
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=RATE_WINDOW)
        self._printed_at, self._unprinted = -math.inf, ""
        self._bar: rich.progress.Progress | None = None
        console = rich.console.Console(stderr=True)
        if console.is_terminal and not self._quiet:
            # A narrow terminal cuts the bar first, then the numbers, never the description.
            whole = rich.table.Column(no_wrap=True, min_width=min(len(description), console.width // 2))
            columns = (
                rich.progress.TextColumn("{task.description}", table_column=whole),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.fields[text]}"),
            )
            self._bar = rich.progress.Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task(description, total=total, text="")

    def update(self, done: int, **shown: float) -> None:
        """Show that `done` units are done, and some numbers."""
        if self._quiet:
            return
        now = time.monotonic()
        self._times.append((now, done))
        text = self._text(done, shown)
        if self._bar is not None:
            self._bar.start()  # does nothing after the first time
            self._bar.update(self._task, completed=done, text=text)
        elif log.isEnabledFor(logging.INFO):
            self._unprinted = f"{self._description}  {text}".lstrip()
            if now - self._printed_at >= PLAIN_SECONDS or done >= self._total:
                self._print(now)

    def close(self) -> None:
        """Stop drawing; print the last plain line if it was held back."""
        if self._bar is not None and self._times:
            self._bar.stop()
        if self._unprinted:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        print(self._unprinted, file=sys.stderr, flush=True)
        self._printed_at, self._unprinted = now, ""

    def _text(self, done: int, shown: Mapping[str, float]) -> str:
        parts = [f"{done}/{self._total} {self._unit}"]
        (first_time, first_done), (last_time, last_done) = self._times[0], self._times[-1]
        if last_done > first_done and last_time > first_time:
            rate = (last_done - first_done) / (last_time - first_time)
            parts.append(f"{rate:.3g} {self._unit}/s")
            if done < self._total:
                parts.append(f"{datetime.timedelta(seconds=round((self._total - done) / rate))} left")
        return "  ".join([*parts, *(f"{name} {float(value):.4g}" for name, value in shown.items())])
