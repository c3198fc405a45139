"""A signal in the training loop: all processes save the same step, exit code 75, within 10 seconds. Elsewhere: the default action."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import poisoned
import pytest
from commands import finish, start, state_of, terminate, wait_for
from stopped import stage, tiny

from rar_jax.errors import PREEMPTED, LockError, Preempted
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.runs import checkpoint, ledger, preemption
from rar_jax.runs.checkpoint import good_step
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.preemption import SIGNALS, PreemptionMonitor
from rar_jax.runs.session import Session, open_session
from rar_jax.runs.workdir import Workdir
from rar_jax.weights import stages

ROOT = pathlib.Path(__file__).parents[2]
OPERATIONS: set[str] = set()  # of single operations, which are compiled within milliseconds
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
    return [row["reason"] for row in ledger.read_ledger(workdir) if row["event"] == "stop"]


def test_the_code_is_the_scripts() -> None:
    assert f"\nPREEMPTED={PREEMPTED}\n" in (ROOT / "launch" / "common.sh").read_text()


def test_a_step(tmp_path: pathlib.Path) -> None:
    never = "--config.classifier.train.checkpoint_every=100000"
    for at in (5, 12):
        running = start("train", tmp_path / "run", *CLASSIFIER, *LONG, never)
        wait_for(lambda at=at: step_of(tmp_path / "run") >= at, running)
        assert terminate(running) < 10
        assert "preempted and saved; rerun the same command to resume" in finish(running, PREEMPTED)
        # The step that ran is saved and told; of steps every one is there once.
        assert at <= saved(tmp_path / "run") == step_of(tmp_path / "run") <= at + 2000
        steps = [row["step"] for row in read_metrics(tmp_path / "run", "classifier")]
        assert steps == list(range(1, len(steps) + 1))
    assert reasons(tmp_path / "run") == ["preempted"] * 2
    assert not (tmp_path / "run" / ".lock.json").exists()


@pytest.mark.parametrize(
    ("which", "often", "number"),
    [
        (1, "checkpoint_every=7", signal.SIGTERM),
        pytest.param(0, "eval_every=1", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, "eval_every=1", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(0, "checkpoint_every=1", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(1, "checkpoint_every=1", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_one_of_two_processes(tmp_path: pathlib.Path, which: int, often: str, number: signal.Signals) -> None:
    running = start("train", tmp_path / "run", *CLASSIFIER, *LONG, f"--config.classifier.train.{often}", processes=2)
    wait_for(lambda: step_of(tmp_path / "run") >= 3, running)
    assert terminate(running, which, number) < 10
    finish(running, PREEMPTED)
    assert saved(tmp_path / "run") == step_of(tmp_path / "run") >= 3
    assert reasons(tmp_path / "run") == ["preempted"]


@pytest.mark.parametrize("validation", [False, True])
def test_the_compilation_of_a_training(tmp_path: pathlib.Path, validation: bool) -> None:
    marker = tmp_path / "compiling"
    endless = functools.partial(poisoned.endless, marker, validation=validation)
    running = start("train", tmp_path / "run", *CLASSIFIER, before=endless)
    wait_for(marker.exists, running)
    assert terminate(running) < 10
    finish(running, -signal.SIGTERM)
    assert saved(tmp_path / "run") == 0 and reasons(tmp_path / "run") == []


def recipe(**values: int) -> list[str]:
    return [*CLASSIFIER, *(f"--config.classifier.train.{name}={value}" for name, value in values.items())]


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
    finish(running, -signal.SIGTERM)
    assert saved(tmp_path / "run") == 0
    finish(start("train", tmp_path / "run", *flags))
    assert told(tmp_path / "run") == told(tmp_path / "straight")
    assert state_of(tmp_path / "run", 20) == state_of(tmp_path / "straight", 20)


@pytest.mark.slow
def test_the_whole_job_stopped_again_and_again(tmp_path: pathlib.Path) -> None:
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
        finish(running, running[0].returncode)
        assert running[0].returncode in (PREEMPTED, -signal.SIGTERM)
        stops += 1
    finish(start("run", tmp_path / "stopped", "--quiet"))
    assert stops >= 6
    found = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert found["fd_classifier"] == expected["fd_classifier"]
    assert told(tmp_path / "stopped") == told(tmp_path / "straight")


# ---------------------------------------------------------------- without processes


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal(tmp_path: pathlib.Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled: list[int] = []

    def poll(self: Session, real: Any = Session.poll) -> None:
        if not signalled:
            signalled.append(number)
            signal.raise_signal(number)
            signal.raise_signal(number)  # a repetition within moments is the same signal
        real(self)

    monkeypatch.setattr(Session, "poll", poll)
    before = signal.signal(number, lambda *_: None)  # SIGINT is ignored where tests run in the background
    try:
        handler = signal.getsignal(number)
        with pytest.raises(Preempted):
            stage(tmp_path)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert saved(tmp_path) == 1


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[Any] = []
    monkeypatch.setattr(Session, "poll", lambda self: polls.append(signal.getsignal(signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stage(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert set(polls) == {signal.SIG_IGN}


def test_a_later_signal_has_the_action_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "REPEAT_SECONDS", 0.0)
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    monitor = PreemptionMonitor()
    try:
        with monitor.listening(make_mesh(MeshConfig())):
            signal.raise_signal(signal.SIGUSR1)
            assert monitor.poll() and monitor.agree() and heard == []
            time.sleep(0.01)
            signal.raise_signal(signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_after_the_last_answer_is_not_lost() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with PreemptionMonitor().listening(make_mesh(MeshConfig())):
            signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_the_main_thread_nothing_is_handled() -> None:
    found: list[Any] = []

    def listen() -> None:
        monitor = PreemptionMonitor()
        with monitor.listening(make_mesh(MeshConfig())):
            found.append(monitor.poll())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False]


def test_every_program_is_compiled_before_the_first_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compilation would keep a signal waiting. Single operations, which JAX compiles in milliseconds, do not."""
    poisoned.poison((10, 11, 12), monkeypatch.setattr)
    listening: Any = PreemptionMonitor.listening

    @contextlib.contextmanager
    def watched(self: PreemptionMonitor, mesh: Any) -> Iterator[None]:
        with listening(self, mesh), jax.log_compiles():
            caplog.clear()
            yield

    monkeypatch.setattr(PreemptionMonitor, "listening", watched)
    with caplog.at_level("WARNING"):
        stage(tmp_path)
    compiled = re.findall(r"Finished XLA compilation of jit\((.*?)\)", caplog.text)
    assert set(compiled) <= OPERATIONS, compiled
    assert [row["event"] for row in ledger.read_ledger(tmp_path)].count("rollback") == 1


def test_the_last_save(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes when the files are written, in the background, and the manifest is not."""
    real = checkpoint.write_manifest

    def write_manifest(folder: pathlib.Path) -> None:
        if folder.name == "20":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)
        real(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", write_manifest)
    with pytest.raises(Preempted):
        stage(tmp_path)
    assert saved(tmp_path) == 20
    assert stages.finished(tiny(), "classifier", Workdir(tmp_path)) is not None


def test_the_ledger_records_how_a_run_ended(tmp_path: pathlib.Path) -> None:
    for error in (None, Preempted(), KeyboardInterrupt(), ValueError("no")):
        context = pytest.raises(type(error)) if error else contextlib.nullcontext()
        with context, open_session(Workdir(tmp_path), "train", lambda: None):
            assert (tmp_path / ".lock.json").exists()
            if error:
                raise error
        assert not (tmp_path / ".lock.json").exists()
    assert reasons(tmp_path) == ["done", "preempted", "interrupted", "ValueError: no"]


def test_a_directory_that_is_not_claimed_gets_no_row(tmp_path: pathlib.Path) -> None:
    def claim() -> None:
        raise ValueError("of another experiment")

    with pytest.raises(ValueError, match="another"), open_session(Workdir(tmp_path), "train", claim):
        pass
    assert not (tmp_path / ".lock.json").exists() and ledger.read_ledger(tmp_path) == []


def test_a_lost_lock_is_raised_by_the_next_poll() -> None:
    lost = SimpleNamespace(check=lambda: (_ for _ in ()).throw(LockError("lost")))
    with pytest.raises(LockError):
        Session(locks=[lost]).poll()  # pyright: ignore[reportArgumentType]


def test_process_0_says_whether_a_step_was_evaluated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that read the disk themselves could differ, and wait for each other within the evaluation."""
    for said in ({"validation/loss": 1.0}, None):
        monkeypatch.setattr(stages, "from_main", lambda function, said=said: said)
        assert stages.evaluated(Workdir(tmp_path), "classifier", 8) is said
