"""Stopped at a step that is to be evaluated, the last one too: it is saved, and evaluated by the next start."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from commands import state_of
from stopped import StopAt, stage, tiny, told

from rar_jax.errors import Preempted
from rar_jax.runs.checkpoint import Checkpointer, best_steps, good_step
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.workdir import Workdir
from rar_jax.training import loop as train
from rar_jax.weights.stages import finished


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("straight")
    stage(workdir, eval_every=8, checkpoint_every=8, keep_best=True)
    return workdir


def newest(folder: pathlib.Path) -> int:
    good = good_step(folder)
    return good[0] if good else 0


def stopped(workdir: pathlib.Path, *polls: int) -> None:
    for poll in polls:
        with pytest.raises(Preempted):
            stage(workdir, StopAt(workdir, poll), eval_every=8, checkpoint_every=8, keep_best=True)


@pytest.mark.parametrize("into", [0, 1])
def test_the_last_step(tmp_path: pathlib.Path, straight: pathlib.Path, into: int) -> None:
    folder = tmp_path / "checkpoints" / "classifier"
    stopped(tmp_path, 19)
    # A training asks after each step, and in an evaluation before each batch.
    stopped(tmp_path, 20 - newest(folder) + into)
    assert newest(folder) == 20 and finished(tiny(), "classifier", Workdir(tmp_path)) is None
    assert told(tmp_path) == [row for row in told(straight) if row["step"] < 20 or "validation/loss" not in row]
    stopped(tmp_path, 1)  # in the evaluation again
    assert finished(tiny(), "classifier", Workdir(tmp_path)) is None
    stage(tmp_path, eval_every=8, checkpoint_every=8, keep_best=True)
    assert finished(tiny(), "classifier", Workdir(tmp_path)) is not None
    assert told(tmp_path) == told(straight) and state_of(tmp_path, 20) == state_of(straight, 20)
    assert best_steps(folder) == best_steps(straight / "checkpoints" / "classifier")


def test_an_evaluation_without_a_row_is_run_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk loses the row of the last evaluation. The stage is finished once the row is written."""
    stopped(tmp_path, 19)
    stopped(tmp_path, 20 - newest(tmp_path / "checkpoints" / "classifier"))
    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "write_metrics", lambda *_: None)
        stage(tmp_path, eval_every=8, checkpoint_every=8, keep_best=True)
        assert finished(tiny(), "classifier", Workdir(tmp_path)) is None
    stage(tmp_path, eval_every=8, checkpoint_every=8, keep_best=True)
    assert finished(tiny(), "classifier", Workdir(tmp_path)) is not None


def test_there_is_no_time_for_retention(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, retained = Checkpointer.save, {}

    def seen(self: Checkpointer, step: int, *args: Any, retain: bool = True) -> None:
        retained[step] = retain
        save(self, step, *args, retain=retain)

    monkeypatch.setattr(Checkpointer, "save", seen)
    stopped(tmp_path, 11)
    assert retained == {8: True, 10: False}


def test_the_best_step(tmp_path: pathlib.Path, straight: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / "classifier"
    stopped(tmp_path, 9)
    assert newest(folder) == 8 and best_steps(folder) == {}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # when it has told of the evaluation
        patch.setattr(train, "mark_if_best", killed)
        stage(tmp_path, eval_every=8, checkpoint_every=8, keep_best=True)
    assert best_steps(folder) == {}
    stopped(tmp_path, 4)
    (first,) = (row["validation/loss"] for row in told(straight) if row["step"] == 8 and "validation/loss" in row)
    assert best_steps(folder) == {"validation/loss": {"step": 8, "value": first}}
