"""Score a finished run, draw its pictures, and write result.json."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from rar_jax.config import flatten, to_dict
from rar_jax.evaluation.fd_classifier import score_with_classifier
from rar_jax.evaluation.program import Settings, open_program
from rar_jax.evaluation.results import list_numbers
from rar_jax.evaluation.scores import score_samples
from rar_jax.experiment import Experiment, open_source
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.pipeline import Pipeline, load
from rar_jax.runs.grids import pick_evenly
from rar_jax.runs.logging import RunLogger, read_metrics
from rar_jax.runs.machine import describe_machine
from rar_jax.runs.manifest import write_json
from rar_jax.runs.pictures import plot_curves, save_image_grid, save_image_pairs
from rar_jax.runs.workdir import Workdir
from rar_jax.weights.stages import finished

PICTURES = ("samples.png", "reconstructions.png", "curves.png")
# Lines of the summary: stage, its validation metric, text.
_VALIDATION = (
    ("tokenizer", "psnr", "tokenizer, validation PSNR in dB"),
    ("tokenizer", "codebook_usage", "tokenizer, codebook usage"),
    ("tokenizer", "perplexity", "tokenizer, perplexity of the codes"),
    ("generator", "loss", "generator, validation loss"),
    ("generator", "raster_bits", "generator, bits per token, raster order"),
    ("generator", "random_bits", "generator, bits per token, random order"),
)


def score_run(experiment: Experiment, workdir: Workdir, mesh: Mesh, *, quiet: bool = False) -> dict[str, Any]:
    """Return result.json of a run whose stages are finished; make it unless it is up to date."""
    made_from = {
        "experiment": experiment.name,
        "weights": {stage: finished(experiment, stage, workdir) for stage in experiment.stages},
        "sampling": to_dict(experiment.sampling),
        "evaluate": to_dict(experiment.evaluate),
        "seed": experiment.seed,
        "rounding": "truncate",
    }
    result = from_main(lambda: _read_result(workdir, made_from))
    if result is None:
        metrics = score_with_classifier(experiment, workdir, mesh, quiet=quiet) if experiment.classifier else {}
        metrics |= _score_with_inception(experiment, workdir, quiet) if experiment.evaluate.inception else {}
        draw_pictures(experiment, workdir, load(workdir.path, mesh=mesh))
        _log_scores(experiment, workdir, metrics)
        # The classifier takes the images as they are. Samples are drawn in float32, whatever the training computed in.
        protocol = {"protocol": "none", "features": "float32", "generator_dtype": "float32"}
        made_on = {"mesh": dict(mesh.shape), **protocol, **describe_machine()}
        more = {"last_validation": _last_validations(workdir), "made_from": made_from, "made_on": made_on}
        from_main(lambda: write_json(workdir.result, metrics | more))
        result = from_main(lambda: _read_result(workdir, made_from))
    assert result is not None
    return result


def _read_result(workdir: Workdir, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Read result.json if it was made from these inputs and the pictures exist."""
    try:
        result = json.loads(workdir.result.read_text())
    except (FileNotFoundError, ValueError):
        return None
    complete = all((workdir.path / name).is_file() for name in PICTURES)
    return result if complete and result.get("made_from") == made_from else None


def _score_with_inception(experiment: Experiment, workdir: Workdir, quiet: bool) -> dict[str, Any]:
    """Score samples as `rar-jax evaluate --workdir` does, into WORKDIR/evaluation."""
    config = experiment.evaluate
    assert config.inception is not None
    settings = Settings(seed=experiment.seed, batch_size=config.batch_size)
    reference_path = pathlib.Path(config.reference) if config.reference else None
    where = {"reference_path": reference_path, "chunks": workdir.chunks}
    program = open_program(pathlib.Path(config.inception), settings, **where)
    how = {"samples": config.samples, "sampling": to_dict(experiment.sampling), "quiet": quiet}
    result = score_samples(program, workdir.path, workdir.path / "evaluation", **how)
    return {f"{k}_n{config.samples}": v for k, v in list_numbers(result).items()}


def _last_validations(workdir: Workdir) -> dict[str, dict[str, Any]]:
    last = {row["stage"]: row for row in read_metrics(workdir.path) if any(k.startswith("validation/") for k in row)}
    return {stage: {k: v for k, v in row.items() if k not in ("stage", "time")} for stage, row in last.items()}


def draw_pictures(experiment: Experiment, workdir: Workdir, pipeline: Pipeline) -> None:
    """Draw samples.png (a row per class), reconstructions.png (validation images) and curves.png.

    All processes draw the images; process 0 writes the pictures.
    """
    data, columns = experiment.data, experiment.evaluate.grid_per_class
    shown = pick_evenly(data.num_classes, experiment.evaluate.grid_classes)
    images = pipeline.sample(np.repeat(shown, columns), seed=experiment.seed)
    heldout = open_source(experiment, "heldout")
    originals = heldout.gather(np.arange(min(24, len(heldout))))["images"]
    reconstructed = pipeline.reconstruct(originals)
    if not is_main():
        return
    names = [data.class_names[label].split(",")[0] for label in shown]
    save_image_grid(images, names, workdir.path / "samples.png", title=f"{experiment.name}: samples by class")
    save_image_pairs(originals, reconstructed, workdir.path / "reconstructions.png")
    plot_curves(read_metrics(workdir.path), workdir.path / "curves.png")


def _log_scores(experiment: Experiment, workdir: Workdir, metrics: dict[str, Any]) -> None:
    """Log the final scores and pictures to TensorBoard and Weights & Biases, at the generator's last step."""
    numbers = {name.replace(".", "/"): x for name, x in flatten(metrics).items() if isinstance(x, float)}
    step = experiment.last_step("generator")
    with RunLogger(workdir.path, "evaluate", total_steps=0, quiet=True, wandb=experiment.wandb) as logger:
        logger.write_scalars(step, {name: x for name, x in numbers.items() if math.isfinite(x)})
        for name in PICTURES if is_main() else ():
            picture = np.asarray(Image.open(workdir.path / name).convert("RGB"))
            logger.write_image(step, name.removesuffix(".png"), picture)


def describe_result(experiment: Experiment, workdir: Workdir, result: dict[str, Any], seconds: float) -> str:
    """Return the text at the end of a run: scores, files, and what to try next."""
    distances = dict(result.get("fd_classifier", {}))
    lines = [""]
    if distances:
        reference = distances.pop("reference")
        lines.append(f"fd_classifier (Frechet distance on classifier features to {reference}; not FID)")
        lines += [f"  {name:36} {value:9.3f}" for name, value in distances.items()]
    rows = [(name, x) for name, x in result.items()]
    rows += [(f"nearest training image, {name}", x) for name, x in result.get("nearest_training_image_rms", {}).items()]
    validations = result["last_validation"]
    rows += [(text, validations.get(stage, {}).get(f"validation/{name}")) for stage, name, text in _VALIDATION]
    lines += [f"{name:38} {x:9.3f}" for name, x in rows if isinstance(x, float)]
    path, some = workdir.root, list(range(min(3, experiment.data.num_classes)))
    classes = ",".join(map(str, some))
    return "\n".join(
        [
            *lines,
            "",
            f"Everything is in {path}, after {seconds:.0f} s:",
            f"  {path / 'samples.png'}, reconstructions.png, curves.png, result.json, metrics.jsonl",
            "  " + ", ".join(str(path / name) for name in ("checkpoints", "tokens") if (path / name).is_dir()),
            f"  tensorboard --logdir {path / 'tensorboard'}    (after pip install tensorboard)",
            "Try next:",
            f"  rar-jax sample --weights {path} --classes {classes} --per-class 8 --seed 1 --out {path / 'more'}",
            f"  python -c \"import rar_jax; print(rar_jax.load('{path}').sample({some}, seed=0).shape)\"",
        ]
    )
