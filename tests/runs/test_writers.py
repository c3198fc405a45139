"""Weights & Biases behind the writer of TensorBoard: what a stand-in for the package is told.

The stand-in drops nothing and checks nothing: what the real package wants was looked up in it, and tried once, offline.
"""

from __future__ import annotations

import math
import os
import pathlib
import sys
import types
from typing import Any

import numpy as np
import pytest
from events import pictures, read_events, scalars

from rar_jax.errors import ConfigError
from rar_jax.runs import logging as report
from rar_jax.runs.grids import Grid
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.writers import TensorBoardWriter

GRID = Grid(np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), np.uint8), ("cat", "dog"), ("",) * 3)


class FakeRun:
    """What `wandb.init` returns; `server` is what was told of this id before."""

    def __init__(self, server: list[tuple[int, dict[str, Any]]]) -> None:
        self.told, self.finished = server, False
        self.step = server[-1][0] + 1 if server else 0  # as the package has it of a run that resumes

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.told.append((step, values))
        self.step = step

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """The package. `begun`: (keywords, run) of each `init`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[tuple[dict[str, Any], FakeRun]] = []
        self.server: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.refusal: str | None = None

    def init(self, **keywords: Any) -> FakeRun:
        if self.refusal:
            raise self.errors.Error(self.refusal)
        run = FakeRun(self.server.setdefault(keywords["id"], []))
        self.begun.append((keywords, run))
        return run

    def Image(self, pixels: np.ndarray) -> np.ndarray:
        return pixels

    def Settings(self, **keywords: Any) -> dict[str, Any]:
        return keywords


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """In the place of the package."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def reporter(workdir: pathlib.Path, stage: str = "generator", project: str | None = "digits") -> RunLogger:
    return RunLogger(workdir, stage, total_steps=10, quiet=True, wandb=project)


def test_it_is_told_what_tensorboard_is(tmp_path: pathlib.Path, wandb: FakeWandb) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7}')
    with reporter(tmp_path) as told:
        told.resume_from(0)
        told.write_metrics(1, {"loss": np.float32(0.5), "validation/loss": 0.25, "grad_norm": math.nan})
        told.write_metrics(2, {"loss": 0.125})
        told.write_grid(2, "samples", GRID)
    ((keywords, run),) = wandb.begun
    first, second, (step, images) = run.told
    assert (first, second) == ((1, {"loss": 0.5, "validation/loss": 0.25}), (2, {"loss": 0.125})) and run.finished
    events = read_events(tmp_path / "tensorboard" / "generator")
    assert scalars(events) == {(name, s): pytest.approx(x) for s, row in (first, second) for name, x in row.items()}
    assert step == 2 and images.keys() == {"samples"} and images["samples"].dtype == np.uint8
    by_hand = np.concatenate([np.concatenate(list(row), axis=1) for row in GRID.images]).repeat(6, 0).repeat(6, 1)
    np.testing.assert_array_equal(images["samples"], by_hand)
    np.testing.assert_array_equal(pictures(events)["samples", 2], by_hand.repeat(3, axis=-1))
    assert (keywords["project"], keywords["job_type"], keywords["dir"]) == ("digits", "generator", str(tmp_path))
    assert keywords["config"] == {"seed": 7} and keywords["settings"] == {"console": "off", "silent": True}


def test_a_resumed_stage_goes_on_in_its_own_run(tmp_path: pathlib.Path, wandb: FakeWandb) -> None:
    workdir = tmp_path / "run"
    with reporter(workdir, "tokenizer") as told:
        told.write_metrics(1, {"loss": 9.0})
    with reporter(workdir) as told:
        for step in (1, 2, 3):
            told.write_metrics(step, {"loss": 1 / step})
    moved = workdir.rename(tmp_path / "moved")
    with reporter(moved) as told:
        told.resume_from(2)  # the last checkpoint: step 3 comes again
        for step in (3, 4):
            told.write_metrics(step, {"loss": 1 / step})
    ids = [keywords["id"] for keywords, _ in wandb.begun]
    assert ids[1] == ids[2] != ids[0] and all(keywords["resume"] == "allow" for keywords, _ in wandb.begun)
    assert wandb.server[ids[1]] == [(step, {"loss": 1 / step}) for step in (1, 2, 3, 4)]
    with reporter(tmp_path / "other") as told:
        told.write_metrics(1, {"loss": 1.0})
    groups = [keywords["group"] for keywords, _ in wandb.begun]
    assert groups[0] == groups[1] == groups[2] != groups[3] and wandb.begun[3][0]["id"] not in ids


def test_only_process_0_tells(tmp_path: pathlib.Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "is_main", lambda: False)
    with reporter(tmp_path) as told:
        told.write_metrics(1, {"loss": 1.0})
        told.write_grid(1, "samples", GRID)
    assert wandb.begun == [] and list(tmp_path.iterdir()) == []


def test_it_is_off_by_default(tmp_path: pathlib.Path, wandb: FakeWandb) -> None:
    with reporter(tmp_path, project=None) as told:
        told.write_metrics(1, {"loss": 1.0})
    assert wandb.begun == [] and not (tmp_path / "wandb.json").exists()


def test_a_package_that_is_not_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a folder of its runs in the working directory, which can be imported, the package."""
    for module in (None, types.ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with reporter(tmp_path) as told, pytest.raises(ConfigError, match=r"pip install -e '\.\[wandb\]'"):
            told.write_metrics(1, {"loss": 1.0})


def test_a_refusal_is_one_line_that_says_what_to_do(tmp_path: pathlib.Path, wandb: FakeWandb) -> None:
    wandb.refusal = "No API key configured.\nUse `wandb login` to log in."
    with reporter(tmp_path) as told, pytest.raises(ConfigError) as caught:
        told.write_metrics(1, {"loss": 1.0})
    assert str(caught.value) == (
        "Weights & Biases does not start (No API key configured. Use `wandb login` to log in.): run `wandb login`, or set "
        "WANDB_MODE=offline"
    )


def test_the_disk_is_not_waited_for_at_each_row(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(fsync(fd)))
    writer = TensorBoardWriter(tmp_path, None)
    for step in range(50):
        writer.write_scalars(step, {"loss": 1.0, "bits": 2.0})
    writer.close()
    assert 1 <= len(calls) <= 3
