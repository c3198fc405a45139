"""A work directory in a bucket: killed at any moment, it resumes on another machine. No process shares a folder with another."""

from __future__ import annotations

import pathlib
import random
import socket
import time
from typing import Any

import pytest
from buckets import serve
from commands import TINY, Command, environment, finish, state_of, wait_for

from rar_jax.parallel.processes import COORDINATOR, COUNT, INDEX
from rar_jax.runs.bucket import BucketPath, list_files, make_path
from rar_jax.runs.checkpoint import good_steps
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.manifest import MANIFEST
from rar_jax.runs.workdir import Workdir

SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
WHAT = "kill -9 at random moments, resumed on another machine from a bucket of {} kind: same state and rows, bitwise"


class Machines:
    """Starts commands on machines that have nothing but the bucket in common."""

    def __init__(self, tmp_path: pathlib.Path, reached: dict[str, str], steps: int) -> None:
        self._tmp_path, self._reached, self._count = tmp_path, reached, 0
        recipe = {"steps": steps, "checkpoint_every": 5, "eval_every": 20, "log_every": 1}
        self._flags = ["--stage=classifier", *(f"--config.classifier.train.{k}={v}" for k, v in recipe.items())]

    def start(self, workdir: str, port: int = 0, processes: int = 1) -> list[Command]:
        running = []
        for k in range(processes):
            self._count += 1
            home = self._tmp_path / f"machine_{self._count}"
            home.mkdir()
            env = environment() | self._reached | {"TMPDIR": str(home), "HOME": str(home)}
            if processes > 1:
                env |= {COORDINATOR: f"127.0.0.1:{port}", COUNT: str(processes), INDEX: str(k)}
            running.append(Command(["train", "--config", str(TINY), "--workdir", workdir, *self._flags], env))
        return running


def committed(folder: Any) -> list[int]:
    """The steps that have a manifest: each of them verifies."""
    found = sorted({int(name.split("/")[0]) for name in list_files(folder) if name.endswith(MANIFEST)}, reverse=True)
    good = [step for step, _ in good_steps(folder)]
    assert set(found) - set(good) <= {min(found, default=0)}, "only the oldest may be deleted meanwhile"
    return good


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir, "classifier")]


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=SLOW)])
def test_killed_and_resumed_from_google(kills: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, straight, killed = kill("gs", kills, tmp_path, monkeypatch)
    assert ours == straight and killed == kills


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_and_resumed_from_amazon(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, straight, killed = kill("s3", 10, tmp_path, monkeypatch)
    assert ours == straight and killed == 10


def kill(
    scheme: str, kills: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Any, Any], tuple[Any, Any], int]:
    """Kill a run so many times: its last state and rows, those of a run that was not killed, and the number of kills."""
    last, url, rng, newest = max(120, 40 * kills), f"{scheme}://bucket/killed", random.Random(kills), 0
    with serve(scheme) as reached:
        for name, value in reached.items():
            monkeypatch.setenv(name, value)
        machines = Machines(tmp_path, reached, last)
        finish(machines.start(str(tmp_path / "straight")))
        folder = make_path(url) / "checkpoints" / "classifier"
        assert isinstance(folder, BucketPath)
        for trial in range(kills):
            running = machines.start(url)
            if trial % 5 == 3:
                time.sleep(rng.uniform(0.2, 5.0))  # starting, fetching, compiling
            else:
                wait_for(lambda newest=newest: max(map(int, steps_in(folder)), default=0) > newest, running)
                time.sleep(rng.uniform(0, 0.6))
            running[0].kill()
            out = running[0].communicate()[0]
            assert running[0].returncode == -9, out[-3000:]
            good = committed(folder)
            assert max(good, default=0) >= newest, "what was committed is there"
            newest = max(good, default=0)
        assert newest < last, "it was killed while it trained"
        out = finish(machines.start(url))
        assert not newest or f"step {newest} of {last}" in out
        fetched = Workdir(url).fetch()
        ours = state_of(fetched.root, last), rows(fetched.path)
        assert not (fetched.root / ".lock.json").is_file()
    return ours, (state_of(tmp_path / "straight", last), rows(tmp_path / "straight")), kills


def steps_in(folder: BucketPath) -> list[str]:
    return [name.split("/")[0] for name in folder.names() if name.endswith(MANIFEST)]


def test_two_processes_without_a_shared_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free_port() -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    url, last = "gs://bucket/pod", 60
    with serve("gs") as reached:
        for name, value in reached.items():
            monkeypatch.setenv(name, value)
        machines = Machines(tmp_path, reached, last)
        folder = make_path(url) / "checkpoints" / "classifier"
        assert isinstance(folder, BucketPath)
        running = machines.start(url, free_port(), processes=2)
        wait_for(lambda: bool(steps_in(folder)), running)
        for process in running:
            process.kill()
            process.communicate()
        newest = max(committed(folder))
        assert newest < last
        out = finish(machines.start(url, free_port(), processes=2))
        assert f"step {newest} of {last}" in out
        fetched = Workdir(url).fetch()
        assert [row["step"] for row in rows(fetched.path) if "loss" in row] == list(range(1, last + 1))
        assert max(committed(folder)) == last and state_of(fetched.root, last)
