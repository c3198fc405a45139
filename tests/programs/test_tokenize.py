"""Images to tokens, once: what a killed run goes on with, what two processes make, what training accepts."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rar_jax.cli import main
from rar_jax.config import ConfigError, load_experiment
from rar_jax.data.mixing import MixedSource
from rar_jax.data.sources import ArraySource, load_source
from rar_jax.data.token_store import StoreError, TokenStore, card_sha256
from rar_jax.data.token_writer import TokenStoreWriter
from rar_jax.interop import maskgit_vq
from rar_jax.parallel.mesh import make_mesh
from rar_jax.programs import tokenize as program
from rar_jax.programs.experiment import Experiment, resolve
from rar_jax.programs.tokenize import tokenize, tokenize_source, write_store
from rar_jax.programs.train import make_objective, train
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.training.checkpoint import file_sha256
from rar_jax.training.workdir import Workdir

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "experiments" / "tiny.py"
VQ = tokenizer.Config(
    image_size=8,
    channels=1,
    base_width=8,
    width_multipliers=(1, 2),
    blocks_per_level=1,
    latent_width=8,
    codebook_size=32,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tokenizer of the digits on 4x4 tokens of 32 codes, random weights."""
    path = tmp_path_factory.mktemp("weights") / "vq.bin"
    maskgit_vq.save(path, VQ, tokenizer.init(VQ, jax.random.key(0)))
    return path


@pytest.fixture(scope="module")
def straight(weights: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The held-out digits, tokenized without an interruption. Not to be written to."""
    out = tmp_path_factory.mktemp("straight") / "store"
    assert make(weights, out)
    return out


def experiment_of(weights: pathlib.Path, **data: Any) -> Experiment:
    config: ConfigDict = load_experiment(str(TINY), ["train.steps=4", "train.warmup=1"])
    with config.unlocked():
        del config["tokenizer_train"], config["classifier"]
        config.tokenizer = {k: v for k, v in config.tokenizer.items() if not k.startswith("restart")}
        config.tokenizer.weights = str(weights)
        config.data = {**config.data, **data}
    return resolve(config, "tiny")


def make(weights: pathlib.Path, out: pathlib.Path, **changes: Any) -> bool:
    experiment = experiment_of(weights)
    keywords = {"source": "digits", "split": "heldout", "shard_records": 50, "batch_size": 16, "quiet": True, **changes}
    return tokenize_source(experiment, make_mesh(experiment.mesh), weights=str(weights), out=out, **keywords)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- the store


def test_tokens_are_the_images(weights: pathlib.Path, straight: pathlib.Path) -> None:
    store, source = TokenStore(straight), load_source("digits", "heldout")
    store.verify()
    images = source.gather(np.arange(360))
    rows = store.gather(np.arange(360))
    np.testing.assert_array_equal(rows["labels"], images["labels"])
    np.testing.assert_array_equal(rows["ids"], images["ids"])
    expected = np.asarray(tokenizer.encode(VQ, maskgit_vq.load(weights, image_size=8)[1], images["images"]))
    assert (rows["tokens"] == expected).mean() > 0.999  # a near tie may fall the other way on four devices
    assert len(np.unique(expected)) > 4
    card = store.card
    assert card["tokenizer_sha256"] == file_sha256(weights)
    assert (card["num_records"], card["num_images"], card["num_bad_images"]) == (360, 360, 0)
    assert card["records_per_class"] == np.bincount(images["labels"]).tolist()
    assert (card["crops"], card["grid"], card["codebook_size"]) == (["whole image"], [16], 32)
    assert [shard["span"] for shard in card["shards"]] == [[k, min(k + 50, 360)] for k in range(0, 360, 50)]


@pytest.mark.parametrize("at", [0, 3, 8, 15, 17])
def test_killed_and_resumed_is_the_same_to_the_bit(
    at: int, weights: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the k-th rename of 18: making.json, eight shards and what stands beside them, the card."""
    renamed: list[str] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if len(renamed) == at:
            raise RuntimeError("killed")
        renamed.append(pathlib.Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RuntimeError, match="killed"):
        make(weights, tmp_path / "s")
    assert len(renamed) == at
    monkeypatch.undo()
    encoded: list[int] = []
    gather = program.sequential_batches
    monkeypatch.setattr(
        program, "sequential_batches", lambda *a, **k: encoded.append(len(k["spans"])) or gather(*a, **k)
    )
    assert make(weights, tmp_path / "s")
    whole = sum(name.endswith(".json") and name.startswith("shard") for name in renamed)
    assert encoded == [8 - whole]  # the shards that were whole are not made again
    assert contents(tmp_path / "s") == contents(straight)


def test_processes_make_the_store_of_one(
    weights: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert not make(weights, out, process_index=0, process_count=2, quiet=False)
    assert "process 0 finishes the store" in capsys.readouterr().out
    assert sorted(p.name for p in out.glob("*.npy")) == [f"shard-0000{j}-of-00008.npy" for j in (0, 2, 4, 6)]
    assert not make(weights, out, process_index=1, process_count=2)
    assert make(weights, out, process_index=0, process_count=2)
    assert contents(out) == contents(straight)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    weights: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.iterdir()}
    assert make(weights, straight)
    with pytest.raises(StoreError, match=r"holds a finished store of something else \(source: digits \(heldout\)"):
        make(weights, straight, split="train")
    other = tmp_path / "other.bin"
    maskgit_vq.save(other, VQ, tokenizer.init(VQ, jax.random.key(9)))
    with pytest.raises(StoreError, match=r"something else \(tokenizer_sha256: "):
        make(other, straight)
    assert {p: p.stat().st_mtime_ns for p in straight.iterdir()} == before
    TokenStoreWriter(tmp_path / "begun", {**TokenStore(straight).card, "source": "x"}, source_records=360)
    with pytest.raises(StoreError, match="holds the beginning of another store"):
        make(weights, tmp_path / "begun")


class TenOfSome(ArraySource):
    """Ten "crops" of each of 20 images; images 3 and 11 could not be decoded, and the next image stands in."""

    crop = "ten"
    problems = (("img3.jpg", "truncated"), ("img11.jpg", "no JPEG"))

    def __len__(self) -> int:
        return 200

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        image = indices // 10
        bad = np.isin(image, [3, 11])
        rows = super().gather(image + bad)
        rows["images"] = (
            np.roll(rows["images"], 1, axis=1) * (indices % 10 > 4)[:, None, None, None] + rows["images"] // 2
        )
        return {**rows, "crops": (indices % 10).astype(np.int16), "bad": bad}


def test_crops_and_bad_images(
    weights: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 records 20 are left out and counted; the others are all there, with image and crop."""
    digits = load_source("digits", "heldout").gather(np.arange(30))
    source = TenOfSome(digits["images"], digits["labels"], class_names=[str(i) for i in range(10)])
    monkeypatch.setattr(program, "load_source", lambda *_, **__: source)
    assert make(weights, tmp_path / "s", shard_records=34, quiet=False)
    out = capsys.readouterr().out
    assert "2 images could not be decoded" in out and "img3.jpg: truncated" in out and "images" in out
    store = TokenStore(tmp_path / "s")
    store.verify()
    records = np.concatenate([np.load(tmp_path / "s" / shard["name"]) for shard in store.card["shards"]])
    expected = [(image, crop) for image in range(20) for crop in range(10) if image not in (3, 11)]
    assert list(zip(records["source_id"].tolist(), records["crop"].tolist(), strict=True)) == expected
    card = store.card
    assert [card[f"num_{k}"] for k in ("records", "images", "bad_records", "bad_images")] == [180, 18, 20, 2]
    assert [i for s in card["shards"] for i in s["bad_records"]] == [*range(30, 40), *range(110, 120)]
    assert len(card["crops"]) == 10 and card["records_per_crop"] == {str(k): 18 for k in range(10)}
    images = source.gather(np.array([10 * image + crop for image, crop in expected]))["images"]
    tokens = np.asarray(tokenizer.encode(VQ, maskgit_vq.load(weights, image_size=8)[1], images))
    assert (tokens == records["tokens"]).mean() > 0.999


def test_random_crops_are_refused(
    weights: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source("digits", "heldout")
    monkeypatch.setattr(source, "crop", "random", raising=False)
    monkeypatch.setattr(program, "load_source", lambda *_, **__: source)
    with pytest.raises(ConfigError, match="tokens are made once, random crops cannot be"):
        make(weights, tmp_path / "s")


def test_batches_do_not_reach_over_a_shard(weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The encoder of this test gives away its batch: the sum of its images. Shards of 50 in batches of 16."""
    source = load_source("digits", "heldout")

    class Telltale:
        @staticmethod
        def encode(_: Any, params: Any, images: jax.Array) -> jax.Array:
            return jax.numpy.broadcast_to(images.astype("int32").sum() % 32 + params, (len(images), 16))

    from rar_jax.sampling.sampler import Model

    mesh = make_mesh(experiment_of(weights).mesh)
    card = a_card()
    writer = TokenStoreWriter(tmp_path / "s", card, source_records=360, shard_records=50)
    assert write_store(writer, source, Model(Telltale, None), np.int32(0), mesh, batch_size=16, quiet=True)  # pyright: ignore
    tokens = TokenStore(tmp_path / "s").gather(np.arange(360))["tokens"][:, 0]
    images = source.gather(np.arange(360))["images"].astype(np.int64)
    for begin in range(0, 360, 50):
        end = min(begin + 50, 360)
        for at in range(begin, end, 16):
            last = min(at + 16, end)
            filled = images[at:last].sum() + (16 - (last - at)) * images[0].sum()
            np.testing.assert_array_equal(tokens[at:last], filled % 32)


def a_card() -> dict[str, Any]:
    return {
        "codebook_size": 32,
        "grid": [16],
        "num_classes": 10,
        "class_names": [str(i) for i in range(10)],
        "crops": ["whole image"],
        "source": "digits",
        "tokenizer_sha256": None,
    }


# ---------------------------------------------------------------- the real command


def test_kill_9_of_the_command(weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.py").write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('t', {str(TINY)!r})\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "def get_config():\n    c = m.get_config()\n    c.tokenizer.restart_every = 0\n    return c\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    # A cache, so that the second and third start do not compile again.
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(out: pathlib.Path) -> subprocess.Popen[str]:
        what = ["--config", str(tmp_path / "c.py"), "--source", "digits", "--weights", str(weights), "--out", str(out)]
        command = [sys.executable, "-m", "rar_jax", "tokenize", *what, "--shard-records", "10", "--batch-size", "2"]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(out: pathlib.Path) -> str:
        process = start(out)
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told
        return told

    killed = tmp_path / "killed"
    process = start(killed)
    deadline = time.monotonic() + 300
    while len(list(killed.glob("shard-*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "card.json").exists()
    there = {p.name: p.stat().st_mtime_ns for p in killed.glob("shard-*.npy")}
    assert 5 <= len(there) < 144
    finish(killed)
    assert "1437" in finish(tmp_path / "straight").replace(",", "")
    assert contents(killed) == contents(tmp_path / "straight")
    TokenStore(killed).verify()
    # All but the one that may have been cut off between its two renames were kept.
    assert sum((killed / name).stat().st_mtime_ns == when for name, when in there.items()) >= len(there) - 1


# ---------------------------------------------------------------- training on it


@pytest.fixture(scope="module")
def workdir(weights: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """With the tokenizer taken over, and its held-out tokens."""
    workdir, experiment = Workdir(tmp_path_factory.mktemp("work")), experiment_of(weights)
    mesh = make_mesh(experiment.mesh)
    train(experiment, "tokenizer", workdir, mesh, quiet=True)
    tokenize(experiment, workdir, mesh, "heldout", quiet=True)
    return workdir


def test_a_work_directory_goes_on_or_starts_anew(
    weights: pathlib.Path, workdir: Workdir, tmp_path: pathlib.Path
) -> None:
    folder, experiment = workdir.tokens("heldout"), experiment_of(weights)
    mesh, good = make_mesh(experiment.mesh), contents(folder)
    card = json.loads(good["card.json"])
    assert card["tokenizer_sha256"] == file_sha256(weights)  # not the hash of this work directory's copy
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
    weights: pathlib.Path, workdir: Workdir, straight: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = experiment_of(weights, tokens=str(straight))
    tokenize(experiment, workdir, make_mesh(experiment.mesh), "train", quiet=True)
    assert not workdir.tokens("train").exists()  # given, so not made
    objective = make_objective(experiment, "generator", workdir)
    assert isinstance(objective.train, TokenStore) and objective.train.folder == straight
    assert isinstance(objective.heldout, TokenStore) and objective.heldout.folder == workdir.tokens("heldout")
    both = make_objective(
        experiment_of(weights, tokens=str(straight), tokens_heldout=str(straight)), "generator", workdir
    )
    assert isinstance(both.heldout, TokenStore) and both.heldout.folder == straight
    assert not caplog.records
    assert "tokens" not in experiment_of(weights).resolved()["data"]  # directories of earlier versions are not refused
    assert experiment.resolved()["data"]["tokens"] == str(straight)


def test_training_on_a_mix(
    weights: pathlib.Path, workdir: Workdir, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """To the last step, on 3 parts of one store and 1 of another."""
    other = tmp_path / "other"
    make(weights, other, split="train")
    mix = ((str(straight), 0.75), (str(other), 0.25))
    experiment = experiment_of(weights, mix=mix)
    objective = make_objective(experiment, "generator", workdir)
    assert isinstance(objective.train, MixedSource) and objective.train.shares == (3, 1)
    assert [len(source) for source in objective.train.sources] == [360, 1437]
    assert experiment.resolved()["data"]["mix"] == [list(part) for part in mix]
    train(experiment, "generator", workdir, make_mesh(experiment.mesh), quiet=True)
    assert (workdir.checkpoints("generator") / "4" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"grid": [4, 5]}, r"has 20 tokens an image \(grid\), the config 16: use tokens"),
        ({"codebook_size": 64}, r"has 64 codes \(codebook_size\), the config 32"),
        ({"num_classes": 11, "class_names": list("abcdefghijk")}, "has 11 classes, the config 10"),
        ({"class_names": list("abcdefgxij")}, "calls class 7 'x', the config 'h'"),
        ({"tokenizer_sha256": "0" * 64}, r"made by the tokenizer with sha256 000000000000\.\.\., this run has"),
    ],
)
def test_a_card_that_does_not_fit(
    weights: pathlib.Path, workdir: Workdir, tmp_path: pathlib.Path, changes: dict[str, Any], problem: str
) -> None:
    card = a_card() | {"tokenizer_sha256": file_sha256(weights)} | changes
    writer = TokenStoreWriter(tmp_path / "s", card, source_records=3)
    with writer.shard(0) as shard:
        shard.append(np.zeros((3, int(np.prod(card["grid"]))), int), np.zeros(3, int), np.arange(3), np.zeros(3, int))
    writer.finish()
    experiment = experiment_of(weights, tokens=str(tmp_path / "s"), class_names=tuple("abcdefghij"))
    with pytest.raises(ConfigError, match=problem) as error:
        make_objective(experiment, "generator", workdir)
    assert str(tmp_path / "s") in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_numbers_fit_any(weights: pathlib.Path, workdir: Workdir, straight: pathlib.Path) -> None:
    experiment = experiment_of(weights, tokens=str(straight), class_names=tuple("abcdefghij"))
    assert len(make_objective(experiment, "generator", workdir).train) == 360


def test_an_unknown_tokenizer_is_told_once(
    weights: pathlib.Path,
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
        objective = make_objective(experiment_of(weights, tokens=str(out)), "generator", workdir)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith(f"{out} does not say which tokenizer made it")
    rows, expected = (store.gather(np.arange(360)) for store in (objective.train, TokenStore(straight)))
    np.testing.assert_array_equal(rows["tokens"], expected["tokens"])
    np.testing.assert_array_equal(rows["labels"], expected["labels"])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"tokens": "a", "mix": (("b", 1.0),)}, "tokens and mix both say"),
        ({"mix": (("a", 0.0),)}, "each must be positive"),
        ({"mix": (("a", 0.5, 3),)}, r"config\.data\.mix\[0\] is .*: it must have 2 entries"),
        ({"mix": ((0.5, "a"),)}, r"config\.data\.mix\[0\]\[0\] is 0\.5 \(float\): it must be str"),
    ],
)
def test_wrong_data_sections(weights: pathlib.Path, data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        experiment_of(weights, **data)


def test_old_card_of_a_directory_is_kept(weights: pathlib.Path, workdir: Workdir) -> None:
    """A work directory of before: schema 1, and the hash of its own checkpoint."""
    from rar_jax.programs.stages import finished

    folder, experiment = workdir.tokens("heldout"), experiment_of(weights)
    new = contents(folder)
    card = json.loads(new["card.json"])
    old = {k: card[k] for k in ("codebook_size", "grid", "num_classes", "class_names", "crops", "source", "dtype")}
    old |= {"schema_version": 1, "num_records": 360, "num_tokens": 16}
    old["shards"] = [{k: shard[k] for k in ("name", "records", "sha256")} for shard in card["shards"]]
    old["tokenizer_sha256"] = finished(experiment, "tokenizer", workdir)
    (folder / "card.json").write_text(json.dumps(old))
    tokenize(experiment, workdir, make_mesh(experiment.mesh), "heldout", quiet=True)
    assert json.loads((folder / "card.json").read_text()) == old
    (folder / "card.json").write_bytes(new["card.json"])
    assert card_sha256(card) == card["sha256"] and re.fullmatch("[0-9a-f]{64}", card["sha256"])
