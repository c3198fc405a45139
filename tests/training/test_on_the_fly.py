"""config.data.on_the_fly: training on images that the step encodes is the training on their stored tokens."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from rar_jax.errors import CheckpointError, ConfigError
from rar_jax.experiment import Experiment
from rar_jax.parallel.mesh import make_mesh
from rar_jax.programs.run import run_experiment
from rar_jax.runs.checkpoint import load_params, read_meta
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.tokenize import tokenize
from rar_jax.training.loop import train
from rar_jax.weights.stages import finished


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of ten classes of 12 grey pictures, of many sizes; 1 of each is held out."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(10):
        (root / f"class {label}").mkdir()
        for i in range(12):
            height, width = rng.integers(8, 20, 2)
            pixels = rng.integers(0, 256, (3, 3), np.uint8)
            image = Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.BICUBIC)
            image.save(root / f"class {label}" / f"{i}.png")
    return f"folder:{root}"


def trained(experiment: Experiment, folder: pathlib.Path) -> Workdir:
    """The tokenizer taken over, the tokens made where there are to be some, and the generator trained, saved each step."""
    recipe = dataclasses.replace(experiment.train, checkpoint_every=1, keep_checkpoints=9, log_every=1, eval_every=2)
    experiment = dataclasses.replace(experiment, train=recipe)
    workdir, mesh = Workdir(folder), make_mesh(experiment.mesh)
    train(experiment, "tokenizer", workdir, mesh, quiet=True)
    if not experiment.data.on_the_fly:
        for split in ("train", "heldout"):
            tokenize(experiment, workdir, mesh, split, quiet=True)
    train(experiment, "generator", workdir, mesh, quiet=True)
    return workdir


def told(workdir: Workdir) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir.path, "generator")]


def counted(pictures: str, crop: str) -> dict[str, Any]:
    return {"source": pictures, "num_classes": None, "train_records": None, "crop": crop}


@pytest.mark.parametrize("crop", [pytest.param("center", marks=pytest.mark.slow), "ten"])
def test_the_same_losses_and_parameters_as_from_stored_tokens(
    tiny: Any, pictures: str, tmp_path: pathlib.Path, crop: str
) -> None:
    """To the bit, on four devices, with dropout on; validation too."""
    stored = trained(tiny.experiment(**counted(pictures, crop)), tmp_path / "stored")
    direct = trained(tiny.experiment(**counted(pictures, crop), on_the_fly=True), tmp_path / "direct")
    assert stored.tokens("train").is_dir() and not (direct.path / "tokens").exists()
    rows = told(direct)
    assert rows == told(stored)
    assert {"validation/raster_bits", "validation/random_bits"} <= rows[-1].keys()
    assert len({row["loss"] for row in rows if "loss" in row}) == 4
    for step in (1, 4):
        ours, theirs = (load_params(w.checkpoints("generator"), step) for w in (direct, stored))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_resumed_is_the_same_to_the_bit(tiny: Any, pictures: str, tmp_path: pathlib.Path) -> None:
    """With random crops, which no store could hold. A checkpoint has neither the tokenizer nor tokens, but its hash."""
    experiment = tiny.experiment(**counted(pictures, "random"), on_the_fly=True)
    straight = trained(experiment, tmp_path / "straight")
    resumed = tmp_path / "resumed"
    shutil.copytree(straight.path, resumed)
    for step in (3, 4):
        shutil.rmtree(resumed / "checkpoints" / "generator" / str(step))
    rows = [row for row in read_metrics(resumed) if row["step"] <= 2]
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = trained(experiment, resumed)
    assert told(again) == told(straight) and told(again)[-1]["step"] == 4
    ours, theirs = (load_params(w.checkpoints("generator"), 4) for w in (again, straight))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    meta = read_meta(again.checkpoints("generator"), 4)
    assert meta["tokenizer_sha256"] == finished(experiment, "tokenizer", again) is not None
    center = trained(tiny.experiment(**counted(pictures, "center"), on_the_fly=True), tmp_path / "center")
    assert told(center)[0]["loss"] != told(straight)[0]["loss"]


def test_the_whole_run(tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tiny.experiment(on_the_fly=True)
    run_experiment(experiment, Workdir(tmp_path / "w"))
    out = capsys.readouterr().out
    assert "tokens: encoded on the fly, none are stored" in out and "generator: trained" in out
    assert f"  {tmp_path / 'w' / 'checkpoints'}\n" in out  # and no folder of tokens
    assert "1437 training images in 10 class(es): 0, 1, 2, 3, 4, ..." in out
    assert not (tmp_path / "w" / "tokens").exists()
    assert json.loads((tmp_path / "w" / "config.json").read_text())["data"]["on_the_fly"] is True
    run_experiment(experiment, Workdir(tmp_path / "w"))
    assert "generator: up to date, skipped" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"tokens": "a"}, {"tokens_heldout": "a"}, {"mix": (("a", 0.5), ("b", 0.5))}])
def test_images_and_tokens_exclude_each_other(tiny: Any, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=rf"config\.data: on_the_fly and {name} exclude each other: give one"):
        tiny.experiment(on_the_fly=True, **given)


def test_what_makes_no_sense_is_refused_before_anything_is_made(
    tiny: Any, pictures: str, tmp_path: pathlib.Path
) -> None:
    experiment, workdir = tiny.experiment(on_the_fly=True), Workdir(tmp_path / "w")
    mesh = make_mesh(experiment.mesh)
    with pytest.raises(ConfigError, match=r"data\.on_the_fly is set"):
        tokenize(experiment, workdir, mesh, "train", quiet=True)
    with pytest.raises(ConfigError, match=r"crop is 'random', but tokens are stored: set data\.on_the_fly=True"):
        run_experiment(tiny.experiment(**counted(pictures, "random")), workdir, quiet=True)
    with pytest.raises(CheckpointError, match="has no finished tokenizer"):
        train(experiment, "generator", workdir, mesh, quiet=True)
    assert not (tmp_path / "w").exists()
