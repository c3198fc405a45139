"""The ledger: rows that survive, and goodput from a history written by hand."""

import json
import pathlib

import pytest

from rar_jax.training import ledger
from rar_jax.training.ledger import Ledger, goodput


def test_rows_and_laps(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    book = Ledger(tmp_path)
    for kind, seconds in (("starting", 3.0), ("training", 5.0), ("evaluating", 2.0), ("training", 1.5)):
        now[0] += seconds
        book.lap(kind)
    book.row("saved", stage="generator", step=8)
    book.row("stop", reason="done")
    rows = ledger.read(tmp_path)
    assert [row["event"] for row in rows] == ["saved", "stop"] and rows[0]["step"] == 8
    assert rows[0]["seconds"] == {"starting": 3.0, "training": 6.5, "evaluating": 2.0} and rows[1]["seconds"] == {}
    assert rows[0]["run"] == rows[1]["run"] != Ledger(tmp_path)._run
    with (tmp_path / ledger.NAME).open("a") as file:
        file.write('[1]\n{"time": 1}\n{"half')
    assert ledger.read(tmp_path) == rows and ledger.read(tmp_path / "none") == []
    Ledger().row("start")  # nowhere


def test_goodput_of_a_history() -> None:
    """A run that was killed, 50 s of nothing, a run that went back once."""

    def row(time: float, run: str, event: str, **seconds: float) -> dict[str, object]:
        return {"time": time, "run": run, "event": event, "seconds": seconds}

    rows = [
        row(1000, "a", "start"),
        row(1010, "a", "stage", starting=10),
        row(1110, "a", "saved", training=80, evaluating=15, saving=5),
        row(1160, "b", "start"),
        row(1180, "b", "stage", starting=20),
        row(1240, "b", "rewind", training=60),
        row(1300, "b", "saved", training=55, saving=5),
        row(1310, "b", "stop", training=10),
    ]
    assert goodput(json.loads(json.dumps(rows)), now=0, running=False) == {
        "training": 145, "evaluating": 15, "tokenizing": 0, "starting": 30, "saving": 10, "lost": 60, "stopped": 50, "wall": 310,
    }  # fmt: skip
    running = goodput(rows, now=1330, running=True)
    assert (running["training"], running["wall"]) == (165, 330)
    dead = goodput(rows[:-1], now=1320, running=False)
    assert (dead["lost"], dead["wall"]) == (80, 320)
    assert goodput([], now=0, running=False)["wall"] == 0
