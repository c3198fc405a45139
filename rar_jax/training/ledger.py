"""The ledger of a work directory: what its runs did with their time. Goodput is read off it.

    <workdir>/ledger.jsonl     rows {"time", "run", "event", "seconds": {kind: ...}, ...}

Events: start (verb, host, pid, processes), stage, saved, save_failed, skipped, rewind, gave_up, preempted, stop (reason). seconds is
what passed since the row before, by kind: see KINDS. Process 0 writes, and each row is on disk when it is written, so that a
killed run has all rows but its last.
"""

from __future__ import annotations

import json
import pathlib
import secrets
import time
from collections.abc import Iterable
from typing import Any

NAME = "ledger.jsonl"
# What time goes into. The first three are what a run is for; starting is reading, restoring and compiling.
PRODUCTIVE = ("training", "evaluating", "tokenizing")
KINDS = (*PRODUCTIVE, "starting", "saving")

Row = dict[str, Any]


class Ledger:
    """Writes the rows of one run; without a folder it writes none."""

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self._path = folder and folder / NAME
        self._run = secrets.token_hex(4)
        self._lap = time.monotonic()
        self._seconds: dict[str, float] = {}

    def lap(self, kind: str) -> None:
        """The time since the last lap went into `kind`."""
        now = time.monotonic()
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._lap
        self._lap = now

    def row(self, event: str, **told: Any) -> None:
        """Writes a row with the time of the laps since the last one. A disk that is full costs the row, not the run."""
        seconds = {kind: round(s, 3) for kind, s in self._seconds.items()}
        self._seconds = {}
        if self._path is None:
            return
        row = {"time": round(time.time(), 3), "run": self._run, "event": event, **told, "seconds": seconds}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            pass


def read(folder: pathlib.Path) -> list[Row]:
    """The rows of a work directory, in the order written; lines that a crash cut are left out."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"time", "run", "event"} <= row.keys():
            rows.append(row)
    return rows


def goodput(rows: Iterable[Row], *, now: float, running: bool) -> dict[str, float]:
    """Where the time went, in seconds by kind: KINDS, "lost" (worked for and not kept: what a kill or a rewind took), "stopped"
    (between two runs) and "wall", their sum.

    Args:
      now: the end of the last run if it is `running`, or died without a row: seconds since 1970 of its last sign of life.
    """
    spent = dict.fromkeys((*KINDS, "lost", "stopped"), 0.0)
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    ends: list[float] = []
    for i, run in enumerate(runs.values()):
        begin, end = run[0]["time"], run[-1]["time"]
        last = i == len(runs) - 1
        if ends:
            spent["stopped"] += max(begin - ends[-1], 0.0)
        for row in run:
            for kind, seconds in row.get("seconds", {}).items():
                # Steps up to a rewind were worked for and thrown away.
                lost = row["event"] == "rewind" and kind in PRODUCTIVE
                spent["lost" if lost or kind not in spent else kind] += seconds
        if last and now > end:
            spent["training" if running else "lost"] += now - end
            end = now
        ends.append(end)
    return {**spent, "wall": sum(spent.values())}
