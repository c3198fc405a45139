"""`rar-jax inspect WORKDIR`: what it says of a run, a damaged one, one that runs and one that gave up."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import pytest
from commands import environment

from rar_jax.cli import main
from rar_jax.config import load_experiment
from rar_jax.experiment import resolve
from rar_jax.runs.checkpoint import mark_best
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.lock import Lease
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A tokenizer at step 12 of 12 with two checkpoints, by hand."""
    path = tmp_path / "run"
    Workdir(path).claim(resolve(load_experiment(str(ROOT / "experiments" / "tiny.py")), "tiny").resolved())
    with tarfile.open(ROOT / "golden" / "checkpoints" / "before_guard.tar.gz") as archive:
        archive.extractall(path / "checkpoints" / "tokenizer", filter="data")
    shutil.copytree(path / "checkpoints/tokenizer/12", path / "checkpoints/tokenizer/6")
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


def test_what_it_says(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, report = said(workdir, capsys, 0)
    assert (
        report["goodput"] == pytest.approx(0.75, abs=0.01)
        and "goodput    75.0% of 40 s: training 75.0%, saving 25.0%" in text
    )
    assert "tokenizer  step 12 of 12: loss 0.5, grad_norm 2, skipped 1" in text
    assert "validation at step 6: loss 0.75" in text and "classifier no steps told" in text
    assert "checkpoint 12: verified, " in text and "best by validation/loss" in text
    assert "runs       1, preempted 1\n" in text and "last stop  preempted\n" in text
    # What was typed, whole.
    assert "next       rar-jax run --config tiny --workdir here --config.seed=3    (goes on from tokenizer 12)" in text
    assert not list(workdir.glob(".lease*")), "looking leaves nothing"


def test_a_killed_run(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no last row; of a disk that was full for a while the row before tells."""
    book = Ledger(workdir)
    book.row("start", verb="run")
    book.row("save_failed", stage="generator", step=8)
    text, report = said(workdir, capsys, 0)
    assert "runs       2, preempted 1, killed 1, saves without room 1\n" in text and "last stop  killed" in text
    assert report["events"]["killed"] == 1 and report["last_stop"] is None
    assert f"next       rar-jax run --config tiny --workdir {workdir}, and what else was given" in text


def test_damage_is_named(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = workdir / "checkpoints" / "tokenizer"
    (steps / "12" / "meta" / "metadata").write_text("{}")
    text, report = said(workdir, capsys, 1)
    assert (
        f"tokenizer step 12: {steps / '12' / 'meta' / 'metadata'} is damaged" in text and "checkpoint 12: bad" in text
    )
    assert report["problems"]["total"] == 1
    (steps / "6" / "manifest.json").unlink()
    assert "no checkpoint is good: bring the files named above back" in said(workdir, capsys, 1)[0]


def test_what_to_do_next(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    Ledger(workdir).row("stop", reason="done")  # of a stage
    assert f"next       rar-jax run --config tiny --workdir {workdir}, and what" in said(workdir, capsys, 0)[0]
    held = Lease(workdir, "train")
    text, report = said(workdir, capsys, 0)
    held.release()
    assert "running    train, process" in text and report["next"] == "it runs: nothing to do"
    Ledger(workdir).row("stop", reason="TrainingError: generator: 10 updates in a row were bad (...)")
    assert "it gave up: look into" in said(workdir, capsys, 0)[0]
    Ledger(workdir).row("stop", reason="CheckpointError: step 9 could not be saved: the disk is full, 3 times")
    assert "make room on the disk" in said(workdir, capsys, 0)[0]
    (workdir / "result.json").write_text("{}")
    Ledger(workdir).row("stop", reason="done")
    assert "it is done: rar-jax sample" in said(workdir, capsys, 0)[0]
