"""From a folder of somebody's images to samples: nothing is counted by hand, and a folder that changed is refused."""

from __future__ import annotations

import json
import logging
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rar_jax
from rar_jax.cli import main
from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment, open_source, resolve
from rar_jax.runs.checkpoint import load_params, read_meta
from rar_jax.runs.manifest import file_sha256
from rar_jax.tokens.store import TokenStore
from rar_jax.weights import rar

TINY_MODELS = (
    "data.image_size=16", "tokenizer.image_size=16", "tokenizer.width_multipliers=(1,2)", "tokenizer.base_width=8",
    "tokenizer.blocks_per_level=1", "tokenizer.latent_width=8", "tokenizer.codebook_size=32",
    "generator.num_tokens=64", "generator.codebook_size=32", "generator.width=32", "generator.depth=2",
    "generator.num_heads=4", "generator.mlp_width=64", "train.steps=4", "train.warmup=1", "train.batch_size=8",
    "train.checkpoint_every=1", "train.keep_checkpoints=9", "evaluate.grid_per_class=2", "precision=float32",
)  # fmt: skip
FROM_ZERO = (*TINY_MODELS, "tokenizer_train.steps=2", "tokenizer_train.batch_size=8", "tokenizer_train.warmup=1")


def picture(path: pathlib.Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 3, 3), np.uint8)
    Image.fromarray(pixels).resize((20 + seed % 9, 30), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def images(tmp_path: pathlib.Path) -> pathlib.Path:
    """7 beaches, 5 cats and 6 trees, of which 1 each is held out: 15 are trained on."""
    root = tmp_path / "images"
    for label, (name, count) in enumerate({"beach": 7, "cat": 5, "tree": 6}.items()):
        for i in range(count):
            picture(root / name / f"{i}.png", 10 * label + i)
    return root


def command(name: str, images: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> list[str]:
    words = [f"--config.{override}" for override in (f"data.source=folder:{images}", *overrides)]
    return ["run", "--config", name, "--workdir", str(workdir), *words]


def resolved(source: str, *overrides: str, name: str = "my_images") -> Experiment:
    return resolve(load_experiment(name, [f"data.source={source}", *overrides]), name)


# ---------------------------------------------------------------- the two ways


@pytest.mark.slow
def test_from_zero_to_samples(images: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command("my_images", images, tmp_path / "w", *FROM_ZERO)
    assert main(words) == 0
    assert "15 training images in 3 class(es): beach, cat, tree" in capsys.readouterr().out
    data = json.loads((tmp_path / "w" / "config.json").read_text())["data"]
    assert (data["num_classes"], data["train_records"], data["class_names"]) == (3, 15, ["beach", "cat", "tree"])
    with Image.open(tmp_path / "w" / "samples.png") as image:
        assert image.width > 32 and len(image.convert("RGB").getcolors(1 << 24)) > 10
    pipeline = rar_jax.load(tmp_path / "w")
    assert pipeline.class_names == ("beach", "cat", "tree") and pipeline.sample([0, 2]).shape == (2, 16, 16, 3)
    capsys.readouterr()

    assert main(words) == 0
    assert "generator: up to date, skipped" in capsys.readouterr().out
    picture(images / "cat" / "another.png", 99)
    assert main(words) == 2
    assert re.search(
        "was begun with other images of folder:.*: train_records 15 -> 16. Bring back what it held then, or choose",
        capsys.readouterr().err,
    )


def test_from_released_weights(
    released_pair: Any, images: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one class. All is taken over but the rows of the classes: the learning rate of the first update is 0."""
    weights = (f"tokenizer.weights={released_pair.tokenizer}", f"init_from={released_pair.generator}")
    assert main(command("my_images_rar_b", images / "beach", tmp_path / "w", *TINY_MODELS, *weights)) == 0
    out = capsys.readouterr().out
    assert "6 training images in 1 class(es): beach" in out and "--classes 0 --per" in out and ".sample([0], s" in out
    folder = tmp_path / "w" / "checkpoints" / "generator"
    assert read_meta(folder, 4)["init_from"]["sha256"] == file_sha256(released_pair.generator)
    _, released = rar.load(released_pair.generator)
    ours, codes = load_params(folder, 1), 32 + 1
    assert ours["embeddings"].shape[0] == codes + 1 + 1 and released["embeddings"].shape[0] == codes + 10 + 1
    np.testing.assert_array_equal(ours["embeddings"][:codes], released["embeddings"][:codes])
    np.testing.assert_array_equal(ours["embeddings"][-1], released["embeddings"][-1])
    np.testing.assert_array_equal(ours["pos_embed"], released["pos_embed"])
    # The experiment makes tokens of ten crops of each image, before the training; epochs are of images.
    stores = {split: TokenStore(tmp_path / "w" / "tokens" / split) for split in ("train", "heldout")}
    assert {split: len(store) for split, store in stores.items()} == {"train": 60, "heldout": 10}
    assert len(stores["train"].card["crops"]) == 10 and (tmp_path / "w" / "samples.png").is_file()


def test_tokens_of_images_that_the_experiment_does_not_name(
    released_pair: Any, images: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--source stands for config.data.source, where classes are counted."""
    words = ["tokenize", "--config", "my_images", "--source", f"folder:{images}", "--out", str(tmp_path / "store")]
    words += ["--weights", str(released_pair.tokenizer), "--quiet", *(f"--config.{x}" for x in TINY_MODELS)]
    assert main(words) == 0, capsys.readouterr().err
    store = TokenStore(tmp_path / "store")
    assert len(store) == 15 and store.card["class_names"] == ["beach", "cat", "tree"]


# ---------------------------------------------------------------- counting


def test_images_without_classes_are_one(tmp_path: pathlib.Path) -> None:
    for i in range(40):
        picture(tmp_path / "holiday" / f"{i}.png", i)
    experiment = resolved(f"folder:{tmp_path / 'holiday'}")
    data = experiment.data
    assert (data.num_classes, data.train_records, data.class_names) == (1, 38, ("holiday",))
    assert experiment.generator.config.num_classes == 1
    assert len(open_source(experiment, "train")) == 38 and len(open_source(experiment, "heldout")) == 2


def test_what_is_given_is_not_counted(images: pathlib.Path) -> None:
    source = f"folder:{images}"
    assert resolved(source, "data.class_names=('a','b','c')").data.class_names == ("a", "b", "c")
    numbered = resolved(source, "data.num_classes=3").data  # as before: who gives the number gets numbers for names
    assert (numbered.class_names, numbered.train_records) == (("0", "1", "2"), 15)
    ten = resolved(source, "data.crop=ten")
    assert ten.data.train_records == 15 and len(open_source(ten, "train")) == 150
    everything = ("data.num_classes=7", "data.train_records=9")
    assert resolved("folder:nowhere", *everything).data.num_classes == 7  # the source is not even opened
    with pytest.raises(ConfigError, match=r"has 3 classes, config\.data\.num_classes is 7"):
        open_source(resolved(source, *everything), "train")


def test_durations_in_epochs_are_of_what_was_counted(images: pathlib.Path) -> None:
    assert resolved(f"folder:{images}", "train.steps=64ep", "train.batch_size=8").train.steps == 64 * 15 // 8


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.class_names=('a',)"], "config.data: class_names has 1 names for 3 classes"),
        (["data.imagesize=8"], "config.data has no key 'imagesize'. Did you mean 'image_size'?"),
        (["data.image_size=big"], "config.data.image_size is 'big' (str): it must be int"),
        (["data.crop=middle"], "config.data: no crop 'middle': one of pad, center, ten, random."),
        (["generator.num_classes=4"], "generator.num_classes is 4, data.num_classes is 3: make them equal"),
        (["data.source=folder:/no/such"], "folder:/no/such: no such folder"),
    ],
)
def test_what_cannot_be_is_refused(images: pathlib.Path, overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        resolved(f"folder:{images}", *overrides)


def test_without_a_source() -> None:
    with pytest.raises(ConfigError, match=r"config\.data lacks source: .*--config\.data\.source="):
        resolve(load_experiment("my_images"), "my_images")


def test_what_is_passed_over_is_told(images: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "cat" / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert resolved(f"folder:{images}").data.train_records == 15
    (told,) = (record.getMessage() for record in caplog.records)
    assert told == f"folder:{images}: 1 file(s) skipped, the first: cat/notes.txt: not an image by its suffix"
