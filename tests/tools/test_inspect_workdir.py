"""`rar-jax inspect WORKDIR`: a stopped run, a killed one, a damaged one, one that runs and one that gave up."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from commands import environment

from rar_jax.cli import main
from rar_jax.config import load_experiment
from rar_jax.experiment import resolve
from rar_jax.runs.checkpoint import mark_best
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.lock import Lock
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.manifest import write_manifest
from rar_jax.runs.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A tokenizer at step 12 of 12 with two checkpoints, by hand."""
    path = tmp_path / "run"
    Workdir(path).claim(resolve(load_experiment(str(ROOT / "experiments" / "tiny.py")), "tiny").resolved())
    for step in (6, 12):
        folder = path / "checkpoints" / "tokenizer" / str(step)
        (folder / "meta").mkdir(parents=True)
        (folder / "meta" / "metadata").write_text('{"stage": "tokenizer"}')
        write_manifest(folder)
    mark_best(path / "checkpoints" / "tokenizer", 6, "validation/loss", 1.0)
    with RunLogger(path, "tokenizer", total_steps=12, quiet=True) as reporter:
        reporter.write_metrics(6, {"validation/loss": 0.75})
        reporter.write_metrics(12, {"loss": 0.5, "grad_norm": 2.0, "skipped": 1})
    book = Ledger(path)
    book.row("start", verb="run", command="rar-jax run --config tiny --workdir here --config.seed=3")
    book._seconds = {"training": 30.0, "saving": 10.0}
    book.row("saved", stage="tokenizer", step=12)
    book.row("stop", reason="preempted")
    return path


def said(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str], code: int) -> tuple[str, dict[str, Any]]:
    assert main(["inspect", str(workdir), "--quiet"]) == code
    text = capsys.readouterr().out
    assert main(["inspect", str(workdir), "--quiet", "--json"]) == code
    return text, json.loads(capsys.readouterr().out)


def test_no_accelerator_is_asked_for(workdir: pathlib.Path) -> None:
    """It may be another program's, the training's that one asks after."""
    done = subprocess.run(
        [sys.executable, "-m", "rar_jax", "inspect", str(workdir)],
        env={**environment(), "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_summary(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, summary = said(workdir, capsys, 0)
    assert summary["goodput"] == pytest.approx(0.75, abs=0.01)
    assert "goodput: 75.0%\n" in text and "seconds: training 30, saving 10, wall 40\n" in text
    tokenizer = summary["stages"]["tokenizer"]
    assert (tokenizer["steps"], tokenizer["last"]) == (12, {"step": 12, "loss": 0.5, "grad_norm": 2.0, "skipped": 1})
    assert "last: step 12, loss 0.5, grad_norm 2, skipped 1\n" in text
    assert "last validation: step 6, validation/loss 0.75\n" in text
    assert summary["stages"]["classifier"]["last"] == {}
    states = {row["step"]: (row["state"], row["best_by"]) for row in tokenizer["checkpoints"]}
    assert states == {12: ("verified", []), 6: ("verified", ["validation/loss"])}
    assert text.count(" verified ") == 2 and "best_by" in text
    assert (summary["events"]["starts"], summary["events"]["preempted"], summary["last_stop"]) == (1, 1, "preempted")
    # The command as it was typed.
    assert "next: rar-jax run --config tiny --workdir here --config.seed=3    (continues from tokenizer step" in text
    assert not list(workdir.glob(".l*")), "inspecting leaves nothing"


def test_killed_run(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Ledger(workdir)
    book.row("start", verb="run")
    book.row("save_failed", stage="generator", step=8)
    text, summary = said(workdir, capsys, 0)
    assert "last stop: killed (no exit record)\n" in text
    counts = {"starts": 2, "skipped_updates": 0, "rollbacks": 0, "failed_saves": 1, "preempted": 1, "killed": 1}
    assert summary["events"] == counts
    assert f"next: rar-jax run --config tiny --workdir {workdir}, with the same" in text


def test_damaged_checkpoints(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = workdir / "checkpoints" / "tokenizer"
    (steps / "12" / "meta" / "metadata").write_text("{}")
    text, summary = said(workdir, capsys, 1)
    assert "tokenizer step 12" in text and f"{steps / '12' / 'meta' / 'metadata'} is damaged" in text
    (found,) = (row for row in summary["stages"]["tokenizer"]["checkpoints"] if row["step"] == 12)
    assert found["state"] == "bad" and summary["num_problems"] == 1
    assert summary["next"].endswith("(continues from tokenizer step 6)")
    (steps / "6" / "meta" / "metadata").write_text("{}")
    assert "no checkpoint is good: restore the files" in said(workdir, capsys, 1)[1]["next"]


def test_damaged_metrics(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "metrics.jsonl").write_text("[1]\n{}\n")
    _, summary = said(workdir, capsys, 1)
    assert "metrics.jsonl line 1" in summary["problems"][0]["reason"]


def test_next_command(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def suggest(reason: str) -> str:
        Ledger(workdir).row("stop", reason=reason)
        return said(workdir, capsys, 0)[1]["next"]

    assert suggest("done").startswith(f"rar-jax run --config tiny --workdir {workdir}, with")  # of a stage
    held = Lock(workdir, "train")
    text, summary = said(workdir, capsys, 0)
    held.release()
    assert summary["running"]["verb"] == "train" and "next: nothing to do: it is running" in text
    assert "training gave up" in suggest("TrainingError: generator: 10 updates in a row were bad (...)")
    assert "free space on the disk; then rar-jax" in suggest(
        "CheckpointError: step 9 could not be saved: the disk is full, 3 times"
    )
    (workdir / "result.json").write_text("{}")
    assert suggest("done").startswith("rar-jax sample --weights")
