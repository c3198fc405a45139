"""Checkpoints that rot are found; those of older versions open; those of any topology are gone on with."""

from __future__ import annotations

import logging
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import jax
import numpy as np
import pytest
from commands import TINY, environment

from rar_jax.config import load_experiment
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.programs.experiment import resolve
from rar_jax.programs.train import compile_training
from rar_jax.training import guard
from rar_jax.training.checkpoint import Checkpointer, good_step

OLD = sorted((pathlib.Path(__file__).parents[1] / "golden" / "checkpoints").glob("*.tar.gz"))


@pytest.fixture
def two_steps(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of checkpoints with a good step 11 and the old step 12."""
    with tarfile.open(OLD[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(tmp_path / "12", tmp_path / "11")
    return tmp_path


@pytest.mark.promise(
    5, "a random bit flipped in each file of a checkpoint in turn: found, the file named, the step before used"
)
def test_fifty_flipped_bits(two_steps: pathlib.Path, caplog: pytest.LogCaptureFixture, record_property: Any) -> None:
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
        with caplog.at_level(logging.WARNING, logger="rar_jax.training.checkpoint"):
            good = good_step(two_steps)
        found += good is not None and good[0] == 11 and str(path) in caplog.text
        path.write_bytes(whole)
    assert found == trials
    good = good_step(two_steps)
    assert good is not None and good[0] == 12
    record_property("count", f"{found} of {trials} flips")


@pytest.mark.promise(
    13, "a checkpoint kept from before the train state had a guard: restored to the bit, and trained on"
)
def test_an_old_checkpoint_opens(two_steps: pathlib.Path) -> None:
    experiment = resolve(load_experiment(str(TINY)), "tiny")
    model, recipe = experiment.model("tokenizer"), experiment.recipe("tokenizer")
    assert recipe is not None
    mesh = make_mesh(MeshConfig())
    setup = compile_training(model.module, model.config, recipe, mesh)
    checkpointer = Checkpointer(two_steps, keep=3)
    state = checkpointer.restore(setup.abstract_state, added={"guard": guard.init()})
    checkpointer.close()
    assert state is not None and int(state["step"]) == 12 and int(state["guard"]["seen"]) == 0
    sums = {
        jax.tree_util.keystr(p): float(np.abs(x).sum()) for p, x in jax.tree_util.tree_leaves_with_path(state["params"])
    }
    assert sum(sums.values()) == pytest.approx(SUM, rel=1e-6)
    batch = {"images": np.zeros((64, 8, 8, 1), np.uint8), "labels": np.zeros(64, np.int32)}
    state, metrics = setup.step(state, batch, jax.random.key(0))
    assert int(state["step"]) == 13 and np.isfinite(float(metrics["loss"])) and int(state["guard"]["seen"]) == 1


SUM = 2130.7880317918025  # read by the code that wrote it

TOPOLOGIES = """
import pathlib, sys
import jax, numpy as np
from rar_jax.generators import rar
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, sharded
from rar_jax.programs.train import compile_training
from rar_jax.training.checkpoint import Checkpointer
from rar_jax.training.recipe import Recipe

recipe, folder = Recipe(steps=10, batch_size=8, ema_decay=0.9), pathlib.Path(sys.argv[1])
config = rar.TINY
rng = np.random.default_rng(0)
tokens = rng.integers(0, config.codebook_size, (8, config.num_tokens)).astype(np.int32)
labels = rng.integers(0, config.num_classes, 8).astype(np.int32)
losses, before = [], None
for sizes in ((8, 1, 1), (1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 4, 1)):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(MeshConfig(*sizes), devices)
    setup = compile_training(rar, config, recipe, mesh)
    batch = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in (("tokens", tokens), ("labels", labels))}
    checkpointer = Checkpointer(folder, keep=2)
    state = checkpointer.restore(setup.abstract_state)
    with sharded(mesh):
        if state is None:
            state, _ = setup.step(setup.init(jax.random.key(0)), batch, jax.random.key(1))
            checkpointer.save(1, state, {})
        checkpointer.close()
        now = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
        assert before is None or now == before, sizes
        before = now
        losses.append(float(setup.step(state, batch, jax.random.key(1))[1]["loss"]))
assert max(abs(x - losses[0]) for x in losses) <= 1e-6 * losses[0], losses
print(len(losses), losses[0])
"""


@pytest.mark.slow
@pytest.mark.promise(3, "saved on 8 devices; restored on 1, 2, 4 and (2, 4): bitwise, next loss within 1e-6")
def test_saved_on_eight(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOPOLOGIES, str(tmp_path / "c")],
        env=environment(8),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and done.stdout.startswith("5 "), done.stderr[-3000:]
