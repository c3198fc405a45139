"""The whole job: tokenizer, classifier, tokens, generator, evaluation, pictures. A stage whose verified output exists is
skipped, so the same command again resumes or does nothing."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from PIL import Image

from rar_jax.config import flatten, require, steps_fields
from rar_jax.evaluation.fd_classifier import score_with_classifier
from rar_jax.evaluation.program import Settings, open_program
from rar_jax.evaluation.scores import score_samples
from rar_jax.experiment import Experiment, open_source
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.pipeline import Pipeline, load
from rar_jax.runs.grids import pick_evenly
from rar_jax.runs.logging import RunLogger, read_metrics
from rar_jax.runs.machine import describe_machine
from rar_jax.runs.manifest import write_json
from rar_jax.runs.pictures import plot_curves, save_image_grid, save_image_pairs
from rar_jax.runs.session import Session, open_session
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.tokenize import tokenize
from rar_jax.training.loop import train
from rar_jax.weights.stages import check_start, finished

PICTURES = ("samples.png", "reconstructions.png", "curves.png")


def run(experiment: Experiment, workdir: Workdir, *, quiet: bool = False) -> None:
    """Does or resumes the whole job of an experiment in a work directory.

    Raises: ConfigError if the directory belongs to another experiment, LeaseError if another run writes to it, and whatever a
      stage raises.
    """
    data = experiment.data
    require(
        data.crop != "random" or data.on_the_fly or bool(data.given_tokens("train")),
        "data.crop is 'random', but tokens are made once: set data.on_the_fly=True, or another crop",
    )
    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    check_start(experiment, workdir)
    with open_session(workdir, "run", lambda: workdir.claim(experiment.resolved())) as around:
        _run(experiment, workdir, mesh, around, quiet)


def _run(experiment: Experiment, workdir: Workdir, mesh: Mesh, around: Session, quiet: bool) -> None:
    data = experiment.data

    def say(text: str) -> None:
        if not quiet and is_main():
            print(text, flush=True)  # a log that is followed

    say(headline(experiment, workdir, mesh))
    began = time.monotonic()

    # ---- weights and tokens
    for stage in experiment.stages[:-1]:
        _stage(experiment, stage, workdir, mesh, say, quiet, around)
    if data.on_the_fly:
        say("tokens: encoded on the fly, none are stored")
    else:
        for split in ("train", "heldout"):
            tokenize(experiment, workdir, mesh, split, quiet=quiet)
            around.ledger.lap("tokenizing")
            around.ledger.row("tokenized", split=split)
    _stage(experiment, "generator", workdir, mesh, say, quiet, around)

    # ---- what came of it
    inputs = _inputs(experiment, workdir)
    if from_main(lambda: _result_of(workdir, inputs)) is None:
        metrics = score_with_classifier(experiment, workdir, mesh, quiet=quiet) if experiment.classifier else {}
        metrics |= _inception_scores(experiment, workdir, quiet) if experiment.evaluate.inception else {}
        pipeline = load(workdir.path, mesh=mesh)
        draw_pictures(experiment, workdir, pipeline)
        _tell_writers(experiment, workdir, metrics)
        made = {"made_from": inputs, "made_on": _where(mesh)}
        from_main(lambda: write_json(workdir.result, {**metrics, "last_validation": _trained(workdir), **made}))
    around.ledger.lap("evaluating")
    result = from_main(lambda: _result_of(workdir, inputs))
    assert result is not None
    say(_closing(experiment, workdir, result, time.monotonic() - began))


def _stage(
    experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh, say: Any, quiet: bool, around: Session
) -> None:
    if finished(experiment, stage, workdir):
        say(f"{stage}: done before")
        return
    began = time.monotonic()
    train(experiment, stage, workdir, mesh, quiet=quiet, session=around)
    how = "trained" if experiment.recipe(stage) else f"taken over from {experiment.tokenizer_weights}"
    say(f"{stage}: {how} in {time.monotonic() - began:.0f} s")


def _trained(workdir: Workdir) -> dict[str, dict[str, Any]]:
    """The last validation of each stage."""
    last = {row["stage"]: row for row in read_metrics(workdir.path) if any(k.startswith("validation/") for k in row)}
    return {stage: {k: v for k, v in row.items() if k not in ("stage", "time")} for stage, row in last.items()}


def _inception_scores(experiment: Experiment, workdir: Workdir, quiet: bool) -> dict[str, Any]:
    """What `rar-jax evaluate --workdir` would give; all of it is in WORKDIR/evaluation/result.json."""
    config = experiment.evaluate
    assert config.inception is not None
    settings = Settings(seed=experiment.seed, batch_size=config.batch_size)
    reference_path = pathlib.Path(config.reference) if config.reference else None
    program = open_program(pathlib.Path(config.inception), settings, reference_path=reference_path)
    out, guidance = workdir.path / "evaluation", experiment.guidance
    result = score_samples(program, workdir.path, out, samples=config.samples, guidance=guidance, quiet=quiet)
    return {f"{k}_n{config.samples}": v for k, v in result.items() if isinstance(v, float) and k != "seconds"}


def draw_pictures(experiment: Experiment, workdir: Workdir, pipeline: Pipeline) -> None:
    """samples.png (a row a class), reconstructions.png (held-out images and what the tokenizer keeps), curves.png.

    All processes draw the images, process 0 the pictures.
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


def _tell_writers(experiment: Experiment, workdir: Workdir, metrics: dict[str, Any]) -> None:
    """The scores and pictures of the end, for TensorBoard and Weights & Biases, at the generator's last step."""
    numbers = {name.replace(".", "/"): x for name, x in flatten(metrics).items() if isinstance(x, float)}
    step = experiment.last_step("generator")
    with RunLogger(workdir.path, "evaluate", total_steps=0, quiet=True, wandb=experiment.wandb) as reporter:
        reporter.write_scalars(step, {name: x for name, x in numbers.items() if math.isfinite(x)})
        if is_main():
            for name in PICTURES:
                picture = np.asarray(Image.open(workdir.path / name).convert("RGB"))
                reporter.write_image(step, name.removesuffix(".png"), picture)


def _inputs(experiment: Experiment, workdir: Workdir) -> dict[str, Any]:
    """Everything that a result depends on, besides the machine."""
    resolved = experiment.resolved()
    return {
        "experiment": experiment.name,
        "weights": {stage: finished(experiment, stage, workdir) for stage in experiment.stages},
        "guidance": resolved["guidance"],
        "evaluate": resolved["evaluate"],
        "seed": experiment.seed,
        "rounding": "truncate",
    }


def _result_of(workdir: Workdir, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """result.json if it was made from these inputs and the pictures are there."""
    try:
        result = json.loads(workdir.result.read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = all((workdir.path / name).is_file() for name in PICTURES)
    return result if whole and result.get("made_from") == inputs else None


def _where(mesh: Mesh) -> dict[str, Any]:
    # The classifier takes the images as they are, and samples are drawn in float32 whatever the training computed in.
    made = {"protocol": "none", "features": "float32", "generator_dtype": "float32"}
    return {"mesh": dict(mesh.shape), **made, **describe_machine()}


def headline(experiment: Experiment, workdir: Workdir, mesh: Mesh) -> str:
    """What will be done, with every duration resolved to steps."""
    axes = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    lines = [f"{experiment.name} in {workdir.path} on {mesh.size} {jax.default_backend()} device(s): {axes}"]
    names = [name.split(",")[0] for name in experiment.data.class_names]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    lines.append(f"  {'data':10} {experiment.data.train_records} training images in {len(names)} class(es): {shown}")
    for stage in experiment.stages:
        recipe, model = experiment.recipe(stage), experiment.model(stage)
        shapes = jax.eval_shape(functools.partial(model.module.init, model.config), jax.random.key(0))
        millions = parameter_overview.count_parameters(shapes) / 1e6
        if recipe is None:
            lines.append(f"  {stage:10} {millions:.2f} M parameters, from {experiment.tokenizer_weights}")
            continue
        durations = [(f, getattr(recipe, f)) for f in ("warmup", "eval_every", "checkpoint_every")]
        durations += [(f, getattr(model.config, f)) for f in steps_fields(type(model.config))]
        shown = ", ".join(f"{name} {value}" for name, value in durations)
        lines.append(f"  {stage:10} {millions:.2f} M parameters, {recipe.steps} steps of {recipe.batch_size}; {shown}")
    return "\n".join(lines)


def _closing(experiment: Experiment, workdir: Workdir, result: dict[str, Any], seconds: float) -> str:
    lines = [""]
    if "fd_classifier" in result:
        distances = {k: v for k, v in result["fd_classifier"].items() if k != "reference"}
        reference = result["fd_classifier"]["reference"]
        lines.append(f"fd_classifier (Frechet distance on classifier features to {reference}; not FID)")
        lines += [f"  {name:36} {value:9.3f}" for name, value in distances.items()]
    for name, value in result.items():
        if isinstance(value, float):
            lines.append(f"{name:38} {value:9.3f}")
    for name, value in result.get("nearest_training_image_rms", {}).items():
        if isinstance(value, float):
            lines.append(f"{f'nearest training image, {name}':38} {value:9.4f}")
    for stage, name, text in (
        ("tokenizer", "psnr", "tokenizer, held-out PSNR in dB"),
        ("tokenizer", "codebook_usage", "tokenizer, share of codes in use"),
        ("tokenizer", "perplexity", "tokenizer, perplexity of the codes"),
        ("generator", "raster_bits", "generator, bits a token, raster order"),
        ("generator", "random_bits", "generator, bits a token, random order"),
    ):
        if (value := result["last_validation"].get(stage, {}).get(f"validation/{name}")) is not None:
            lines.append(f"{text:38} {value:9.3f}")
    path, some = workdir.path, list(range(min(3, experiment.data.num_classes)))
    folders = [path / name for name in ("checkpoints", "tokens") if (path / name).is_dir()]
    lines += [
        "",
        f"Everything is in {path}, after {seconds:.0f} s:",
        f"  {path / 'samples.png'}, reconstructions.png, curves.png, result.json, metrics.jsonl",
        "  " + ", ".join(map(str, folders)),
        f"  tensorboard --logdir {path / 'tensorboard'}    (after pip install tensorboard)",
        "Try next:",
        f"  rar-jax sample --weights {path} --classes {','.join(map(str, some))} --per-class 8 --seed 1 --out {path / 'more'}",
        f"  python -c \"import rar_jax; print(rar_jax.load('{path}').sample({some}, seed=0).shape)\"",
    ]
    return "\n".join(lines)
