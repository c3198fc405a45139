"""The main job, whole, at its smallest size, on four fake devices: outputs, skipping, refusals, and the public API."""

import json
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
import pytest
from events import pictures, read_events, scalars
from PIL import Image

import rar_jax
from rar_jax.cli import main
from rar_jax.errors import ConfigError
from rar_jax.metrics import frechet
from rar_jax.models import load_model
from rar_jax.networks import classifier
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.runs import grids
from rar_jax.runs.checkpoint import good_step, load_params
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.manifest import verify_manifest
from rar_jax.tokens.store import TokenStore

TINY = str(pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a relative work directory, as the README has
        assert main(["run", "--config", TINY, "--workdir", "tiny", "--quiet"]) == 0
    return folder / "tiny"


def test_everything_is_left_behind(workdir: pathlib.Path) -> None:
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        with Image.open(workdir / name) as image:
            assert image.width > 100 and len(image.convert("L").getcolors(1 << 24)) > 10  # not blank
    for stage, steps in (("tokenizer", 12), ("classifier", 8), ("generator", 24)):
        assert verify_manifest(workdir / "checkpoints" / stage / str(steps))
        assert list((workdir / "tensorboard" / stage).glob("events.*"))
    rows = read_metrics(workdir, "generator")
    assert [r["step"] for r in rows if "grad_norm" in r] == list(range(1, 25))
    ratio = {r["step"]: r["random_ratio"] for r in rows if "random_ratio" in r}
    assert ratio[1] == ratio[13] == 1.0 and ratio[16] == 0.5 and ratio[19] == ratio[24] == 0.0
    (last,) = (r for r in rows if "fd_classifier_n20" in r and r["step"] == 24)
    assert {"validation/raster_bits", "validation/random_bits"} <= last.keys()


def test_grids_are_what_the_weights_of_their_step_draw(workdir: pathlib.Path) -> None:
    """The sampler and tokenizer of the training, sharded, against the pipeline on the checkpoints; TensorBoard has the same."""
    from rar_jax.data.sources import load_source

    assert grids.list_grid_steps(workdir / "grids" / "tokenizer") == [6, 12]
    assert grids.list_grid_steps(workdir / "grids" / "generator") == [12, 24]
    pipeline = rar_jax.load(workdir)
    last = grids.load_grid(workdir / "grids" / "generator" / "24.png")
    assert last.rows == tuple("0123456789") and last.images.shape == (10, 4, 8, 8, 1)
    drawn = pipeline.sample(np.repeat(np.arange(10), 4), seed=0).reshape(last.images.shape)
    assert np.abs(last.images.astype(int) - drawn).max() <= 1  # a rounding may fall the other way on four devices
    kept = grids.load_grid(workdir / "grids" / "tokenizer" / "12.png")
    heldout = load_source("digits", "heldout").gather(np.linspace(0, 359, 12).astype(int))
    assert kept.columns == tuple(str(label) for label in heldout["labels"])
    np.testing.assert_array_equal(kept.images[0], heldout["images"])
    assert np.abs(kept.images[1].astype(int) - pipeline.reconstruct(heldout["images"])).max() <= 1
    for stage, name, step, grid in (("generator", "samples", 24, last), ("tokenizer", "reconstructions", 12, kept)):
        shown = pictures(read_events(workdir / "tensorboard" / stage))[name, step]
        np.testing.assert_array_equal(shown[::6, ::6], grid.sheet().repeat(3, axis=-1))


def test_tensorboard_has_the_scores_and_pictures_of_the_end(workdir: pathlib.Path) -> None:
    events, result = (
        read_events(workdir / "tensorboard" / "evaluate"),
        json.loads((workdir / "result.json").read_text()),
    )
    told = scalars(events)
    assert told["fd_classifier/samples_n40", 24] == pytest.approx(result["fd_classifier"]["samples_n40"], rel=1e-6)
    assert told["asked_class_share_n40", 24] == pytest.approx(result["asked_class_share_n40"], rel=1e-6)
    with Image.open(workdir / "samples.png") as image:
        np.testing.assert_array_equal(pictures(events)["samples", 24], np.asarray(image.convert("RGB")))
    assert not read_metrics(workdir, "evaluate"), "numbers of the end are no curve"


def test_result_names_what_made_it(workdir: pathlib.Path) -> None:
    result = json.loads((workdir / "result.json").read_text())
    for stage in ("tokenizer", "classifier", "generator"):
        good = good_step(workdir / "checkpoints" / stage)
        assert good is not None and result["made_from"]["weights"][stage] == good[1]
    assert result["made_on"]["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    distances = result["fd_classifier"]
    assert distances["samples_n40"] == pytest.approx(distances["samples_n40_in_graph_float32"], abs=1e-3)


def test_distance_and_share_by_hand(workdir: pathlib.Path) -> None:
    """The in-graph, sharded, streamed numbers against plain NumPy on the images that the pipeline draws."""
    result = json.loads((workdir / "result.json").read_text())
    config = json.loads((workdir / "config.json").read_text())
    labels = np.arange(40) % 10
    images = rar_jax.load(workdir).sample(labels, seed=0)
    params = load_params(workdir / "checkpoints" / "classifier", 8)
    sections = {k: tuple(v) if isinstance(v, list) else v for k, v in config["classifier"].items()}
    network = classifier.Config(**sections)
    from rar_jax.data.sources import load_source

    train = load_source("digits", "train").gather(np.arange(1437))["images"]
    ours, theirs = (classifier.features(network, params, x) for x in (images, train))
    a, b = (np.asarray(x["features"], np.float64) for x in (ours, theirs))
    by_hand = frechet.frechet_distance(b.mean(0), np.cov(b.T), a.mean(0), np.cov(a.T))
    assert result["fd_classifier"]["samples_n40"] == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
    share = (np.asarray(ours["logits"]).argmax(-1) == labels).mean()
    assert result["asked_class_share_n40"] == pytest.approx(share)
    flat, known = (x.reshape(len(x), -1) / 255.0 for x in (images, train))
    nearest = np.sqrt(((flat[:, None] - known[None]) ** 2).mean(-1)).min(1).mean()
    assert result["nearest_training_image_rms"]["samples_n40"] == pytest.approx(nearest, abs=1e-4)


def test_tokens_are_the_images(workdir: pathlib.Path) -> None:
    config = json.loads((workdir / "config.json").read_text())
    tokenizer = load_model(config, "tokenizers")
    params = load_params(workdir / "checkpoints" / "tokenizer", 12)
    from rar_jax.data.sources import load_source

    for split, count in (("train", 1437), ("heldout", 360)):
        store, source = TokenStore(workdir / "tokens" / split), load_source("digits", split)
        assert len(store) == len(source) == count
        rows, images = store.gather(np.arange(count)), source.gather(np.arange(count))
        np.testing.assert_array_equal(rows["labels"], images["labels"])
        np.testing.assert_array_equal(rows["ids"], images["ids"])
        encoded = jax.jit(lambda x: tokenizer.module.encode(tokenizer.config, params, x))(images["images"])
        assert (
            np.asarray(encoded) == rows["tokens"]
        ).mean() > 0.999  # a near tie may fall the other way on four devices


def test_the_same_command_does_nothing(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, Any]:
        skip = {"config.json", "ledger.jsonl"}  # every start is written down
        return {str(p): p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name not in skip}

    before = state()
    assert main(["run", "--config", TINY, "--workdir", str(workdir)]) == 0
    assert state() == before
    out = capsys.readouterr().out
    assert "generator: up to date, skipped" in out and "fd_classifier" in out and "Try next" in out


def test_new_sampling_settings_score_again_without_training(workdir: pathlib.Path) -> None:
    before = json.loads((workdir / "result.json").read_text())
    assert (
        main(["run", "--config", TINY, "--workdir", str(workdir), "--quiet", "--config.sampling.temperature=0.5"]) == 0
    )
    after = json.loads((workdir / "result.json").read_text())
    assert after["made_from"]["weights"] == before["made_from"]["weights"]
    assert after["made_from"]["sampling"]["temperature"] == 0.5
    assert after["fd_classifier"]["samples_n40"] != before["fd_classifier"]["samples_n40"]
    assert main(["run", "--config", TINY, "--workdir", str(workdir), "--quiet"]) == 0
    again = json.loads((workdir / "result.json").read_text())
    assert again["fd_classifier"] == before["fd_classifier"]


def test_another_config_is_refused(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["run", "--config", TINY, "--workdir", str(workdir), "--config.generator.dropout=0.2"]
    assert main(args) == 2
    assert "generator.dropout: 0.1 -> 0.2" in capsys.readouterr().err


def test_pipeline(workdir: pathlib.Path) -> None:
    pipeline = rar_jax.load(workdir)
    labels = [3, 1, 4, 1, 5]
    images = pipeline.sample(labels, seed=0)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    # Image i is a function of (seed, i, label): not of the batch size, nor of the mesh.
    np.testing.assert_array_equal(pipeline.sample(labels, seed=0, batch_size=2), images)
    on_four = rar_jax.load(workdir, mesh=make_mesh(MeshConfig(data=2, fsdp=2)))
    np.testing.assert_array_equal(on_four.sample(labels, seed=0), images)
    assert (pipeline.sample(labels, seed=1) != images).any()
    guided = pipeline.sample(labels, seed=0, scale=8.0)
    assert (guided != images).any()
    # Inside a program of one's own, with the weights as an argument.
    root = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"sample"))  # keys.py, written out
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(np.arange(5))
    ours = jax.jit(pipeline.sample_fn)(pipeline.params, np.asarray(labels), keys, pipeline.sampling)
    np.testing.assert_array_equal(ours, images)
    with pytest.raises(ConfigError, match=r"label 10 is outside the classes 0\.\.9"):
        pipeline.sample([10])
    for misuse in ({"labels": [3.9]}, {"labels": [3], "skale": 2.0}, {"labels": [3], "batch_size": 0}):
        with pytest.raises(ConfigError):
            pipeline.sample(**misuse)  # pyright: ignore
    with pytest.raises(ConfigError, match="seed is 1099511627776"):
        pipeline.sample([3], seed=2**40)
    with pytest.raises(ConfigError, match="dtype is 'bf16'"):
        rar_jax.load(workdir, dtype="bf16")
    low = rar_jax.load(workdir, dtype="bfloat16")
    kernels = low.generator_params["layers"][0]["mlp"]
    assert kernels["fc1"]["kernel"].dtype == "bfloat16"
    assert low.sample([1]).shape == (1, 8, 8, 1)


def test_sample_verb(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "pictures"
    args = ["sample", "--weights", str(workdir), "--classes", "3,7-8", "--per-class", "2", "--out", str(out)]
    args[4] = "3,7-8,3"  # a class named twice is drawn once
    assert main([*args, "--sampling.scale=2", "--sampling.power=1", "--quiet"]) == 0
    assert len(list(out.glob("0*.png"))) == 6 and (out / "grid.png").is_file()
    expected = rar_jax.load(workdir).sample([3, 3, 7, 7, 8, 8], scale=2, power=1.0)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "0007_001.png")), expected[3, ..., 0])


def test_stages_alone(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--config", TINY, "--workdir", str(tmp_path / "w"), "--quiet"]
    assert main(["tokenize", *where]) == 2
    assert "is not a work directory" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    assert main(["train", *where]) == 1
    assert "rar-jax tokenize" in capsys.readouterr().err
    assert main(["tokenize", *where]) == 1
    assert "no finished tokenizer" in capsys.readouterr().err
    assert main(["evaluate", *where]) == 1
    assert main(["train", "--stage", "tokenizer", *where]) == 0
    assert main(["tokenize", *where]) == 0
    assert len(TokenStore(tmp_path / "w" / "tokens" / "heldout")) == 360
