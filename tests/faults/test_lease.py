"""One writer per work directory: refused while the other lives, taken over when it is dead or silent."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from rar_jax.errors import LeaseError
from rar_jax.runs import lock as lease
from rar_jax.runs.lock import NAME, STALE_SECONDS, Lease


def written(folder: pathlib.Path, age: float = 0.0, **holder: Any) -> None:
    """The lease of somebody else, its last heartbeat `age` seconds ago."""
    path = folder / NAME
    path.write_text(
        json.dumps(
            {
                "nonce": "n",
                "host": "elsewhere",
                "machine": "another",
                "pid": 1,
                "started": "5",
                "verb": "run",
                "since": "x",
            }
            | holder
        )
    )
    os.utime(path, (time.time() - age,) * 2)


def test_refused_while_the_other_lives(tmp_path: pathlib.Path) -> None:
    first = Lease(tmp_path, "train")
    with pytest.raises(
        LeaseError, match=rf"is being written to by process {os.getpid()} on .* \(rar-jax train, since "
    ):
        Lease(tmp_path, "run")
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []
    Lease(tmp_path, "run").release()


@pytest.mark.parametrize("host", ["elsewhere", os.uname().nodename])
def test_one_elsewhere_is_refused_if_its_heart_beats(
    tmp_path: pathlib.Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, or in another container of this one, where its pid is another process's."""
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    written(tmp_path, age=STALE_SECONDS - 20, host=host, pid=os.getpid())
    beat = threading.Timer(0.2, os.utime, [tmp_path / NAME])
    beat.start()
    with pytest.raises(LeaseError, match=f"process {os.getpid()} on {host} "):
        Lease(tmp_path, "run")
    beat.join()
    assert lease.read_holder(tmp_path / NAME)["nonce"] == "n"


def test_one_elsewhere_that_was_killed_a_moment_ago_is_waited_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a pod comes up again: nobody is there to try a minute later."""
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    written(tmp_path)
    began = time.monotonic()
    Lease(tmp_path, "run").release()
    assert time.monotonic() - began > 0.4 and "process 1 on elsewhere" in caplog.text


@pytest.mark.parametrize("how", ["killed", "number again", "silent elsewhere", "no lease at all"])
def test_what_is_dead_is_taken_over(tmp_path: pathlib.Path, how: str) -> None:
    here = {"host": os.uname().nodename, "machine": lease._machine()}
    if how == "killed":
        script = f"import os, pathlib; from rar_jax.runs.lock import Lease; Lease(pathlib.Path({str(tmp_path)!r}), 'run'); os.kill(os.getpid(), 9)"
        assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
        assert lease.read_holder(tmp_path / NAME).items() >= here.items()
    elif how == "number again":  # another process has the pid now
        written(tmp_path, **here, pid=os.getpid(), started="5")
    elif how == "silent elsewhere":
        written(tmp_path, age=STALE_SECONDS + 1)
    else:
        (tmp_path / NAME).write_text('{"half')
        os.utime(tmp_path / NAME, (time.time() - STALE_SECONDS - 1,) * 2)
    held = Lease(tmp_path, "run")
    assert lease.read_holder(tmp_path / NAME)["pid"] == os.getpid()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_that_found_it_stale_gives_way(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look and its move, the quicker one has taken the lease."""
    written(tmp_path, age=STALE_SECONDS + 1, nonce="stale")
    real, looked = lease.alive, []

    def alive(path: pathlib.Path, holder: dict[str, Any]) -> bool:
        found = real(path, holder)
        if not looked:
            looked.append(found)
            written(tmp_path, nonce="quicker", pid=77)
        return found

    monkeypatch.setattr(lease, "alive", alive)
    monkeypatch.setattr(lease, "_beats", lambda *_: True)
    with pytest.raises(LeaseError, match="process 77 on elsewhere"):
        Lease(tmp_path, "run")
    assert looked == [False] and [p.name for p in tmp_path.iterdir()] == [NAME]
    assert lease.read_holder(tmp_path / NAME)["nonce"] == "quicker"


def test_the_heartbeat_and_the_loss(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    held = Lease(tmp_path, "run")
    os.utime(tmp_path / NAME, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime < 100:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.check()
    written(tmp_path, pid=77)
    with pytest.raises(LeaseError, match="was taken over by process 77 on elsewhere"):
        while time.monotonic() < deadline:
            held.check()
            time.sleep(0.01)
    held.release()
    assert lease.read_holder(tmp_path / NAME)["pid"] == 77, "another's lease is not ours to remove"
