"""Checkpoints that rot are found; those of older versions open; those of any topology are gone on with."""

from __future__ import annotations

import contextlib
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
import pytest
import tensorstore as ts
from commands import TINY

from rar_jax.config import load_experiment
from rar_jax.errors import CheckpointError
from rar_jax.experiment import resolve
from rar_jax.networks import classifier
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.runs import checkpoint, manifest
from rar_jax.runs.checkpoint import Checkpointer, best_steps, good_step, load_params, save_params
from rar_jax.training.step import compile_training

OLD = sorted((pathlib.Path(__file__).parents[1] / "golden" / "checkpoints").glob("*.tar.gz"))


@pytest.fixture
def two_steps(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of checkpoints with a good step 11 and the old step 12."""
    with tarfile.open(OLD[0]) as archive:
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


@pytest.mark.parametrize("damaged", ["meta/metadata", "manifest.json"])
def test_a_damaged_score_is_not_believed(tmp_path: pathlib.Path, damaged: str) -> None:
    with contextlib.closing(Checkpointer(tmp_path, keep=2)) as checkpointer:
        for step, loss in ((1, 2.5), (2, 3.5)):
            checkpointer.save(step, {"x": jax.numpy.zeros(3)}, {"step": step}, ("loss", loss))
    assert best_steps(tmp_path) == {"loss": {"step": 1, "value": 2.5}}
    path = tmp_path / "2" / damaged
    path.write_text(path.read_text().replace("3.5", "1.5").replace('"sha256": "', '"sha256": "0'))
    assert best_steps(tmp_path) == {"loss": {"step": 1, "value": 2.5}}


def test_fifty_flipped_bits(two_steps: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rng, found, trials = random.Random(5), 0, 50
    files = [p for p in sorted((two_steps / "12").rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) > 15 and {"manifest.json", "metadata", "_METADATA"} <= {p.name for p in files}
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
    real, state = checkpoint.write_manifest, {"params": {"w": np.arange(1000.0)}}

    def rots(step: pathlib.Path) -> None:
        real(step)
        if step.name == "2":
            (step / "meta" / "metadata").write_text("{}")

    monkeypatch.setattr(checkpoint, "write_manifest", rots)
    checkpointer = Checkpointer(tmp_path, keep=2, verify=True)
    checkpointer.save(1, state, {})
    checkpointer.save(2, state, {"step": 2})
    with pytest.raises(CheckpointError, match=f"{tmp_path}/2/meta/metadata is damaged"):
        for _ in range(2000):
            checkpointer.save(3, state, {}) if how == "save" else getattr(checkpointer, how)()
            time.sleep(0.005)
    good = good_step(tmp_path)
    assert good is not None and good[0] == 1 and not (tmp_path / "3").exists()


def flip_a_bit(step: pathlib.Path) -> None:
    path = max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "aside"), [(lambda step: (step / "manifest.json").unlink(), "0.unfinished"), (flip_a_bit, "0.damaged")]
)
def test_taken_over_again(tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None], aside: str) -> None:
    params = {"w": np.arange(1000.0)}
    for _ in range(3):
        save_params(tmp_path, params, {"stage": "tokenizer"})
        damage(tmp_path / "0")
        assert good_step(tmp_path) is None
    save_params(tmp_path, params, {"stage": "tokenizer"})
    good = good_step(tmp_path)
    assert good is not None and good[0] == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["0", aside]
    assert np.array_equal(load_params(tmp_path, 0)["w"], params["w"])


def test_unfinished_saves_do_not_pile_up(tmp_path: pathlib.Path) -> None:
    state = {"params": {"w": np.arange(8.0)}}
    for step in (2, 3, 4):
        checkpointer = Checkpointer(tmp_path, keep=9)
        checkpointer.save(1, state, {}) if step == 2 else checkpointer.restore(state)
        checkpointer.save(step, state, {})
        checkpointer.close()
        (tmp_path / str(step) / "manifest.json").unlink()  # killed before
        (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
    checkpointer = Checkpointer(tmp_path, keep=9)
    assert checkpointer.restore(state) is not None
    checkpointer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4.unfinished"]


def arrays_by_tensorstore(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All that the files of a state hold, by name, read without orbax and without knowing what should be there."""
    store = {"driver": "ocdbt", "base": f"file://{folder}/"}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
    opened = {name: ts.open({"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}).result() for name in names}
    return {name: array.read().result() for name, array in opened.items()}


def name_of(path: tuple[Any, ...]) -> str:
    """A leaf's place in a tree as orbax names it."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path)


def test_an_old_checkpoint_opens(two_steps: pathlib.Path) -> None:
    recipe = resolve(load_experiment(str(TINY)), "tiny").recipe("classifier")
    assert recipe is not None
    setup = compile_training(classifier, classifier.TINY, recipe, make_mesh(MeshConfig()))
    checkpointer = Checkpointer(two_steps, keep=3)
    state = checkpointer.restore(setup.abstract_state)
    checkpointer.close()
    assert state is not None and int(state["step"]) == 12 and int(state["guard"]["seen"]) == 12
    expected = arrays_by_tensorstore(two_steps / "12" / "state")
    given = {name_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    assert given.keys() == expected.keys() and len(given) > 30
    for name, x in expected.items():
        assert given[name].dtype == x.dtype and given[name].shape == x.shape, name
        assert given[name].tobytes() == x.tobytes(), name
    sums = {name: float(np.abs(x).sum()) for name, x in given.items() if name.startswith("params.")}
    assert sum(sums.values()) == pytest.approx(SUM, rel=1e-6)
    batch = {"images": np.zeros((64, 8, 8, 1), np.uint8), "labels": np.zeros(64, np.int32)}
    state, metrics = setup.step(state, batch, jax.random.key(0))
    assert int(state["step"]) == 13 and np.isfinite(float(metrics["loss"])) and int(state["guard"]["seen"]) == 13


SUM = 442.256807314232  # by the code that wrote it
