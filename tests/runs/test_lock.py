"""One writer per work directory, on a disk or in a bucket. A second writer is refused until the first is dead."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from buckets import serve

from rar_jax.errors import LockError
from rar_jax.runs import lock
from rar_jax.runs.bucket import Path, list_files, make_path
from rar_jax.runs.lock import NAME, Lock, read_holder


@pytest.fixture(scope="module")
def google() -> Iterator[dict[str, str]]:
    with serve("gs") as reached:
        yield reached


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    if request.param == "disk":
        return tmp_path
    for name, value in request.getfixturevalue("google").items():
        monkeypatch.setenv(name, value)
    return make_path(f"gs://bucket/{tmp_path.name}")


def write(folder: Path, **holder: Any) -> None:
    """The lock of another process, elsewhere unless said otherwise."""
    whole = {"nonce": "n", "host": "elsewhere", "machine": "another", "pid": 1, "started": "5", "verb": "run"}
    whole |= {"since": "x", "beat": 0, "time": time.time()}
    (folder / NAME).write_bytes(json.dumps(whole | holder).encode())


def files(folder: Path) -> list[str]:
    return [name for name in list_files(folder) if not name.endswith(".__lock")]


def test_refused_while_the_other_lives(folder: Path) -> None:
    first = Lock(folder, "train")
    with pytest.raises(LockError, match=rf"is being written to by process {os.getpid()} on .* \(rar-jax train, since "):
        Lock(folder, "run")
    holder = read_holder(folder)
    assert holder is not None and holder["verb"] == "train"
    first.release()
    first.release()
    assert files(folder) == [] and read_holder(folder) is None
    Lock(folder, "run").release()


@pytest.mark.parametrize("host", ["elsewhere", os.uname().nodename])
def test_one_elsewhere_is_refused_if_its_heart_beats(folder: Path, host: str) -> None:
    """On another machine, or in another container of this one, where its pid is another process's."""
    write(folder, host=host, pid=os.getpid())
    beat = threading.Timer(0.3, lambda: write(folder, host=host, pid=os.getpid(), beat=1))
    beat.start()
    with pytest.raises(LockError, match=f"process {os.getpid()} on {host} "):
        Lock(folder, "run")
    beat.join()
    assert json.loads((folder / NAME).read_bytes())["nonce"] == "n"


def test_one_elsewhere_that_is_silent_is_taken_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a wait: when a pod comes up again nobody is there to try a minute later."""
    write(folder)
    began = time.monotonic()
    Lock(folder, "run").release()
    assert time.monotonic() - began > 0.9 and "process 1 on elsewhere" in caplog.text


@pytest.mark.parametrize("how", ["killed", "number again", "cut off"])
def test_what_died_here_is_taken_over_at_once(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1000.0)
    here = {"host": os.uname().nodename, "machine": lock._machine()}
    if how == "killed":
        script = "import os; from rar_jax.runs.bucket import make_path; from rar_jax.runs.lock import Lock; "
        script += f"Lock(make_path({str(folder)!r}), 'run'); os.kill(os.getpid(), 9)"
        assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
        assert json.loads((folder / NAME).read_bytes()).items() >= here.items()
    elif how == "number again":  # another process has the pid now
        write(folder, **here, pid=os.getpid(), started="5")
    else:
        (folder / NAME).write_bytes(b'{"half')
    held = Lock(folder, "run")
    assert json.loads((folder / NAME).read_bytes())["pid"] == os.getpid()
    held.release()
    assert files(folder) == []


def test_the_slower_of_two_that_found_it_stale_gives_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its write, the quicker one has taken the lock."""
    real = Lock._write

    def late(self: Lock, generation: bytes) -> bytes:
        write(folder, nonce="quicker")
        return real(self, generation)

    monkeypatch.setattr(Lock, "_write", late)
    with pytest.raises(LockError, match="is being locked by another process right now"):
        Lock(folder, "run")
    assert json.loads((folder / NAME).read_bytes())["nonce"] == "quicker"


def test_the_heartbeat_and_the_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    held = Lock(folder, "run")
    deadline = time.monotonic() + 20
    while json.loads((folder / NAME).read_bytes())["beat"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.check()
    write(folder, pid=77)
    with pytest.raises(LockError, match="was locked by process 77 on elsewhere"):
        while time.monotonic() < deadline:
            held.check()
            time.sleep(0.01)
    held.release()
    assert json.loads((folder / NAME).read_bytes())["pid"] == 77, "another's lock is not ours to remove"
