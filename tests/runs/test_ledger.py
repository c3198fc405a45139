"""The ledger: rows that survive, and goodput from a history written by hand."""

import json
import pathlib
from typing import Any

import pytest

from rar_jax.runs import ledger
from rar_jax.runs.ledger import Ledger, goodput


def test_rows_and_laps(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    book = Ledger(tmp_path)
    for kind, seconds in (("starting", 3.0), ("training", 5.0), ("evaluating", 2.0), ("training", 1.5)):
        now[0] += seconds
        book.lap(kind)
    book.row("saved", stage="generator", step=8)
    book.row("stop", reason="done")
    rows = ledger.read_ledger(tmp_path)
    assert [row["event"] for row in rows] == ["saved", "stop"] and rows[0]["step"] == 8
    assert rows[0]["seconds"] == {"starting": 3.0, "training": 6.5, "evaluating": 2.0} and rows[1]["seconds"] == {}
    assert rows[0]["run"] == rows[1]["run"] != Ledger(tmp_path)._run
    with (tmp_path / ledger.NAME).open("a") as file:
        file.write('[1]\n{"time": 1}\n{"half')
    assert ledger.read_ledger(tmp_path) == rows and ledger.read_ledger(tmp_path / "none") == []
    Ledger(tmp_path).row("start")  # of the run after the crash, on a line of its own
    assert [row["event"] for row in ledger.read_ledger(tmp_path)] == ["saved", "stop", "start"]
    Ledger().row("start")  # nowhere


def row(time: float, run: str, event: str, told: dict[str, Any] | None = None, **seconds: float) -> dict[str, Any]:
    return {"time": time, "run": run, "event": event, **(told or {}), "seconds": seconds}


def at(step: int, **more: Any) -> dict[str, Any]:
    return {"stage": "generator", "step": step, **more}


HISTORY = [
    row(1000, "a", "start"),
    row(1010, "a", "stage", at(0), starting=10),
    row(1110, "a", "saved", at(8), training=80, evaluating=15, saving=5),
    row(1150, "a", "saved", at(16), training=38, saving=2),  # killed before it was whole
    row(1200, "b", "start", {"last_sign": 1160}),  # 10 s after the save a run still told of a step
    row(1220, "b", "stage", at(8), starting=20),
    row(1280, "b", "rollback", at(14, to=8), training=60),
    row(1340, "b", "saved", at(20), training=55, saving=5),
    row(1350, "b", "stop", {"reason": "done"}, ending=10),
]


def test_goodput_of_a_history() -> None:
    """A run that was killed within a save, 40 s of nothing, a run that went back once."""
    expected = {"training": 135, "evaluating": 15, "tokenizing": 0, "starting": 30, "saving": 12, "ending": 10}
    assert goodput(json.loads(json.dumps(HISTORY))) == expected | {"lost": 38 + 10 + 60, "stopped": 40, "wall": 350}
    running = goodput(HISTORY[:-1], now=1370)
    assert (running["training"], running["wall"]) == (165, 370)
    dead = goodput(HISTORY[:-1], signs=[1010, 1365])
    assert (dead["lost"], dead["wall"]) == (108 + 25, 365)
    assert goodput([])["wall"] == 0


def test_what_is_gone_on_from_is_kept() -> None:
    """Work of another stage, and tokens, are not lost with a stage that goes back to its first step."""
    rows = [
        row(0, "a", "start"),
        row(10, "a", "saved", {"stage": "tokenizer", "step": 12}, training=10),
        row(30, "a", "stage", at(4), tokenizing=20),
        row(40, "a", "saved", at(8), training=10),
        row(40, "b", "start"),
        row(50, "b", "stage", at(0), starting=10),
    ]
    spent = goodput(rows)
    assert (spent["training"], spent["tokenizing"], spent["lost"], spent["wall"]) == (10, 20, 10, 50)
