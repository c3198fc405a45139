"""Bad batches in the real loop: left out, gone back from, given up on; the same way every time."""

from __future__ import annotations

import errno
import functools
import os
import pathlib
import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import poisoned
import pytest
from commands import Command, finish, start, state_of, terminate, wait_for
from stopped import RECIPE, StopAt, stage, told

from rar_jax.data import loader
from rar_jax.errors import PREEMPTED, Preempted, TrainingError
from rar_jax.runs import checkpoint
from rar_jax.runs import ledger as ledgers
from rar_jax.runs.checkpoint import load_params
from rar_jax.runs.workdir import Workdir
from rar_jax.training import guard, loop
from rar_jax.training.failures import dump_failure


def events(workdir: pathlib.Path, *names: str) -> list[tuple[Any, ...]]:
    rows = [row for row in ledgers.read_ledger(workdir) if row["event"] in names]
    return [(row["event"], row.get("step"), row.get("to")) for row in rows]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function of batch numbers, see poisoned.py."""
    return lambda *numbers: poisoned.poison(numbers, monkeypatch.setattr)


def test_one_bad_batch_is_left_out_and_counted(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(7)
    stage(tmp_path, steps=12, eval_every=6)
    rows = [row for row in told(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows if row["loss"] is None] == [7]
    assert [row["skipped"] for row in rows] == [0.0] * 6 + [1.0] * 6
    assert events(tmp_path, "skipped", "rollback") == [("skipped", 7, None)]
    # Preempted during the evaluation at step 6; it is re-run on resume.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(Preempted):
        stage(stopped, StopAt(stopped, 7), steps=12, eval_every=6)
    assert [row["step"] for row in told(stopped)] == list(range(1, 7))
    stage(stopped, steps=12, eval_every=6)
    assert told(stopped) == told(tmp_path) and state_of(stopped, 12) == state_of(tmp_path, 12)


def test_one_spike_is_left_out_and_counted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned.poison((77,), monkeypatch.setattr, 6400.0)  # of one row of 64
    stage(tmp_path, steps=80)
    rows = {row["step"]: row for row in told(tmp_path) if "loss" in row}
    assert [step for step, row in rows.items() if 50 < row["loss"] / rows[1]["loss"] < 200] == [77]
    assert [rows[step]["skipped"] for step in (76, 77, 78, 80)] == [0, 1, 1, 1]
    assert events(tmp_path, "skipped", "rollback") == [("skipped", 77, None)]


def test_consecutive_bad_updates_roll_back(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(10, 11, 12)
    (tmp_path / "one").mkdir()
    stage(tmp_path / "one")
    # Steps 10, 11 and 12 are bad. Step 9 is run again, on batch 13.
    assert events(tmp_path / "one", "rollback") == [("rollback", 12, 8)]
    assert [step for _, step, _ in events(tmp_path / "one", "skipped")] == [10, 11, 12]
    assert not list((tmp_path / "one/checkpoints/classifier").glob("*.rewound")), "no bad step was saved"
    guard = {
        k: np.frombuffer(v, np.int32)[0]
        for k, v in state_of(tmp_path / "one", 20).items()
        if "guard" in k and len(v) == 4
    }
    assert guard["guard.data_offset"] == 4 and guard["guard.rollbacks"] == 1
    assert guard["guard.skipped"] == 3 and guard["guard.consecutive"] == 0
    # Stopped at step 9, which is saved, but which is not where the others roll back to; in the evaluation of step 10; at 10 and at 12, where
    # nothing is saved; and after the rollback. With as many checkpoints kept as there are stops, and with more.
    for polls, keep in (((11, 2, 12), 9), ((9,), 9), ((10, 1), 2), ((13,), 2), ((14, 4), 2)):
        stopped = tmp_path / "-".join(map(str, polls))
        stopped.mkdir()
        for poll in polls:
            with pytest.raises(Preempted):
                stage(stopped, StopAt(stopped, poll), keep_checkpoints=keep)
            steps = [int(p.name) for p in (stopped / "checkpoints" / "classifier").glob("*") if p.name.isdigit()]
            assert max(steps) == {9: 9, 1: 9, 14: 9, 12: 14, 4: 12}.get(poll, 8), (polls, poll, steps)
        stage(stopped, keep_checkpoints=keep)
        assert events(stopped, "rollback") == [("rollback", 12, 8)], polls
        assert state_of(stopped, 20) == state_of(tmp_path / "one", 20), polls
        assert told(stopped) == told(tmp_path / "one"), polls


@pytest.mark.timeout(120)
def test_a_signal_during_a_rollback(tmp_path: pathlib.Path, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(9, 10, 11)
    (tmp_path / "one").mkdir()
    stage(tmp_path / "one")
    with pytest.raises(Preempted):
        stage(tmp_path, StopAt(tmp_path, 8))
    restore = checkpoint.Checkpointer.restore

    def signalled(self: Any, *args: Any, before: int | None = None, **rest: Any) -> Any:
        if before is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        return restore(self, *args, before=before, **rest)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(checkpoint.Checkpointer, "restore", signalled)
        stage(tmp_path)
    assert events(tmp_path, "rollback") == [("rollback", 12, 8)]
    stage(tmp_path)
    assert state_of(tmp_path, 20) == state_of(tmp_path / "one", 20) and told(tmp_path) == told(tmp_path / "one")


def test_a_rollback_frees_the_old_state_and_its_workers(
    tmp_path: pathlib.Path, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(6, 7, 8)
    closed, freed, real = [], [], loop.Trainer.restore_or_init

    def restore_or_init(self: Any, before: int | None = None) -> Any:
        if before is not None:
            freed.extend(x.is_deleted() for x in jax.tree.leaves(self.state))
        return real(self, before)

    def batches(*args: Any, **rest: Any) -> Any:
        try:
            yield from loader.batches(*args, **rest)
        finally:
            closed.append(rest["start_step"])

    monkeypatch.setattr(loop.Trainer, "restore_or_init", restore_or_init)
    monkeypatch.setattr(loop, "batches", batches)
    stage(tmp_path)
    assert freed and all(freed) and closed == [0, 8]


def test_giving_up_leaves_a_dump(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(*range(6, 40))
    with pytest.raises(TrainingError, match=r"4 consecutive bad updates .* at step 8, after 2 rollback\(s\)"):
        stage(tmp_path)
    assert events(tmp_path, "rollback") == [("rollback", 8, 4), ("rollback", 8, 4)]
    dump = tmp_path / "dump" / "classifier"
    with np.load(dump / "batch.0.npz") as batch:
        assert batch["images"].shape[0] == 64
    ours, kept = state_of(tmp_path, 8, "dump/classifier"), state_of(tmp_path, 4)
    for name, value in kept.items():
        if "guard" not in name and name != "step":
            assert ours[name] == value, name


def test_giving_up_again_leaves_the_dump_again(tmp_path: pathlib.Path) -> None:
    """The same command after it gave up comes to the same step."""
    for value in (1.0, 2.0):
        state = {"step": jnp.int32(8), "guard": guard.init(), "params": {"w": jnp.full(4, value)}}
        assert "dump" in dump_failure(Workdir(tmp_path), "classifier", state, {"images": jnp.zeros((4, 8))})
        kept = load_params(tmp_path / "dump" / "classifier", 8)
        assert kept["w"].tolist() == [value] * 4


def test_no_way_back(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(*range(6, 40))
    recipe = {"eval_every": 20, "keep_checkpoints": 2}
    with pytest.raises(Preempted):
        stage(tmp_path, StopAt(tmp_path, 5), **recipe)
    folder = tmp_path / "checkpoints" / "classifier"
    assert sorted(p.name for p in folder.iterdir()) == ["4", "5"]
    shutil.rmtree(folder / "4")  # 5 is off schedule, and all that is left
    with pytest.raises(TrainingError, match=r"at step 8, after 0 rollback"):
        stage(tmp_path, **recipe)
    assert sorted(p.name for p in folder.iterdir()) == ["5"] and events(tmp_path, "rollback") == []
    assert (tmp_path / "dump" / "classifier" / "batch.0.npz").exists()


def test_an_error_of_a_save_is_raised_while_steps_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: pathlib.Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(checkpoint, "write_manifest", broken)
    with pytest.raises(OSError, match="Input/output error"):
        stage(tmp_path, steps=2000, checkpoint_every=1000, eval_every=2000)
    assert 1000 <= told(tmp_path)[-1]["step"] < 2000 and events(tmp_path, "saved") == []


@pytest.mark.slow
def test_two_processes(tmp_path: pathlib.Path) -> None:
    recipe = {**RECIPE, "steps": 400, "eval_every": 400, "checkpoint_every": 30, "keep_checkpoints": 2}
    flags = ["--stage=classifier", "--quiet", "--config.mesh.fsdp=2"]
    flags += [f"--config.classifier.train.{name}={value}" for name, value in recipe.items()]

    def begin(name: str) -> list[Command]:
        before = functools.partial(poisoned.poison, (70, 71, 72, 110))
        return start("train", tmp_path / name, *flags, processes=2, devices=2, before=before)

    finish(begin("one"))
    assert events(tmp_path / "one", "skipped", "rollback") == [
        *(("skipped", step, None) for step in (70, 71, 72)), ("rollback", 73, 60), ("skipped", 97, None)
    ]  # fmt: skip
    running = begin("stopped")
    wait_for(lambda: (tmp_path / "stopped").exists() and len(told(tmp_path / "stopped")) > 40, running)
    assert terminate(running, 1) < 10
    finish(running, PREEMPTED)
    finish(begin("stopped"))
    assert state_of(tmp_path / "stopped", 400) == state_of(tmp_path / "one", 400)
    assert told(tmp_path / "stopped") == told(tmp_path / "one")
