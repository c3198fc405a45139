"""Checkpoints that rot are found; those of older versions open; those of any topology are gone on with."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import TINY

from rar_jax.config import load_experiment
from rar_jax.errors import CheckpointError, ConfigError
from rar_jax.experiment import resolve
from rar_jax.runs import checkpoint, manifest
from rar_jax.runs.checkpoint import (
    Checkpointer,
    best_steps,
    find_arrays,
    good_step,
    load_params,
    read_meta,
    save_params,
)
from rar_jax.runs.workdir import Workdir

OLD = pathlib.Path(__file__).parents[1] / "golden" / "checkpoints" / "version_0_2.tar.gz"


@pytest.fixture
def two_steps(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of checkpoints with a good step 11 and the old step 12."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(tmp_path / "12", tmp_path / "11")
    return tmp_path


def test_the_best_is_known_as_soon_as_it_counts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just after the manifest of the best step: the retention of the next start keeps it."""

    def save(step: int, loss: float) -> None:
        with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpointer:
            checkpointer.save(step, {"x": jax.numpy.zeros(3)}, {"step": step}, ("loss", loss))

    def killed(folder: pathlib.Path) -> None:
        manifest.write_manifest(folder)
        raise KeyboardInterrupt

    save(1, 2.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_manifest", killed)
        save(2, 1.0)
    save(3, float("nan"))
    save(4, 1.5)
    assert best_steps(tmp_path) == {"loss": {"step": 2, "value": 1.0}}
    assert sorted(int(path.name) for path in tmp_path.glob("*") if path.is_dir()) == [2, 4]


def test_the_mark_of_a_step_that_was_gone_back_from(tmp_path: pathlib.Path) -> None:
    """It will be another one when it is saved again; what is older keeps its mark."""
    with contextlib.closing(Checkpointer(tmp_path, keep=2, every=4)) as checkpointer:
        for step in (4, 8):
            checkpointer.save(step, {"x": jax.numpy.zeros(3)}, {"step": step})
            checkpointer.wait()
            checkpoint.mark_best(tmp_path, step, f"fid_n{step}", 9.0)
        assert checkpointer.restore({"x": jax.numpy.zeros(3)}, before=8) is not None
        checkpointer.save(8, {"x": jax.numpy.ones(3)}, {"step": 8})
    assert best_steps(tmp_path) == {"fid_n4": {"step": 4, "value": 9.0}}


@pytest.mark.parametrize("content", ["", "[]", '{"loss": 3}', '{"loss": {"step": 9, "value": 0.0}}'])
def test_damaged_marks_are_not_believed(tmp_path: pathlib.Path, content: str) -> None:
    with contextlib.closing(Checkpointer(tmp_path, keep=2)) as checkpointer:
        checkpointer.save(1, {"x": jax.numpy.zeros(3)}, {"step": 1}, ("loss", 2.5))
        checkpointer.wait()
        (tmp_path / "best.json").write_text(content)
        assert best_steps(tmp_path) == {}
        checkpointer.save(2, {"x": jax.numpy.zeros(3)}, {"step": 2}, ("loss", 3.5))
    assert best_steps(tmp_path) == {"loss": {"step": 2, "value": 3.5}}


def test_fifty_flipped_bits(two_steps: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rng, found, trials = random.Random(5), 0, 50
    files = [p for p in sorted((two_steps / "12").rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) >= 4 and {"manifest.json", "meta.json", "manifest.ocdbt"} <= {p.name for p in files}
    for trial in range(trials):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        damaged, place = bytearray(whole), rng.randrange(8 * len(whole))
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rar_jax.runs.checkpoint"):
            good = good_step(two_steps)
        found += good is not None and good[0] == 11 and str(path) in caplog.text
        path.write_bytes(whole)
    assert found == trials
    good = good_step(two_steps)
    assert good is not None and good[0] == 12


@pytest.mark.parametrize("how", ["wait", "poll", "save", "close"])
def test_verified_after_a_save(tmp_path: pathlib.Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, state = checkpoint.write_manifest, {"params": {"w": jax.numpy.arange(1000.0)}}

    def rots(step: pathlib.Path) -> None:
        real(step)
        if step.name == "2":
            (step / "meta.json").write_text("{}")

    monkeypatch.setattr(checkpoint, "write_manifest", rots)
    checkpointer = Checkpointer(tmp_path, keep=2, verify=True)
    checkpointer.save(1, state, {})
    checkpointer.save(2, state, {"step": 2})
    with pytest.raises(CheckpointError, match=f"{tmp_path}/2/meta.json is damaged"):
        for _ in range(2000):
            checkpointer.save(3, state, {}) if how == "save" else getattr(checkpointer, how)()
            time.sleep(0.005)
    good = good_step(tmp_path)
    assert good is not None and good[0] == 1 and not (tmp_path / "3").exists()


def flip_a_bit(step: pathlib.Path) -> None:
    path = max((p for p in next(step.glob("state-*")).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("damage", [lambda step: (step / "manifest.json").unlink(), flip_a_bit])
def test_taken_over_again(tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None]) -> None:
    params = {"w": jax.numpy.arange(1000.0)}
    for _ in range(3):
        save_params(tmp_path, params, {"stage": "tokenizer"})
        damage(tmp_path / "0")
        assert good_step(tmp_path) is None
    save_params(tmp_path, params, {"stage": "tokenizer"})
    good = good_step(tmp_path)
    assert good is not None and good[0] == 0 and [p.name for p in tmp_path.iterdir()] == ["0"]
    assert np.array_equal(load_params(tmp_path, 0)["w"], params["w"])


def test_unfinished_saves_do_not_pile_up(tmp_path: pathlib.Path) -> None:
    state = {"params": {"w": jax.numpy.arange(8.0)}}
    for step in (2, 3, 4):
        checkpointer = Checkpointer(tmp_path, keep=9)
        checkpointer.save(1, state, {}) if step == 2 else checkpointer.restore(state)
        checkpointer.save(step, state, {})
        checkpointer.close()
        (tmp_path / str(step) / "manifest.json").unlink()  # killed before
    checkpointer = Checkpointer(tmp_path, keep=9)
    assert checkpointer.restore(state) is not None
    checkpointer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


def kept_state() -> dict[str, Any]:
    """The state in version_0_2.tar.gz: arrays of every kind that a train state has, their values known."""

    def tree(first: int) -> dict[str, Any]:
        values = jax.numpy.arange(first, first + 32, dtype=jax.numpy.float32) / 64
        return {"blocks": {"kernel": values.reshape(4, 8), "bias": values[:8].astype(jax.numpy.bfloat16)}}

    moments = ({"count": jax.numpy.int32(12), "mu": tree(3)}, {})
    return {"step": jax.numpy.int32(12), "params": tree(1), "opt_state": moments, "ema": tree(2), "extra": {}}


def test_a_checkpoint_of_version_0_2_opens(two_steps: pathlib.Path) -> None:
    """`Checkpointer.save(12, kept_state(), {"stage": "test", "step": 12})` of version 0.2 made it."""
    expected = kept_state()
    with contextlib.closing(Checkpointer(two_steps, keep=3)) as checkpointer:
        state = checkpointer.restore(jax.tree.map(jax.numpy.zeros_like, expected))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True):
        assert ours.dtype == theirs.dtype and np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    with ocp.PyTreeCheckpointer() as orbax:  # as other programs do
        at = find_arrays(two_steps, 12)
        tree: Any = orbax.metadata(at).item_metadata.tree  # pyright: ignore
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        read = orbax.restore(at, restore_args=as_numpy)
    assert np.array_equal(read["params"]["blocks"]["kernel"], expected["params"]["blocks"]["kernel"])
    kernel = load_params(two_steps, 12)["blocks"]["kernel"]
    assert np.array_equal(kernel, expected["ema"]["blocks"]["kernel"])
    assert read_meta(two_steps, 12) == {"stage": "test", "step": 12}


def test_an_older_work_directory_is_refused(tmp_path: pathlib.Path) -> None:
    config = resolve(load_experiment(str(TINY)), "tiny").resolved()
    workdir = Workdir(tmp_path)
    workdir.claim(config)
    (tmp_path / "checkpoints").mkdir()
    workdir.config.write_text(json.dumps(config))  # 0.1 recorded no version
    for use in (lambda: workdir.claim(config), workdir.read_config):
        with pytest.raises(ConfigError, match=r"was made by rar_jax 0\.1, and this version reads 0\.2: choose another"):
            use()
