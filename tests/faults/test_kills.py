"""kill -9 at random moments: the same end to the bit, and never behind the last committed step."""

from __future__ import annotations

import functools
import pathlib
import random
import time
from typing import Any

import poisoned
import pytest
from commands import finish, start, state_of, wait_for

from rar_jax.runs.checkpoint import best_steps, good_step
from rar_jax.runs.logging import read_metrics


def told(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir, "classifier")]


def last_step(workdir: pathlib.Path) -> int:
    rows = told(workdir) if workdir.exists() else []
    return rows[-1]["step"] if rows else 0


def committed(workdir: pathlib.Path) -> int:
    good = good_step(workdir / "checkpoints" / "classifier")
    return good[0] if good else 0


KILLS = [25, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_moments(tmp_path: pathlib.Path, kills: int) -> None:
    rng, done, steps = random.Random(kills), 0, 14 * kills
    recipe = {"steps": steps, "checkpoint_every": 5, "eval_every": 10, "log_every": 1}
    flags = ["--stage=classifier", "--quiet", *(f"--config.classifier.train.{k}={v}" for k, v in recipe.items())]
    finish(start("train", tmp_path / "straight", *flags))
    killed, newest = tmp_path / "killed", 0
    for trial in range(kills):
        running = start("train", killed, *flags)
        if trial % 5 == 3:
            time.sleep(rng.uniform(0.2, 4.0))
        else:
            ahead = newest + rng.randrange(12)
            wait_for(lambda ahead=ahead: last_step(killed) > ahead, running)
            time.sleep(rng.uniform(0, 0.15))
        running[0].kill()
        out = running[0].communicate()[0]
        assert running[0].returncode == -9, out[-3000:]
        assert committed(killed) >= newest, "what was committed is there"
        newest, done = committed(killed), done + 1
    finish(start("train", killed, *flags))
    assert state_of(killed, steps) == state_of(tmp_path / "straight", steps)
    assert told(killed) == told(tmp_path / "straight")
    assert not list((killed / "checkpoints" / "classifier").glob("*tmp*"))


TRAINER, SAVES = "rar_jax.training.loop:Trainer", "rar_jax.runs.checkpoint"


def stuck_in(owner: str, name: str, *, after: bool = False) -> Any:
    return functools.partial(poisoned.stuck, owner=owner, name=name, after=after)


# Where it is killed, and the step that is committed then. Each start goes on from the one before.
PHASES = [
    (stuck_in(TRAINER, "resume_from"), 0),  # the first batches
    (poisoned.endless, 0),  # the compilation of the step
    (stuck_in(TRAINER, "log_step_in_flight", after=True), 0),  # a step
    (stuck_in(f"{SAVES}:Checkpointer", "save", after=True), 0),  # a save under way
    (stuck_in(SAVES, "write_manifest"), 0),  # its files are whole
    (stuck_in(SAVES, "write_manifest", after=True), 5),  # it counts
    (stuck_in(TRAINER, "evaluate"), 5),  # an evaluation
    (stuck_in(TRAINER, "evaluate", after=True), 5),  # the same, told
    (stuck_in(SAVES, "write_manifest", after=True), 10),  # the best so far counts, and older ones are still there
]


def test_killed_in_each_phase(tmp_path: pathlib.Path) -> None:
    recipe = {"steps": 20, "checkpoint_every": 5, "eval_every": 10, "log_every": 1, "keep_best": True}
    flags = ["--stage=classifier", "--quiet", *(f"--config.classifier.train.{k}={v}" for k, v in recipe.items())]
    finish(start("train", tmp_path / "straight", *flags))
    killed = tmp_path / "killed"
    for number, (phase, step) in enumerate(PHASES):
        marker = tmp_path / f"phase{number}"
        running = start("train", killed, *flags, before=functools.partial(phase, marker))
        wait_for(marker.exists, running)
        running[0].kill()
        out = running[0].communicate()[0]
        assert running[0].returncode == -9, out[-3000:]
        assert committed(killed) == step, (number, out[-3000:])
    finish(start("train", killed, *flags))
    assert state_of(killed, 20) == state_of(tmp_path / "straight", 20)
    assert told(killed) == told(tmp_path / "straight")
    best = [best_steps(workdir / "checkpoints" / "classifier") for workdir in (killed, tmp_path / "straight")]
    assert best[0] == best[1] != {}


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_is_killed(tmp_path: pathlib.Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAR_JAX_HEARTBEAT_SECONDS", "5")
    recipe = {"steps": 60, "checkpoint_every": 5, "log_every": 1}
    flags = ["--stage=classifier", "--quiet", *(f"--config.classifier.train.{k}={v}" for k, v in recipe.items())]
    finish(start("train", tmp_path / "straight", *flags, processes=2))
    killed = tmp_path / "killed"
    running = start("train", killed, *flags, processes=2)
    wait_for(lambda: last_step(killed) > 12, running)
    running[which].kill()
    out = running[1 - which].communicate(timeout=60)[0]
    assert running[1 - which].returncode not in (0, None), out[-3000:]
    assert committed(killed) >= 5
    finish(start("train", killed, *flags, processes=2))
    assert state_of(killed, 60) == state_of(tmp_path / "straight", 60)
    assert told(killed) == told(tmp_path / "straight")
