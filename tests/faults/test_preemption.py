"""SIGTERM to any process at any moment: saved where there is something to save, exit code 75 on all, within 10 seconds."""

from __future__ import annotations

import functools
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import poisoned
import pytest
from commands import TINY, Command, environment, finish, start, state_of, terminate, wait_for
from jax.experimental import multihost_utils

from rar_jax.config import load_experiment
from rar_jax.errors import PREEMPTED, Preempted
from rar_jax.experiment import resolve
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import COORDINATOR, COUNT, INDEX, together
from rar_jax.runs import checkpoint, ledger
from rar_jax.runs.checkpoint import Checkpointer, good_step
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.lock import Lease
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.object_store import ObjectStoreError
from rar_jax.runs.preemption import Watch
from rar_jax.runs.session import Session, session
from rar_jax.runs.workdir import Workdir
from rar_jax.training.loop import train
from rar_jax.weights import stages

ROOT = pathlib.Path(__file__).parents[2]
CLASSIFIER = ("--stage=classifier", "--quiet")
LONG = (
    "--config.classifier.train.steps=100000",
    "--config.classifier.train.log_every=1",
    "--config.classifier.train.eval_every=100000",
)


def step_of(workdir: pathlib.Path) -> int:
    rows = read_metrics(workdir, "classifier") if workdir.exists() else []
    return max((row["step"] for row in rows), default=0)


def saved(workdir: pathlib.Path) -> int:
    good = good_step(workdir / "checkpoints" / "classifier")
    return good[0] if good else 0


def told(workdir: pathlib.Path) -> list[Any]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir)]


def reasons(workdir: pathlib.Path) -> list[str]:
    return [row["reason"] for row in ledger.read(workdir) if row["event"] == "stop"]


def test_the_code_is_the_scripts() -> None:
    assert f"\nPREEMPTED={PREEMPTED}\n" in (ROOT / "launch" / "common.sh").read_text()


@pytest.mark.promise(
    7, "SIGTERM during the steps of one process: the step is saved, code 75, the next start goes on from it"
)
def test_a_step(tmp_path: pathlib.Path) -> None:
    never = "--config.classifier.train.checkpoint_every=100000"
    for at in (5, 12):
        running = start("train", tmp_path / "run", *CLASSIFIER, *LONG, never)
        wait_for(lambda at=at: step_of(tmp_path / "run") >= at, running)
        assert terminate(running) < 10
        assert "preempted and saved" in finish(running, PREEMPTED)
        # The step that ran is saved and told; of steps every one is there once.
        assert at <= saved(tmp_path / "run") == step_of(tmp_path / "run") <= at + 2000
        steps = [row["step"] for row in read_metrics(tmp_path / "run", "classifier")]
        assert steps == list(range(1, len(steps) + 1))
    assert reasons(tmp_path / "run") == ["preempted"] * 2
    assert not (tmp_path / "run" / ".lease.json").exists()


@pytest.mark.promise(
    7, "SIGTERM to one of 2 processes during steps, evaluations and saves: both save the same step and leave with 75"
)
@pytest.mark.parametrize(
    ("which", "often"),
    [
        (1, "checkpoint_every=7"),
        *(
            pytest.param(which, often, marks=pytest.mark.slow)
            for which in (0, 1)
            for often in ("eval_every=1", "checkpoint_every=1")
        ),
    ],
)
def test_one_of_two_processes(tmp_path: pathlib.Path, which: int, often: str) -> None:
    running = start("train", tmp_path / "run", *CLASSIFIER, *LONG, f"--config.classifier.train.{often}", processes=2)
    wait_for(lambda: step_of(tmp_path / "run") >= 3, running)
    assert terminate(running, which) < 10
    finish(running, PREEMPTED)
    assert saved(tmp_path / "run") == step_of(tmp_path / "run") >= 3
    assert reasons(tmp_path / "run") == ["preempted"]


def test_nobody_else_asks_jax(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX names the next number that no process has asked for, by the last that each did: a step of orbax's would mislead it."""
    asked: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or False)
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2):
        checkpointer.save(step, {"step": np.int32(step)}, {})
    checkpointer.close()
    assert good_step(tmp_path) is not None and asked == []


@pytest.mark.promise(
    7,
    "SIGTERM while the step or the evaluation of a training is compiled, which would take 5 minutes: it leaves at once with 75",
)
@pytest.mark.parametrize("validation", [False, True])
def test_the_compilation_of_a_training(tmp_path: pathlib.Path, validation: bool) -> None:
    marker = tmp_path / "compiling"
    endless = functools.partial(poisoned.endless, marker, validation=validation)
    running = start("train", tmp_path / "run", *CLASSIFIER, before=endless)
    wait_for(marker.exists, running)
    assert terminate(running) < 10
    assert "SIGTERM: stopped at once" in finish(running, PREEMPTED)
    assert reasons(tmp_path / "run") == ["preempted"] and saved(tmp_path / "run") == 0


def recipe(**values: int) -> list[str]:
    return [*CLASSIFIER, *(f"--config.classifier.train.{name}={value}" for name, value in values.items())]


@pytest.mark.promise(
    7, "a second signal while a save waits for the disk: it leaves at once with 75, and the next start ends the same"
)
def test_a_second_signal_does_no_harm(tmp_path: pathlib.Path) -> None:
    flags, marker = recipe(steps=20, log_every=1, eval_every=100000, checkpoint_every=5), tmp_path / "saving"
    stuck = functools.partial(poisoned.stuck, marker, "rar_jax.runs.checkpoint", "write_manifest")
    finish(start("train", tmp_path / "straight", *flags))
    running = start("train", tmp_path / "run", *flags, before=stuck)
    wait_for(marker.exists, running)
    running[0].send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert running[0].poll() is None  # it saves
    assert terminate(running) < 2
    assert "a second signal: stopped at once" in finish(running, PREEMPTED)
    assert saved(tmp_path / "run") == 0
    finish(start("train", tmp_path / "run", *flags))
    assert told(tmp_path / "run") == told(tmp_path / "straight")
    assert state_of(tmp_path / "run", 20) == state_of(tmp_path / "straight", 20)


@pytest.mark.slow
@pytest.mark.promise(7, "SIGTERM to one of 2 processes while they start and compile: both leave at once with 75")
@pytest.mark.parametrize("which", [0, 1])
def test_two_processes_that_compile(tmp_path: pathlib.Path, which: int) -> None:
    running = start("run", tmp_path / "run", "--quiet", processes=2, devices=2)
    wait_for((tmp_path / "run" / "config.json").exists, running)
    assert terminate(running, which) < 10
    finish(running, PREEMPTED)


@pytest.mark.promise(7, "SIGTERM to a process that waits for the others at the start: it leaves at once with 75")
def test_alone_at_the_start(tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    place = {COORDINATOR: f"127.0.0.1:{address[1]}", COUNT: "2", INDEX: "0"}
    running = [Command(["sample", "--weights=x", "--out", str(tmp_path)], environment() | place)]

    def listens() -> bool:
        with socket.socket() as other:
            return other.connect_ex(address) == 0

    wait_for(listens, running)
    assert terminate(running) < 2
    assert "SIGTERM: stopped at once" in finish(running, PREEMPTED)


@pytest.mark.promise(7, "SIGTERM during a compilation: the process leaves at once")
def test_a_compilation_leaves_at_once(tmp_path: pathlib.Path) -> None:
    running = start("train", tmp_path / "run", *CLASSIFIER)
    wait_for((tmp_path / "run" / "config.json").exists, running)
    assert terminate(running) < 2
    assert "stopped at once" in finish(running, PREEMPTED)
    assert reasons(tmp_path / "run") == ["preempted"] and not (tmp_path / "run" / ".lease.json").exists()


@pytest.mark.slow
@pytest.mark.promise(
    7,
    "SIGTERM again and again from 4 to 15 s after the start of the whole job, at least 6 times: code 75 each time, same end",
)
def test_the_whole_job_stopped_again_and_again(tmp_path: pathlib.Path, record_property: Any) -> None:
    finish(start("run", tmp_path / "straight", "--quiet"))
    expected = json.loads((tmp_path / "straight" / "result.json").read_text())
    moments = iter([1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0])
    stops = 0
    for moment in moments:
        running = start("run", tmp_path / "stopped", "--quiet")
        began = time.monotonic()
        while running[0].poll() is None and time.monotonic() - began < moment + 3:
            time.sleep(0.05)
        if running[0].poll() is not None:
            finish(running)
            break
        assert terminate(running) < 10
        finish(running, PREEMPTED)
        stops += 1
    finish(start("run", tmp_path / "stopped", "--quiet"))
    assert stops >= 6
    found = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert found["fd_classifier"] == expected["fd_classifier"]
    assert told(tmp_path / "stopped") == told(tmp_path / "straight")
    record_property("count", f"{stops} stops")


DEAF = """
import time
from rar_jax.runs.preemption import Watch
watch = Watch()
with watch.listening(), watch.saving():
    print("ready", flush=True)
    for second in range(600):
        time.sleep(0.1)
        if watch.reached():
            print("asked", flush=True)
"""
LEAVES = """
import time
from rar_jax.runs.preemption import Watch
def on_leave():
    raise OSError(28, "No space left on device")
watch = Watch()
watch.on_leave = on_leave
with watch.listening():
    print("ready", flush=True)
    time.sleep(60)
"""


ASKS = """
import contextlib
import time
from rar_jax.runs.preemption import Watch
def on_leave():
    time.sleep(1)
    print("last words", flush=True)
watch = Watch()
watch.on_leave = on_leave
with watch.listening():
    print("ready", flush=True)
    time.sleep(0.5)
    with SAVING:
        while not watch.reached():
            time.sleep(0.01)
    print("went on", flush=True)
"""


def script(text: str) -> tuple[subprocess.Popen[str], Callable[[], str]]:
    """A process and what reads its next line; it is ready."""
    command = [sys.executable, "-c", text]
    process = subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process, process.stdout.readline


@pytest.mark.promise(
    7, "a second signal, 2 seconds after the first or later, ends a process at once that does not answer"
)
def test_a_second_signal() -> None:
    """Two within moments are one: a machine that shuts down may be told of by several."""
    process, line = script(DEAF)
    process.send_signal(signal.SIGTERM)
    assert line() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert [line() for _ in range(5)] == ["asked\n"] * 5
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=10)[0]
    assert process.returncode == PREEMPTED and "a second signal: stopped at once" in out


def test_an_error_of_leaving_at_once() -> None:
    process, _ = script(LEAVES)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=10)[0]
    assert process.returncode == PREEMPTED and "rar-jax: [Errno 28] No space left on device\n" in out


@pytest.mark.parametrize("entered", ["contextlib.nullcontext()", "watch.saving()"])
def test_nothing_goes_on_beside_the_last_words(entered: str) -> None:
    """A signal that came before there was a step to save."""
    process, _ = script(ASKS.replace("SAVING", entered))
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=10)[0]
    assert process.returncode == PREEMPTED and out.endswith("\nlast words\n") and "went on" not in out


# ---------------------------------------------------------------- without processes


@pytest.mark.promise(7, "SIGTERM during the last save of a stage: the save is finished, then the process leaves")
def test_the_last_save(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes when the files are written, in the background, and the manifest is not."""
    around, real, left = Session(Ledger(tmp_path)), checkpoint.write_manifest, []
    monkeypatch.setattr(around.watch, "_leave", left.append)

    def write_manifest(folder: pathlib.Path) -> None:
        if folder.name == "8":
            time.sleep(1)
            around.watch._signalled()
        real(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", write_manifest)
    experiment = resolve(load_experiment(str(TINY)), "tiny")
    with pytest.raises(Preempted):
        train(experiment, "classifier", Workdir(tmp_path), make_mesh(experiment.mesh), quiet=True, session=around)
    assert saved(tmp_path) == 8 and left == []


def test_an_error_of_leaving_does_not_hide_the_preemption(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def release(self: Lease) -> None:
        raise ObjectStoreError("the bucket is away")

    monkeypatch.setattr(Lease, "release", release)
    with pytest.raises(Preempted), session(Workdir(tmp_path), "train", Watch(), lambda: None):
        raise Preempted
    assert capsys.readouterr().err == "rar-jax train: the bucket is away\n" and reasons(tmp_path) == ["preempted"]
    (tmp_path / ".lease.json").unlink()
    with pytest.raises(ObjectStoreError), session(Workdir(tmp_path), "train", Watch(), lambda: None):
        pass


def test_process_0_says_whether_a_step_was_evaluated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that read the disk themselves could differ, and wait for each other within the evaluation."""
    for said in ({"validation/loss": 1.0}, None):
        monkeypatch.setattr(stages, "from_main", lambda function, said=said: said)
        assert stages.evaluated(Workdir(tmp_path), "classifier", 8) is said


def test_the_code_of_one_process_that_fails_after_a_signal() -> None:
    watch = Watch()
    watch.noticed = True
    assert [together("train", lambda code=code: code, watch.exit_code) for code in (0, 1, PREEMPTED)] == [0, 75, 75]
    assert together("train", lambda: 1, Watch().exit_code) == 1


def test_listening_ends_as_it_began() -> None:
    before = signal.getsignal(signal.SIGTERM)
    watch = Watch()
    with watch.listening(), watch.saving():
        assert not watch.reached() and watch.exit_code(1) == 1
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not watch.reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert watch.exit_code(1) == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
