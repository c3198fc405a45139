"""A full disk costs saves, never what was saved; the training goes on, and saves again once there is room."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import CheckpointError
from rar_jax.runs import arrays, checkpoint
from rar_jax.runs.checkpoint import Checkpointer, good_step, good_steps
from rar_jax.runs.manifest import verify_from_disk

ROOT = pathlib.Path(__file__).parents[2]


def state(step: int, size: int = 50_000) -> dict[str, Any]:
    values = np.random.default_rng(step).standard_normal(size).astype(np.float32)
    return {"step": jnp.int32(step), "params": {"w": jnp.asarray(values)}}


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["before", "during", "manifest"])
def test_the_disk_is_full_for_a_while(
    tmp_path: pathlib.Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved: list[int] = []
    checkpointer = Checkpointer(tmp_path, keep=2, on_saved=saved.append)
    for step in (1, 2):
        checkpointer.save(step, state(step), {})
    checkpointer.wait()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="rar_jax.runs.checkpoint"):
        if where == "before":
            patch.setattr(checkpoint.shutil, "disk_usage", lambda _: _Usage(0))
        elif where == "during":
            patch.setattr(arrays.ocp.AsyncCheckpointer, "save", full)
        else:
            patch.setattr(checkpoint, "write_manifest", full)
        for step in (3, 4):
            checkpointer.save(step, state(step), {})
            checkpointer.wait()
            assert names(tmp_path) == ["1", "2"], where
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        f"step {step} could not be saved in {tmp_path}" for step in (3, 4)
    ]
    assert next(good_steps(tmp_path))[0] == 2
    checkpointer.save(5, state(5), {})
    checkpointer.close()
    assert [step for step, _ in good_steps(tmp_path)] == [5, 2] and names(tmp_path) == ["2", "5"]
    assert saved == [1, 2, 5], "what could not be saved is not said to be"


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_an_error_in_the_end(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    checkpointer = Checkpointer(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved in .* 3 times in a row\. Fix that"):
        for step in range(1, 9):
            checkpointer.save(step, state(step), {})
            checkpointer.wait()
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, state(1), {})
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved in .* 1 times in a row"):
        checkpointer.close()


def on_a_small_disk(tmp_path: pathlib.Path, script: str, **values: Any) -> subprocess.CompletedProcess[str]:
    """Runs a script, with the places it names filled in, that writes into a tmpfs of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(disk)]
    if subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a tmpfs")
    script = script.format(root=str(ROOT), here=str(pathlib.Path(__file__).parent), folder=str(disk), **values)
    done = subprocess.run([*mount, sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


SCRIPT = """
import pathlib, sys
sys.path[:0] = [{root!r}, {here!r}]
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from test_disk_full import state, names
from rar_jax.runs.checkpoint import Checkpointer, good_steps
from rar_jax.runs import arrays, checkpoint
folder = pathlib.Path({folder!r})
checkpointer = Checkpointer(folder, keep=2)
checkpointer.save(1, state(1), {{}})
checkpointer.wait()
if {blind}:  # what the look at the free space does not see: another program fills the disk during the save
    real = checkpoint.shutil.disk_usage
    checkpoint.shutil.disk_usage = lambda path: real("/")
(folder / "ballast").write_bytes(bytes(720_000))
checkpointer.save(2, state(2), {{}})
checkpointer.wait()
print("full", names(folder), [s for s, _ in good_steps(folder)])
(folder / "ballast").unlink()
checkpointer.save(3, state(3), {{}})
checkpointer.close()
print("room", names(folder), [s for s, _ in good_steps(folder)])
"""


@pytest.mark.parametrize("blind", [False, True])
def test_a_small_disk(tmp_path: pathlib.Path, blind: bool) -> None:
    done = on_a_small_disk(tmp_path, SCRIPT, blind=blind)
    assert done.stdout.splitlines() == ["full ['1', 'ballast'] [1]", "room ['1', '3'] [3, 1]"], (
        done.stdout + done.stderr
    )


TELLING = """
import contextlib, pathlib, sys
sys.path[:0] = [{root!r}]
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from rar_jax.runs.grids import Grid
from rar_jax.runs.ledger import Ledger, read_ledger
from rar_jax.runs.logging import RunLogger, read_metrics
folder = pathlib.Path({folder!r})

def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))

grid = Grid(np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8, 1), np.uint8), ("",), ("",) * 2)
ledger = Ledger(folder)
with RunLogger(folder, "generator", total_steps=80, quiet=True) as reporter:
    for step in range(1, 81):
        if step == 11:
            fill(folder / "ballast")
        if step == 71:
            (folder / "ballast").unlink()
        reporter.write_metrics(step, {{"loss": 1.0, "a" * 500: 0.0}})
        reporter.write_grid(step, "samples", grid)
        ledger.row("saved", step=step)
rows, saved = ([row["step"] for row in rows] for rows in (read_metrics(folder), read_ledger(folder)))
print(rows[:10] == saved[:10] == list(range(1, 11)), rows[-10:] == saved[-10:] == list(range(71, 81)), len(rows) < 80)
"""


def test_what_is_told_on_a_small_disk(tmp_path: pathlib.Path) -> None:
    done = on_a_small_disk(tmp_path, TELLING)
    assert done.stdout == "True True True\n", done.stdout + done.stderr
    assert done.stderr.count("is full") == 1, done.stderr


def test_retention_keeps_the_newest_good_step(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (8, 16):
        checkpointer.save(step, state(step, 100), {})
    checkpointer.wait()
    (tmp_path / "16" / "meta.json").write_text("rots")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_commit", lambda self, *_: self._committed.set())  # killed before its manifest
        checkpointer.save(24, state(24, 100), {})
        checkpointer.close()
    good = good_step(tmp_path)
    assert good is not None and good[0] == 8 and names(tmp_path) == ["16", "24", "8"]
    checkpointer = Checkpointer(tmp_path, keep=2)
    restored = checkpointer.restore(state(0, 100))
    assert restored is not None and int(restored["step"]) == 8
    for step in (16, 24):
        checkpointer.save(step, state(step, 100), {})
    checkpointer.close()
    assert names(tmp_path) == ["16", "24"]


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_reads_before_it_deletes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    real = checkpoint.write_manifest

    def rots(folder: pathlib.Path) -> None:
        real(folder)
        (folder / "meta.json").write_text("rots")

    checkpointer = Checkpointer(tmp_path, keep=keep)
    checkpointer.save(8, state(8, 100), {})
    checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", rots)
        for step in (16, 24, 32):
            checkpointer.save(step, state(step, 100), {})
            checkpointer.wait()
    good = good_step(tmp_path)
    assert good is not None and good[0] == 8
    assert names(tmp_path) == ["16", "24", "32", "8"]
    checkpointer.save(40, state(40, 100), {})
    checkpointer.close()
    assert names(tmp_path) == sorted(map(str, [16, 24, 32, 40][-keep:]))


@pytest.mark.parametrize(
    ("saved", "preempted", "rotten", "left"),
    [
        ((8, 12, 16), (12,), (8, 16), (8, 12, 16)),  # nothing that verifies is newer than 12
        ((8, 16, 24, 32, 37), (37,), (16, 24, 32), (8, 16, 24, 32, 37)),  # no rollback target is newer than 8
        ((8, 12, 16), (12,), (), (8, 16)),
        ((8, 12, 13), (12, 13), (), (8, 12, 13)),  # the next commit deletes 12
        ((8, 12, 13, 16), (12, 13), (), (8, 16)),
    ],
)
def test_retention_of_a_preempted_training(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: tuple[int, ...],
    preempted: tuple[int, ...],
    rotten: tuple[int, ...],
    left: tuple[int, ...],
) -> None:
    real = checkpoint.write_manifest

    def rots(folder: pathlib.Path) -> None:
        real(folder)
        if int(folder.name) in rotten:
            (folder / "meta.json").write_text("rots")

    def read(folder: pathlib.Path) -> None:
        assert step not in preempted, "a preemption has no time for it"
        verify_from_disk(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", rots)
    monkeypatch.setattr(checkpoint, "verify_from_disk", read)
    with contextlib.closing(Checkpointer(tmp_path, keep=2, every=8)) as checkpointer:
        for step in saved:
            checkpointer.save(step, state(step, 100), {}, retain=step not in preempted)
            checkpointer.wait()
    assert names(tmp_path) == sorted(map(str, left))
    good = set(saved) - set(rotten)
    newest, regular = max(good), max(good - set(preempted), default=None)
    with contextlib.closing(Checkpointer(tmp_path, keep=2, every=8)) as checkpointer:
        restored = checkpointer.restore(state(0, 100))
        assert restored is not None and int(restored["step"]) == newest
        if regular is None:
            with pytest.raises(CheckpointError, match=r"no step in .* is good; 8 is damaged"):
                checkpointer.restore(state(0, 100), before=newest + 1)
        else:
            restored = checkpointer.restore(state(0, 100), before=newest + 1)
            assert restored is not None and int(restored["step"]) == regular


def test_a_preemption_does_not_wait_for_retention(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(Checkpointer(tmp_path, keep=2, every=8)) as checkpointer:
        for step in (8, 16):
            checkpointer.save(step, state(step, 100), {})
            checkpointer.wait()
        checkpointer.save(28, state(28, 100), {}, retain=False)
    assert names(tmp_path) == ["16", "28", "8"]
