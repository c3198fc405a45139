"""Bad batches in the real loop: left out, gone back from, given up on; the same way every time."""

from __future__ import annotations

import errno
import functools
import os
import pathlib
import shutil
import signal
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import poisoned
import pytest
from commands import Command, finish, start, state_of, terminate, wait_for
from stopped import RECIPE, StopAt, stage, told

from rar_jax.config import load_experiment
from rar_jax.errors import PREEMPTED, Preempted, TrainingError
from rar_jax.experiment import resolve
from rar_jax.runs import checkpoint
from rar_jax.runs import ledger as ledgers
from rar_jax.runs.checkpoint import good_step, load_params, read_meta
from rar_jax.runs.preemption import Watch
from rar_jax.runs.session import Session
from rar_jax.runs.workdir import Workdir
from rar_jax.training import guard
from rar_jax.training.loop import give_up

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"


def events(workdir: pathlib.Path, *names: str) -> list[tuple[Any, ...]]:
    rows = [row for row in ledgers.read(workdir) if row["event"] in names]
    return [(row["event"], row.get("step"), row.get("to")) for row in rows]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function of batch numbers, see poisoned.py."""
    return lambda *numbers: poisoned.poison(numbers, monkeypatch.setattr)


@pytest.mark.promise(8, "a NaN batch in the real loop: one update left out and counted, the step after is normal")
def test_one_bad_batch_is_left_out_and_counted(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(7)
    stage(tmp_path, steps=12, eval_every=6)
    rows = [row for row in told(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows if row["loss"] is None] == [7]
    assert [row["skipped"] for row in rows] == [0.0] * 6 + [1.0] * 6
    assert events(tmp_path, "skipped", "rollback") == [("skipped", 7, None)]
    # Stopped within the evaluation of step 6, which is made up for.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(Preempted):
        stage(stopped, StopAt(stopped, 7), steps=12, eval_every=6)
    assert [row["step"] for row in told(stopped)] == list(range(1, 7))
    stage(stopped, steps=12, eval_every=6)
    assert told(stopped) == told(tmp_path) and state_of(stopped, 12) == state_of(tmp_path, 12)


@pytest.mark.promise(8, "a spike in the real loop, of a hundred times the loss: the same")
def test_one_spike_is_left_out_and_counted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned.poison((77,), monkeypatch.setattr, 6400.0)  # of one row of 64
    stage(tmp_path, steps=80)
    rows = {row["step"]: row for row in told(tmp_path) if "loss" in row}
    assert [step for step, row in rows.items() if 50 < row["loss"] / rows[1]["loss"] < 200] == [77]
    assert [rows[step]["skipped"] for step in (76, 77, 78, 80)] == [0, 1, 1, 1]
    assert events(tmp_path, "skipped", "rollback") == [("skipped", 77, None)]


@pytest.mark.promise(
    8,
    "3 in a row: back to the last good step, past the data window; the same, stopped on the way (before, within and after the bad "
    "steps), ends bitwise the same",
)
def test_many_in_a_row_go_back_and_pass_the_window(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(10, 11, 12, 13)
    (tmp_path / "one").mkdir()
    stage(tmp_path / "one")
    # Steps 10, 11 and 12 are bad, which is known while 13 runs; back to 8, and step 9 trains on batch 14.
    assert events(tmp_path / "one", "rollback") == [("rollback", 13, 8)]
    assert [step for _, step, _ in events(tmp_path / "one", "skipped")] == [10, 11, 12], (
        "13 went with what was gone back from"
    )
    assert not list((tmp_path / "one/checkpoints/classifier").glob("*.rewound")), (
        "nothing is saved on a way that leads back"
    )
    offset = {
        k: np.frombuffer(v, np.int32)[0]
        for k, v in state_of(tmp_path / "one", 20).items()
        if "guard" in k and len(v) == 4
    }
    assert offset["['guard']['data_offset']"] == 5 and offset["['guard']['rewinds']"] == 1
    assert offset["['guard']['skipped']"] == 4 and offset["['guard']['in_a_row']"] == 0
    # Stopped within the bad steps, in an evaluation, and after it went back; between the good step that it goes back to and the bad
    # ones; twice among the bad ones, with no more checkpoints kept than stops; and at 12, which is saved then, and not otherwise, and
    # once more at 12 when it had gone back from there.
    for polls, keep in (((11, 2, 12), 9), ((9,), 9), ((10, 1), 2), ((13,), 2), ((13, 5), 9)):
        stopped = tmp_path / "-".join(map(str, polls))
        stopped.mkdir()
        for poll in polls:
            with pytest.raises(Preempted):
                stage(stopped, StopAt(stopped, poll), keep_checkpoints=keep)
            if poll == 13:
                meta = read_meta(stopped / "checkpoints" / "classifier", 12)
                assert meta["step"] == 12 and meta[checkpoint.IRREGULAR], "no training goes back to it"
        if polls == (13, 5):
            good = good_step(stopped / "checkpoints" / "classifier")
            assert good is not None and good[0] == 12 and len(events(stopped, "rollback")) == 1
        stage(stopped, keep_checkpoints=keep)
        assert events(stopped, "rollback") == [("rollback", 13, 8)], polls
        assert state_of(stopped, 20) == state_of(tmp_path / "one", 20) and told(stopped) == told(tmp_path / "one"), (
            polls
        )


@pytest.mark.promise(
    7, "SIGTERM while a training goes back to the step that it was started from: saved, and the same end"
)
@pytest.mark.timeout(120)
def test_a_signal_while_it_goes_back(tmp_path: pathlib.Path, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(9, 10, 11)
    (tmp_path / "one").mkdir()
    stage(tmp_path / "one")
    with pytest.raises(Preempted):
        stage(tmp_path, StopAt(tmp_path, 8))
    watch, restore = Watch(), checkpoint.Checkpointer.restore

    def signalled(self: Any, *args: Any, before: int | None = None, **rest: Any) -> Any:
        out = restore(self, *args, before=before, **rest)
        if before is not None:
            os.kill(os.getpid(), signal.SIGTERM)
            while not watch.noticed:
                time.sleep(0.01)
        return out

    with watch.listening(), monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(checkpoint.Checkpointer, "restore", signalled)
        stage(tmp_path, Session(ledgers.Ledger(tmp_path), watch))
    assert events(tmp_path, "rollback") == [("rollback", 12, 8)]
    stage(tmp_path)
    assert state_of(tmp_path, 20) == state_of(tmp_path / "one", 20) and told(tmp_path) == told(tmp_path / "one")


@pytest.mark.promise(8, "a fault that stays: gone back from twice, then stopped with a dump of state and batch")
def test_giving_up_leaves_a_dump(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(*range(6, 40))
    with pytest.raises(TrainingError, match=r"3 updates in a row were bad .* by step 8, after going back 2 time"):
        stage(tmp_path)
    assert events(tmp_path, "rollback") == [("rollback", 9, 4), ("rollback", 8, 4)]
    dump = tmp_path / "dump" / "classifier"
    with np.load(dump / "batch.0.npz") as batch:
        assert batch["images"].shape[0] == 64
    ours, kept = state_of(tmp_path, 8, "dump/classifier"), state_of(tmp_path, 4)
    for name, value in kept.items():
        if "guard" not in name and name != "['step']":
            assert ours[name] == value, name


def test_giving_up_again_leaves_the_dump_again(tmp_path: pathlib.Path) -> None:
    """The same command after it gave up comes to the same step."""
    recipe = resolve(load_experiment(str(TINY)), "tiny").recipe("classifier")
    assert recipe is not None
    for value in (1.0, 2.0):
        state = {"step": jnp.int32(8), "guard": guard.init(), "params": {"w": jnp.full(4, value)}}
        assert "dump" in give_up(Workdir(tmp_path), "classifier", recipe, state, {"images": jnp.zeros((4, 8))})
        kept = load_params(tmp_path / "dump" / "classifier", 8)
        assert kept["w"].tolist() == [value] * 4


@pytest.mark.promise(8, "no good step before the bad ones: stopped with a dump, not begun again at step 0")
def test_no_way_back(tmp_path: pathlib.Path, poison: Any) -> None:
    poison(*range(6, 40))
    recipe = {"eval_every": 20, "keep_checkpoints": 2}
    with pytest.raises(Preempted):
        stage(tmp_path, StopAt(tmp_path, 7), **recipe)
    folder = tmp_path / "checkpoints" / "classifier"
    assert sorted(p.name for p in folder.iterdir()) == ["4", "7"]
    shutil.rmtree(folder / "4")  # 7 is of the bad steps, and all that is left
    with pytest.raises(TrainingError, match=r"by step 9, after going back 0 time"):
        stage(tmp_path, **recipe)
    assert sorted(p.name for p in folder.iterdir()) == ["7"] and events(tmp_path, "rollback") == []
    assert (tmp_path / "dump" / "classifier" / "batch.0.npz").exists()


@pytest.mark.promise(
    5, "what goes wrong in a save in the background ends the training at the next step, not at the next save"
)
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
@pytest.mark.promise(
    8,
    "the same on 2 real processes of 2 devices: left out by both, gone back from; stopped by SIGTERM on the way, bitwise the same",
)
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
