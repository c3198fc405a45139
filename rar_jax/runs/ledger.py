"""The ledger of a work directory: what its runs did with their time. Goodput is read off it.

    <workdir>/ledger.jsonl     rows {"time", "run", "event", "seconds": {kind: ...}, ...}

Events: start (verb, command, host, pid, processes, last_sign: of the run before), tokenized, stage (the step from which it goes on), saved, save_failed, skipped, rewind (to),
stop (reason). seconds is what passed since the row before, by kind: see KINDS. Process 0 writes, and each row is on disk when it is
written, so that a killed run has all rows but its last.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from rar_jax.runs.disk import append

NAME = "ledger.jsonl"
# What time goes into. The first three are what a run is for; starting is reading, restoring and compiling; ending is
# waiting for the last save.
PRODUCTIVE = ("training", "evaluating", "tokenizing")
KINDS = (*PRODUCTIVE, "starting", "saving", "ending")

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
        with contextlib.suppress(OSError):
            append(self._path, row)


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


def goodput(rows: Sequence[Row], *, signs: Sequence[float] = (), now: float | None = None) -> dict[str, float]:
    """Where the time went, in seconds by kind: KINDS, "lost" (worked for and not kept: what a kill, an error or a rewind took),
    "stopped" (between two runs) and "wall", their sum.

    Args:
      signs: other times at which a run was alive, those of its metrics: a killed run lived until the last of them.
      now: the present, if the last run still runs; what it does is training.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    spent: dict[str, float] = dict.fromkeys((*KINDS, "lost", "stopped"), 0.0)
    signs = [*signs, *(row["last_sign"] for row in rows if "last_sign" in row)]
    begins = [run[0]["time"] for run in runs.values()]
    ended: float | None = None
    for run, begin, following in zip(runs.values(), begins, [*begins[1:], math.inf], strict=False):
        told = max(row["time"] for row in run)
        end = max([told, *(sign for sign in signs if begin <= sign < following)])
        if now is not None and following == math.inf:
            spent["training"] += max(now - end, 0.0)
            end = max(now, end)
        else:
            spent["lost"] += end - told
        spent["stopped"] += max(begin - ended, 0.0) if ended is not None else 0.0
        ended = end
    worked: list[tuple[str, int, str, float]] = []  # stage, step, kind, seconds: what a way back can still take
    for row in (row for run in runs.values() for row in run):
        stage, step = row.get("stage", ""), row.get("step", 0)
        for kind, seconds in row.get("seconds", {}).items():
            spent[kind if kind in spent else "lost"] += seconds
            if kind in PRODUCTIVE and row["event"] != "stage":
                worked.append((stage, step, kind, seconds))
        if row["event"] in ("stage", "rollback"):
            gone = [w for w in worked if w[0] == stage and w[1] > row.get("to", step)]
            worked = [w for w in worked if w not in gone]
            for _, _, kind, seconds in gone:
                spent[kind] -= seconds
                spent["lost"] += seconds
    return {**spent, "wall": sum(spent.values())}
