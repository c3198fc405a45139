"""Curves while training, the score of every checkpoint, the best one marked and kept."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from rar_jax import cli, load
from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError, Preempted
from rar_jax.evaluation import image_batches
from rar_jax.evaluation.image_sets import open_image_set
from rar_jax.evaluation.program import Settings, open_program
from rar_jax.evaluation.results import format_steps
from rar_jax.evaluation.scores import make_reference
from rar_jax.evaluation.steps import score_steps
from rar_jax.experiment import resolve
from rar_jax.metrics import frechet
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.checkpoint import best_steps, good_steps, load_params, mark_best
from rar_jax.runs.logging import RunLogger, read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.training.live import make_live_evaluators, select_score

TINY = str(pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py")


@pytest.fixture
def reference(tmp_path: pathlib.Path, cheap: Any) -> pathlib.Path:
    """Statistics of the training digits."""
    path = tmp_path / "reference.npz"
    settings = Settings(batch_size=500)
    make_reference(open_program(pathlib.Path("inception"), settings), open_image_set("digits"), path, quiet=True)
    return path


@pytest.fixture
def trained(tmp_path: pathlib.Path, reference: pathlib.Path) -> pathlib.Path:
    """The tiny job with Inception's curves; 6 checkpoints, of which training keeps 2 and the best."""
    workdir = tmp_path / "run"
    overrides = [
        f"--config.evaluate.inception={tmp_path / 'inception'}", f"--config.evaluate.reference={reference}",
        "--config.train.eval_every=4", "--config.train.checkpoint_every=4", "--config.train.keep_best=True",
    ]  # fmt: skip
    assert cli.main(["run", "--config", TINY, "--workdir", str(workdir), "--quiet", *overrides]) == 0
    return workdir


def by_hand(cheap: Any, workdir: pathlib.Path, step: int, reference: pathlib.Path, n: int) -> float:
    """The distance of n samples of a checkpoint, by the pipeline and NumPy."""
    pipeline = load(workdir, step=step)
    images = pipeline.sample(np.arange(n) % 10, seed=0)
    features = np.asarray(cheap(None, images, resize="tf1")["pool3"], np.float64)
    given = np.load(reference)
    return frechet.frechet_distance(given["mu"], given["sigma"], features.mean(axis=0), np.cov(features, rowvar=False))


@pytest.mark.slow
def test_curves_retention_and_steps(
    trained: pathlib.Path, reference: pathlib.Path, cheap: Any, tmp_path: pathlib.Path
) -> None:
    # ---- curves, named with their n
    curve = {row["step"]: row["fid_n20"] for row in read_metrics(trained, "generator") if "fid_n20" in row}
    assert list(curve) == [4, 8, 12, 16, 20, 24]
    assert curve[24] == pytest.approx(by_hand(cheap, trained, 24, reference, 20), rel=1e-4)
    rows = [row for row in read_metrics(trained, "generator") if "inception_score_n20" in row]
    assert len(rows) == 6 and all(1 <= row["inception_score_n20"] <= 10 for row in rows)

    # ---- the newest two are kept, and the best
    folder = Workdir(trained).checkpoints("generator")
    best = min(curve, key=lambda step: curve[step])
    assert best_steps(folder)["fid_n20"] == {"step": best, "value": curve[best]}
    kept = sorted(step for step, _ in good_steps(folder))
    assert kept == sorted({20, 24, best})

    # ---- the report of the run
    result = json.loads((trained / "result.json").read_text())
    assert result["fid_n40"] == pytest.approx(by_hand(cheap, trained, 24, reference, 40), rel=1e-4)

    # ---- every checkpoint
    settings = Settings(batch_size=20, chunk=20)
    program = open_program(pathlib.Path("inception"), settings, reference_path=reference)
    told = score_steps(program, trained, tmp_path / "steps", steps="all", samples=40, quiet=True)
    assert list(told["steps"]) == kept
    expected = {step: by_hand(cheap, trained, step, reference, 40) for step in kept}
    # Another program may truncate a pixel of these 8 x 8 to the level below.
    assert {s: n["fid"] for s, n in told["steps"].items()} == pytest.approx(expected, rel=1e-4)
    assert told["best"] == min(expected, key=lambda step: expected[step])
    assert best_steps(folder)["evaluate/fid_n40"]["step"] == told["best"]
    assert " <- best" in format_steps(told)
    assert json.loads((tmp_path / "steps" / "steps.json").read_text())["best"] == told["best"]
    for step in kept:
        assert (tmp_path / "steps" / f"step_{step}" / "grid.png").is_file()
    for steps, message in (("3", "no good step 3; it has"), ("x", "write all, or numbers")):
        with pytest.raises(ConfigError, match=message):
            score_steps(program, trained, tmp_path / "no", steps=steps, samples=40)


def test_live_scores_ask_before_each_batch(
    tmp_path: pathlib.Path, reference: pathlib.Path, cheap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    arguments = ["run", "--config", TINY, "--workdir", str(workdir), "--quiet", "--config.evaluate.live_samples=0"]
    assert cli.main(arguments) == 0
    overrides = ["live_grid=0", "live_samples=50", "batch_size=20", "inception=inception", f"reference={reference}"]
    experiment = resolve(load_experiment(TINY, [f"evaluate.{text}" for text in overrides]), "tiny")
    params = load_params(Workdir(workdir).checkpoints("generator"), 24)
    told: dict[str, float] = {}
    reporter = RunLogger(tmp_path, "generator", total_steps=0, quiet=True)
    scorers = make_live_evaluators(experiment, "generator", Workdir(workdir), make_mesh(experiment.mesh), reporter)
    for scorer in scorers:
        scorer.compile(params)
    monkeypatch.setattr(image_batches, "sample_pixels", None)  # nothing is traced again
    monkeypatch.setattr(frechet, "frechet_distance_in_graph", None)
    for scorer in scorers:
        polls: list[None] = []
        told |= scorer.evaluate(params, 24, lambda polls=polls: polls.append(None))
        assert len(polls) == 3, "of 20, 20 and 10 images"

        def stop() -> None:
            raise Preempted

        with pytest.raises(Preempted):
            scorer.evaluate(params, 24, stop)
    assert told["fid_n50"] == pytest.approx(by_hand(cheap, workdir, 24, reference, 50), rel=1e-4)
    assert 1 <= told["inception_score_n50"] <= 10 and told["fd_classifier_n50"] > 0


def test_a_marked_step_outlives_newer_ones(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    arguments = ["run", "--config", TINY, "--workdir", str(workdir), "--quiet", "--config.train.checkpoint_every=4"]
    assert cli.main([*arguments, "--config.evaluate.live_samples=0", "--config.evaluate.samples=20"]) == 0
    folder = Workdir(workdir).checkpoints("generator")
    assert sorted(step for step, _ in good_steps(folder)) == [20, 24], "nothing was marked"
    mark_best(folder, 20, "fid_n50000", 3.0)
    mark_best(folder, 12, "is gone", 1.0)
    assert best_steps(folder) == {"fid_n50000": {"step": 20, "value": 3.0}}
    (folder / "best.json").write_text("{")
    assert best_steps(folder) == {}


def test_what_makes_a_checkpoint_the_best() -> None:
    told = {"validation/raster_loss": 2.0, "validation/random_loss": 1.0, "fd_classifier_n9": 3.0, "fid_n9": 4.0}
    assert select_score(told) == ("fid_n9", 4.0)
    assert select_score({k: v for k, v in told.items() if k != "fid_n9"}) == ("fd_classifier_n9", 3.0)
    assert select_score({"validation/psnr": 5.0, "validation/loss": 2.0}) == ("validation/loss", 2.0)
    assert select_score({}) is None


def test_a_reference_without_inception_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="reference needs inception"):
        resolve(load_experiment(TINY, ["evaluate.reference=r.npz"]), "tiny")
    experiment = resolve(
        load_experiment(TINY, ["evaluate.live_samples=0", "evaluate.live_grid=0", "evaluate.inception=i"]), "tiny"
    )
    reporter = RunLogger(tmp_path, "generator", total_steps=0, quiet=True)
    assert make_live_evaluators(experiment, "generator", Workdir(tmp_path), make_mesh(experiment.mesh), reporter) == []
