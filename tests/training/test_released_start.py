"""A run that starts from released files: the tokenizer is taken over, the generator fine-tuned, nothing judged."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import rar_jax
from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment, resolve
from rar_jax.generators import rar as generator
from rar_jax.parallel.mesh import make_mesh
from rar_jax.programs.run import run_experiment
from rar_jax.runs.checkpoint import load_params, read_meta
from rar_jax.runs.manifest import file_sha256
from rar_jax.runs.workdir import Workdir
from rar_jax.training.loop import train
from rar_jax.training.objective import start_from
from rar_jax.training.step import compile_training
from rar_jax.weights import maskgit_vq, rar

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"


@pytest.fixture(scope="module")
def files(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A tokenizer of 8x8 grey images with 32 codes on 4x4 tokens, and a generator of other classes on another grid."""
    folder = tmp_path_factory.mktemp("files")
    other = dataclasses.replace(generator.TINY, num_tokens=9, num_classes=4)
    params = generator.init(other, jax.random.key(1))
    rar.save(folder / "rar.safetensors", other, jax.tree.map(lambda x: x + 0.05, params))
    return {"tokenizer": tiny.weights, "generator": folder / "rar.safetensors"}


def experiment_from(files: dict[str, pathlib.Path], *overrides: str) -> Experiment:
    config: ConfigDict = load_experiment(
        str(TINY), ["train.steps=4", "train.warmup=1", "train.checkpoint_every=1", *overrides]
    )
    with config.unlocked():
        del config["tokenizer_train"], config["classifier"]
        config.tokenizer = {k: v for k, v in config.tokenizer.items() if not k.startswith("restart")}
        config.tokenizer.weights = str(files["tokenizer"])
        config.init_from = str(files["generator"])
    return resolve(config, "tiny")


def test_the_whole_run(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, workdir = experiment_from(files), Workdir(tmp_path / "w")
    run_experiment(experiment, workdir)
    out = capsys.readouterr().out
    assert f"M parameters, from {files['tokenizer']}" in out and "tokenizer: copied from" in out
    assert "fd_classifier" not in out and "classifier" not in out
    _, expected = maskgit_vq.load(files["tokenizer"], image_size=8)
    assert jax.tree.all(jax.tree.map(np.array_equal, load_params(workdir.checkpoints("tokenizer"), 0), expected))
    for stage, step in (("tokenizer", 0), ("generator", 4)):
        meta = read_meta(workdir.checkpoints(stage), step)
        made_from = meta["made_from"] if stage == "tokenizer" else meta["init_from"]
        assert made_from == {"path": str(files[stage]), "sha256": file_sha256(files[stage])}
    assert json.loads(workdir.result.read_text())["last_validation"]["generator"]["validation/raster_bits"] > 0
    assert (workdir.path / "samples.png").is_file()
    assert rar_jax.load(workdir.path).sample([1, 2]).shape == (2, 8, 8, 1)
    run_experiment(experiment, workdir)  # again: nothing to do
    assert "tokenizer: up to date, skipped" in capsys.readouterr().out


def test_the_first_step_starts_from_the_weights(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """The learning rate of update 0 is 0, so that what step 1 saved are the weights themselves, made to fit."""
    workdir = Workdir(tmp_path / "w")
    experiment = experiment_from(files, "train.keep_checkpoints=5")
    run_experiment(experiment, workdir, quiet=True)
    other_config, other = rar.load(files["generator"])
    ours = load_params(workdir.checkpoints("generator"), 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours["transformer"], other["transformer"]))
    codes = experiment.generator.config.codebook_size + 1
    np.testing.assert_array_equal(ours["embeddings"][:codes], other["embeddings"][:codes])
    np.testing.assert_array_equal(ours["embeddings"][-1], other["embeddings"][-1])
    assert ours["embeddings"].shape[0] == codes + 10 + 1 and other_config.num_classes == 4
    assert ours["pos_embed"].shape[0] == 16 + 2 and np.array_equal(ours["pos_embed"][:2], other["pos_embed"][:2])
    last = load_params(workdir.checkpoints("generator"), 4)
    assert not np.array_equal(
        last["transformer"]["blocks"]["mlp"]["fc1"]["kernel"], ours["transformer"]["blocks"]["mlp"]["fc1"]["kernel"]
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_an_ema_lies_as_the_parameters(files: dict[str, pathlib.Path], devices: int) -> None:
    """What takes the one is compiled once for both."""
    experiment = experiment_from(files, f"mesh.fsdp={devices}", "train.ema_decay=0.9")
    mesh, recipe = make_mesh(experiment.mesh, jax.devices()[:devices]), experiment.recipe("generator")
    assert recipe is not None
    setup = compile_training(experiment.generator.module, experiment.generator.config, recipe, mesh)
    state, _ = start_from(experiment, setup.init(jax.random.key(0)), setup, mesh)
    assert devices == 1 or not all(x.is_fully_replicated for x in jax.tree.leaves(state["params"]))
    same = jax.tree.map(
        lambda x, ema: bool(x.sharding == ema.sharding and (x == ema).all()), state["params"], state["ema"]
    )
    assert jax.tree.all(same)


def test_a_tokenizer_of_another_size(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    experiment = experiment_from(files, "tokenizer.base_width=16")
    with pytest.raises(
        ConfigError, match=r"vq\.safetensors has other parameters than config\.tokenizer: .*base_width: 8 -> 16"
    ):
        train(experiment, "tokenizer", Workdir(tmp_path), make_mesh(experiment.mesh), quiet=True)


def test_weights_of_another_width(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    experiment = experiment_from(files, "generator.width=64")
    with pytest.raises(ConfigError, match=r"init_from has width 32, config\.generator\.width is 64"):
        run_experiment(experiment, Workdir(tmp_path / "w"), quiet=True)
    assert not (tmp_path / "w").exists(), "found before anything is made"


def test_there_is_no_classifier_to_train(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    experiment = experiment_from(files)
    with pytest.raises(ConfigError, match="tiny has no classifier section"):
        train(experiment, "classifier", Workdir(tmp_path), make_mesh(experiment.mesh), quiet=True)
    assert not (tmp_path / "checkpoints").exists()


def test_a_tokenizer_where_a_generator_should_be(files: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    experiment = dataclasses.replace(experiment_from(files), init_from=str(files["tokenizer"]))
    with pytest.raises(ValueError, match=r"is a tokenizer \(maskgit_vq\), not a generator"):
        run_experiment(experiment, Workdir(tmp_path / "w"), quiet=True)
    assert not (tmp_path / "w").exists()
