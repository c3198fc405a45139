"""The ledger of a work directory: events and where the time of its runs went. Goodput is computed from it.

    <workdir>/ledger.jsonl     rows {"time", "run", "event", "seconds": {kind: ...}, ...}

Events: start (verb, command, host, pid, processes, last_sign of the previous run), tokenized, stage (the step it
resumes from), saved, save_failed, skipped, rollback (to), stop (reason). "seconds" is the time since the previous row,
by kind (KINDS). Process 0 writes each row at once: a killed run lacks only its last.
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
# starting is reading, restoring and compiling; ending is waiting for the last save.
PRODUCTIVE = ("training", "evaluating", "tokenizing")
KINDS = (*PRODUCTIVE, "starting", "saving", "ending")

Row = dict[str, Any]


class Ledger:
    """Writes the rows of one run; none without a folder."""

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        self._path = folder and folder / NAME
        self._run = secrets.token_hex(4)
        self._lap = time.monotonic()
        self._seconds: dict[str, float] = {}

    def lap(self, kind: str) -> None:
        """Attribute the time since the last lap to a kind."""
        now = time.monotonic()
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._lap
        self._lap = now

    def row(self, event: str, **facts: Any) -> None:
        """Write a row with the laps since the previous one. A full disk loses the row."""
        seconds = {kind: round(s, 3) for kind, s in self._seconds.items()}
        self._seconds = {}
        if self._path is None:
            return
        row = {"time": round(time.time(), 3), "run": self._run, "event": event, **facts, "seconds": seconds}
        with contextlib.suppress(OSError):
            append(self._path, row)


def read_ledger(folder: pathlib.Path) -> list[Row]:
    """Read the rows of a work directory in the order written, without lines that a crash truncated."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"time", "run", "event"} <= row.keys()]


def goodput(rows: Sequence[Row], *, signs: Sequence[float] = (), now: float | None = None) -> dict[str, float]:
    """Compute where the time went, in seconds by kind.

    The kinds are KINDS, "lost" (work that a kill, an error or a rollback undid), "stopped" (between runs) and "wall",
    their sum.

    Args:
      signs: other times at which a run was alive, those of its metrics. now: the present, if the last run still runs.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    spent: dict[str, float] = dict.fromkeys((*KINDS, "lost", "stopped"), 0.0)
    signs = [*signs, *(row["last_sign"] for row in rows if "last_sign" in row)]
    begins = [run[0]["time"] for run in runs.values()]
    ended: float | None = None
    for run, begin, following in zip(runs.values(), begins, [*begins[1:], math.inf], strict=False):
        last = max(row["time"] for row in run)
        end = max([last, *(sign for sign in signs if begin <= sign < following)])
        if now is not None and following == math.inf:
            spent["training"] += max(now - end, 0.0)
            end = max(now, end)
        else:
            spent["lost"] += end - last
        spent["stopped"] += max(begin - ended, 0.0) if ended is not None else 0.0
        ended = end
    worked: list[tuple[str, int, str, float]] = []  # stage, step, kind, seconds that a rollback may still undo
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
