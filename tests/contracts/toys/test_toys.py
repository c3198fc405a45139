"""The whole job of each toy system through the command line, on four fake devices that shard parameters and batches."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from commands import state_of
from PIL import Image

import rar_jax
from rar_jax.cli import main
from rar_jax.data.sources import load_source
from rar_jax.models import Model, encode_tokens, find_module
from rar_jax.parallel.arrays import make_global_batch
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import sharded
from rar_jax.runs import grids
from rar_jax.runs.checkpoint import load_params
from rar_jax.runs.ledger import read_ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.sections import Recipe
from rar_jax.tokens.store import TokenStore
from rar_jax.training.step import compile_training
from tests.contracts.toys import factorised, flow

TOYS = "tests.contracts.toys"
STEPS = {"tokenizer": 12, "classifier": 4, "generator": 12}
RECIPE = {"batch_size": 64, "log_every": 1, "eval_every": 6, "eval_records": 128, "checkpoint_every": 6}
EXPERIMENT = {
    "data": {"source": "digits", "image_size": 8, "channels": 1, "num_classes": 10, "train_records": 1437},
    "tokenizer_train": {"steps": STEPS["tokenizer"], "learning_rate": 2e-2, **RECIPE},
    "classifier": {
        "widths": [8, 8], "features": 8, "train": {"steps": STEPS["classifier"], "learning_rate": 3e-3, **RECIPE},
    },
    "train": {"steps": STEPS["generator"], "learning_rate": 3e-2, "ema_decay": 0.9, **RECIPE},
    "evaluate": {"samples": 40, "live_samples": 20, "live_grid": 2, "batch_size": 20, "grid_per_class": 2},
    "mesh": {"data": 1, "fsdp": 2, "tensor": 2},
}  # fmt: skip


class System(NamedTuple):
    """A pair of toys, what its token store keeps, and settings of its sampling."""

    tokenizer: str
    generator: str
    stored: tuple[Any, ...]
    sampling: dict[str, Any]


SYSTEMS = {
    "float": System("moments", "flow", ((4, 4, 4), "float16", None), {"scale": 1.5, "num_steps": 4}),
    "factorised": System("bits", "factorised", ((16, 2), "uint16", 4), {"scale": 2.0, "top_p": 0.9}),
}


class Job(NamedTuple):
    """A finished run of a system."""

    system: System
    experiment: str
    workdir: pathlib.Path

    def main(self, verb: str, *arguments: Any) -> int:
        """Run a verb on the work directory, with its experiment."""
        where = "--config", self.experiment, "--workdir", self.workdir, "--quiet"
        return main([verb, *map(str, (*where, *arguments))])


@pytest.fixture(scope="module", params=SYSTEMS)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    system, folder = SYSTEMS[request.param], tmp_path_factory.mktemp(request.param)
    models = {kind: {"name": f"{TOYS}.{getattr(system, kind)}"} for kind in ("tokenizer", "generator")}
    config = EXPERIMENT | models | {"sampling": system.sampling}
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config!r})\n"
    (folder / "toy.py").write_text(text)
    job = Job(system, str(folder / "toy.py"), folder / "run")
    assert job.main("run") == 0
    return job


def test_every_stage_learns(job: Job) -> None:
    for stage in ("tokenizer", "generator"):
        rows = read_metrics(job.workdir, stage)
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == STEPS[stage] and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
        validations = [row["validation/loss"] for row in rows if "validation/loss" in row]
        assert len(validations) == 2 and validations[1] < validations[0]
    result = json.loads((job.workdir / "result.json").read_text())
    assert result["fd_classifier"]["samples_n40"] > 0
    assert result["made_from"]["sampling"].items() >= job.system.sampling.items()
    assert any("fd_classifier_n20" in row for row in read_metrics(job.workdir, "generator"))
    assert job.main("evaluate") == 0


def test_the_store_keeps_what_encode_makes(job: Job) -> None:
    shape, dtype, vocab = job.system.stored
    store, source = TokenStore(job.workdir / "tokens" / "heldout"), load_source("digits", "heldout")
    assert (store.spec.shape, store.spec.dtype, store.spec.vocab) == (shape, dtype, vocab) and len(store) == 360
    module = find_module("tokenizers", f"{TOYS}.{job.system.tokenizer}")
    params = load_params(job.workdir / "checkpoints" / "tokenizer", STEPS["tokenizer"])
    rows, images = store.gather(np.arange(360))["tokens"], source.gather(np.arange(360))["images"]
    encoded = np.asarray(jax.jit(lambda x: module.encode(module.TINY, params, x))(images))
    if vocab is None:
        np.testing.assert_allclose(rows, encoded, rtol=2e-3, atol=2e-3)  # float16
    else:
        assert (rows == encoded).mean() > 0.999  # a near tie may fall the other way on four devices


def test_grids_and_samples_do_not_depend_on_the_mesh(job: Job, tmp_path: pathlib.Path) -> None:
    one = rar_jax.load(job.workdir)
    last = grids.load_grid(job.workdir / "grids" / "generator" / f"{STEPS['generator']}.png")
    drawn = one.sample(np.repeat(np.arange(10), 2), seed=0)
    assert differing(drawn, last.images.reshape(drawn.shape)) < 0.01
    kept = grids.load_grid(job.workdir / "grids" / "tokenizer" / f"{STEPS['tokenizer']}.png")
    assert differing(one.reconstruct(kept.images[0]), kept.images[1]) < 0.01
    arguments = ["--weights", job.workdir, "--tensor", 2, "--per-class", 2, "--out", tmp_path / "samples", "--quiet"]
    assert main(["sample", *map(str, arguments)]) == 0
    files = sorted((tmp_path / "samples").glob("0*.png"))
    assert differing(drawn[..., 0], np.stack([np.asarray(Image.open(path)) for path in files])) < 0.01


def differing(images: np.ndarray, others: np.ndarray) -> float:
    """Share of the pixels that differ by more than a rounding."""
    return float((np.abs(images.astype(int) - others) > 1).mean())


def test_training_does_not_depend_on_the_mesh(job: Job) -> None:
    module = find_module("generators", f"{TOYS}.{job.system.generator}")
    tokenizer = find_module("tokenizers", f"{TOYS}.{job.system.tokenizer}")
    draws = Model(tokenizer, tokenizer.TINY)
    store = TokenStore(job.workdir / "tokens" / "train")
    batch = {name: x for name, x in store.gather(np.arange(8)).items() if name in ("tokens", "labels")}
    found = []
    for sizes in ((1, 1, 1), (1, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        setup = compile_training(module, module.TINY, Recipe(steps=4, batch_size=8), mesh, draws)
        with sharded(mesh):
            state = setup.init(jax.random.key(0))
            for _ in range(3):
                state, metrics = setup.step(state, make_global_batch(batch, mesh), jax.random.key(1))
        found.append((float(metrics["loss"]), jax.device_get(state["params"])))
    (loss, params), (sharded_loss, sharded_params) = found
    assert sharded_loss == pytest.approx(loss, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), sharded_params, params)


def test_a_resumed_run_is_bitwise_the_same(
    job: Job, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again, last = job._replace(workdir=tmp_path / "run"), str(STEPS["generator"])
    shutil.copytree(job.workdir, again.workdir)
    shutil.rmtree(again.workdir / "checkpoints" / "generator" / last)
    (again.workdir / "result.json").unlink()
    assert main(["run", "--config", again.experiment, "--workdir", str(again.workdir)]) == 0
    said = capsys.readouterr().out
    assert "tokenizer: up to date, skipped" in said and "generator, validation loss" in said
    assert [row["step"] for row in read_ledger(again.workdir) if row["event"] == "stage"][-1] == 6
    states = [state_of(w, STEPS["generator"], "checkpoints/generator") for w in (job.workdir, again.workdir)]
    assert states[0] == states[1]
    results = [json.loads((w / "result.json").read_text())["fd_classifier"] for w in (job.workdir, again.workdir)]
    assert results[0] == results[1]


def test_tools_read_it(job: Job, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*words: Any, code: int = 0) -> str:
        assert main([*map(str, words), "--quiet"]) == code
        return "".join(capsys.readouterr())

    workdir, store = job.workdir, job.workdir / "tokens" / "train"
    assert "generator" in say("inspect", workdir)
    summary = json.loads(say("inspect", store, "--json"))
    counted = summary["latents" if job.system.stored[2] is None else "codes"]
    assert summary["num_records"] == 1437 and (counted["std"] > 0.1 if "std" in counted else counted["used"] == 4)
    picture_of = "--verify", store, "--weights", workdir, "--out", tmp_path / "v.png"
    assert "whole and undamaged" in say("tokenize", *picture_of)
    with Image.open(tmp_path / "v.png") as picture:
        assert len(picture.convert("L").getcolors(1 << 24)) > 10
    say("report", workdir, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"{TOYS}.{job.system.generator}" in page and "validation/loss" in page
    error = say("convert", "--weights", workdir, "--out", tmp_path / "x.safetensors", code=2)
    assert f"{TOYS}.{job.system.generator} has no released files" in error and error.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()


def test_a_mask_that_is_no_prefix(job: Job, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = load_source("digits", "heldout").gather(np.arange(1))["images"][0]
    mask = np.zeros((8, 8), bool)
    mask[2:6, 0:4] = mask[0:2, 6:] = True  # whole tokens of 2 x 2 pixels
    Image.fromarray(image[..., 0]).save(tmp_path / "image.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.png")

    def complete(name: str, *flags: str) -> int:
        words = [
            "--complete",
            tmp_path / "image.png",
            "--mask",
            tmp_path / "mask.png",
            "--out",
            tmp_path / name,
            *flags,
        ]
        words += ["--classes", "3,7", "--per-class", 2, "--quiet"]
        return main(["sample", "--weights", str(job.workdir), *map(str, words)])

    def read(name: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("0*.png"))])

    if job.system.generator != "flow":
        assert complete("none") == 2
        assert capsys.readouterr().err.strip().endswith(f"generator '{TOYS}.factorised' cannot complete images")
        return
    assert complete("pixels", "--keep-pixels") == complete("tokens") == 0
    pixels, tokens = read("pixels"), read("tokens")
    assert pixels.shape == (4, 8, 8) and (pixels[:, ~mask] == image[..., 0][None][:, ~mask]).all()
    assert len({drawn.tobytes() for drawn in pixels[:, mask]}) == 4
    pipeline = rar_jax.load(job.workdir)
    reconstructed = pipeline.reconstruct(image[None])[0, ..., 0]
    assert np.abs(tokens[:, ~mask].astype(int) - reconstructed[~mask][None]).max() <= 1
    known = pipeline.tokenizer.module.known_tokens(pipeline.tokenizer.config, ~mask)
    given = encode_tokens(pipeline.tokenizer, pipeline.tokenizer_params, image[None])
    drawn = pipeline.generator.module.complete(
        pipeline.generator.config, pipeline.generator_params, np.array([3]), keys=jax.random.key(0)[None],
        sampling=pipeline.sampling, tokens=given, known=known[None],
    )  # fmt: skip
    assert (np.asarray(drawn)[known[None]] == np.asarray(given)[known[None]]).all()
    assert (np.asarray(drawn)[~known[None]] != np.asarray(given)[~known[None]]).all()


def test_what_is_given_is_not_drawn() -> None:
    labels, keys = np.array([0, 1, 2]), jax.random.split(jax.random.key(5), 3)
    float_tokens = np.asarray(jax.random.normal(jax.random.key(1), (3, *flow.TINY.shape)))
    params, key = flow.init(flow.TINY, jax.random.key(0)), jax.random.key(2)
    noise = jax.vmap(lambda key: jax.random.normal(key, flow.TINY.shape))(keys)
    settings = {"keys": keys, "sampling": flow.Sampling(scale=2.0)}
    given = flow.sample(flow.TINY, params, labels, given={"noise": noise}, **settings | {"keys": keys[::-1]})
    np.testing.assert_array_equal(given, flow.sample(flow.TINY, params, labels, **settings))
    # At time 0 the network sees the noise alone: its mean squared error, written out.
    batch = {"tokens": float_tokens, "labels": labels, "times": np.zeros(3), "noise": noise}
    value, _ = flow.loss(flow.TINY, params, batch, key=key, train=False)
    predicted = flow.velocity(flow.TINY, params, noise, jax.numpy.zeros(3), labels)
    errors = np.asarray(predicted) - (float_tokens - np.asarray(noise))
    assert float(value) == pytest.approx(float(np.mean(errors**2)), rel=1e-5)


def test_sub_codes_are_drawn_from_their_logits() -> None:
    config, labels, keys = factorised.TINY, np.array([0, 1, 2]), jax.random.split(jax.random.key(5), 3)
    params = jax.tree.map(lambda x: 10 * x, factorised.init(config, jax.random.key(0)))
    greedy = factorised.Sampling(greedy=True)
    tokens = factorised.sample(config, params, labels, keys=keys, sampling=greedy)
    logits = factorised.logits(config, params, tokens, labels)
    assert logits.shape == (3, 16, 2, 4) and (np.asarray(logits).argmax(-1) == np.asarray(tokens)).all()
    uniforms = np.random.default_rng(0).random((3, 16, 2), np.float32)
    settings: dict[str, Any] = {"keys": keys, "sampling": factorised.Sampling(), "given": {"uniforms": uniforms}}
    drawn = factorised.sample(config, params, labels, **settings)
    sums = np.cumsum(jax.nn.softmax(factorised.logits(config, params, drawn, labels)), axis=-1)
    assert (np.argmax(sums > uniforms[..., None], axis=-1) == np.asarray(drawn)).all()
    one = factorised.sample(config, params, labels, keys=keys, sampling=factorised.Sampling(top_k=1))
    assert (np.asarray(one) == np.asarray(tokens)).all()
