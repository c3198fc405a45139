"""What a generator is trained on: tokens of the work directory, of elsewhere, mixes; and what does not fit."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import numpy as np
import pytest

from rar_jax.cli import main
from rar_jax.data.mixing import MixedSource
from rar_jax.errors import ConfigError
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.manifest import file_sha256
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.store import TokenStore
from rar_jax.tokens.tokenize import tokenize
from rar_jax.tokens.writer import TokenStoreWriter
from rar_jax.training.loop import train
from rar_jax.training.objective import make_objective

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def workdir(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """With the tokenizer taken over, and its held-out tokens."""
    workdir, experiment = Workdir(tmp_path_factory.mktemp("work")), tiny.experiment()
    mesh = make_mesh(experiment.mesh)
    train(experiment, "tokenizer", workdir, mesh, quiet=True)
    tokenize(experiment, workdir, mesh, "heldout", quiet=True)
    return workdir


def test_a_work_directory_resumes_or_starts_again(tiny: Any, workdir: Workdir, tmp_path: pathlib.Path) -> None:
    folder, experiment = workdir.tokens("heldout"), tiny.experiment()
    mesh, good = make_mesh(experiment.mesh), contents(folder)
    card = json.loads(good["card.json"])
    assert card["tokenizer_sha256"] == file_sha256(tiny.weights)  # not the hash of this work directory's copy
    for name, change in (
        ("card.json", lambda path: path.unlink()),
        ("card.json", lambda path: path.write_text(path.read_text().replace("digits", "digots"))),
        ("shard-00000-of-00001.npy", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0")),
        ("making.json", lambda path: path.write_text("{")),
        ("shard-00099-of-00100.npy.77.tmp", lambda path: path.write_text("left by a kill")),
    ):
        change(folder / name)
        tokenize(experiment, workdir, mesh, "heldout", quiet=True)
        assert contents(folder) == good, name


def test_tokens_made_elsewhere(
    tiny: Any, workdir: Workdir, straight: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = tiny.experiment(tokens=str(straight))
    tokenize(experiment, workdir, make_mesh(experiment.mesh), "train", quiet=True)
    assert not workdir.tokens("train").exists()  # given, so not made
    objective = make_objective(experiment, "generator", workdir)
    assert isinstance(objective.train, TokenStore) and objective.train.folder == straight
    assert isinstance(objective.heldout, TokenStore) and objective.heldout.folder == workdir.tokens("heldout")
    both = make_objective(tiny.experiment(tokens=str(straight), tokens_heldout=str(straight)), "generator", workdir)
    assert isinstance(both.heldout, TokenStore) and both.heldout.folder == straight
    assert not caplog.records
    assert experiment.resolved()["data"]["tokens"] == str(straight)


def test_training_on_a_mix(tiny: Any, workdir: Workdir, straight: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """To the last step, on 3 parts of one store and 1 of another."""
    other = tmp_path / "other"
    tiny.make(other, split="train")
    mix = ((str(straight), 0.75), (str(other), 0.25))
    experiment = tiny.experiment(mix=mix)
    objective = make_objective(experiment, "generator", workdir)
    assert isinstance(objective.train, MixedSource) and objective.train.shares == (3, 1)
    assert [len(source) for source in objective.train.sources] == [360, 1437]
    assert experiment.resolved()["data"]["mix"] == [list(part) for part in mix]
    train(experiment, "generator", workdir, make_mesh(experiment.mesh), quiet=True)
    assert (workdir.checkpoints("generator") / "4" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"spec": {"shape": [20], "dtype": "uint16", "vocab": 32}},
            "holds 20 ids of 32 codes, config.tokenizer makes 16 ids of 32 codes: use tokens",
        ),
        ({"spec": {"shape": [16], "dtype": "uint16", "vocab": 64}}, "holds 16 ids of 64 codes, config.tokenizer makes"),
        ({"num_classes": 11, "class_names": list("abcdefghijk")}, "has 11 classes, the config 10"),
        ({"class_names": list("abcdefgxij")}, "calls class 7 'x', the config 'h'"),
        ({"tokenizer_sha256": "0" * 64}, r"made by the tokenizer with sha256 000000000000\.\.\., this run has"),
    ],
)
def test_a_card_that_does_not_fit(
    tiny: Any, workdir: Workdir, tmp_path: pathlib.Path, changes: dict[str, Any], problem: str
) -> None:
    card = tiny.card() | {"tokenizer_sha256": file_sha256(tiny.weights)} | changes
    writer = TokenStoreWriter(tmp_path / "s", card, source_records=3)
    with writer.shard(0) as shard:
        shard.append(np.zeros((3, *card["spec"]["shape"]), int), np.zeros(3, int), np.arange(3), np.zeros(3, int))
    writer.finish()
    experiment = tiny.experiment(tokens=str(tmp_path / "s"), class_names=tuple("abcdefghij"))
    with pytest.raises(ConfigError, match=problem) as error:
        make_objective(experiment, "generator", workdir)
    assert str(tmp_path / "s") in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_numbers_fit_any(tiny: Any, workdir: Workdir, straight: pathlib.Path) -> None:
    experiment = tiny.experiment(tokens=str(straight), class_names=tuple("abcdefghij"))
    assert len(make_objective(experiment, "generator", workdir).train) == 360


def test_an_unknown_tokenizer_is_warned_of_once(
    tiny: Any,
    workdir: Workdir,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out, file = tmp_path / "imported", tmp_path / "tokens.jsonl"
    assert main(["tokenize", "--export", str(straight), "--out", str(file), "--quiet"]) == 0
    what = ["--codebook-size", "32", "--num-classes", "10", "--config", str(TINY)]
    assert main(["tokenize", "--import", str(file), "--out", str(out), "--quiet", *what]) == 0
    with caplog.at_level(logging.WARNING):
        objective = make_objective(tiny.experiment(tokens=str(out)), "generator", workdir)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith(f"{out} does not name its tokenizer")
    rows, expected = (store.gather(np.arange(360)) for store in (objective.train, TokenStore(straight)))
    np.testing.assert_array_equal(rows["tokens"], expected["tokens"])
    np.testing.assert_array_equal(rows["labels"], expected["labels"])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"tokens": "a", "mix": (("b", 1.0),)}, "tokens and mix exclude each other"),
        ({"mix": (("a", 0.0),)}, "each must be positive"),
        ({"mix": (("a", 0.5, 3),)}, r"config\.data\.mix\[0\] is .*: it must have 2 entries"),
        ({"mix": ((0.5, "a"),)}, r"config\.data\.mix\[0\]\[0\] is 0\.5 \(float\): it must be str"),
    ],
)
def test_wrong_data_sections(tiny: Any, data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tiny.experiment(**data)
