"""Score samples, checkpoints, reconstructions or images made elsewhere."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from rar_jax.config import require
from rar_jax.data.image_source import Split
from rar_jax.errors import ConfigError
from rar_jax.evaluation.fd_classifier import evaluate as score_with_classifier
from rar_jax.evaluation.program import Settings
from rar_jax.evaluation.reconstructions import reconstruct
from rar_jax.evaluation.scores import reference_of, score_images, score_samples, summary
from rar_jax.evaluation.steps import score_steps, steps_table
from rar_jax.experiment import Experiment
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import is_main
from rar_jax.runs.preemption import Watch
from rar_jax.runs.session import session
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import parse_guidance
from rar_jax.weights.inception import WHERE


def score(
    experiment: Experiment | None,
    workdir: Workdir | None,
    *,
    inception: pathlib.Path | None,
    weights: str | None,
    tokenizer: str | None,
    images: str | None,
    make_reference: str | None,
    reconstruction: bool,
    steps: str | None,
    reference: pathlib.Path | None,
    out: pathlib.Path | None,
    split: Split,
    image_size: int | None,
    samples: int,
    guidance: str | None,
    dtype: str | None,
    tensor: int,
    samples_npz: bool,
    shares: bool,
    download: bool,
    quiet: bool,
    watch: Watch,
    **settings: Any,
) -> None:
    """Print the scores of one thing, and write them to result.json.

    Args:
      settings: fields of `evaluation.program.Settings`.
    """
    if experiment and workdir and not (inception or images or make_reference or steps):
        mesh = make_mesh(experiment.mesh)
        experiment.check_mesh(mesh)
        workdir.read_config()  # it must exist
        with session(workdir, "evaluate", watch, lambda: workdir.claim(experiment.resolved())) as around:
            result = score_with_classifier(experiment, workdir, mesh, quiet=quiet)
            around.ledger.lap("evaluating")
        if is_main():
            print(json.dumps(result, indent=1))
        return
    if inception is None:
        raise ConfigError(
            "evaluate needs --inception (FID), or --config and --workdir (fd_classifier): "
            f"give Inception's weights, {WHERE}"
        )
    require(experiment is None, "--inception reads no --config: give --guidance for other settings than the model's")
    given = [x for x in (weights, workdir, images, make_reference) if x is not None]
    directory = str(workdir.path) if workdir else None
    source = tokenizer or weights or directory
    if reconstruction and not (source and images and not make_reference):
        raise ConfigError("--reconstruction needs a tokenizer (--tokenizer FILE, or --workdir) and --images")
    if not reconstruction:
        require(len(given) == 1, "give one of --weights, --workdir, --images and --make-reference")
    require(not (make_reference and reference), "--make-reference compares with nothing: leave --reference out")
    require(not steps or workdir is not None, "--steps needs --workdir: its checkpoints are scored")
    require(
        not (steps and (samples_npz or shares)), "--samples-npz and --shares need one checkpoint: leave --steps out"
    )
    of_images = image_size is None or images is not None or make_reference is not None
    require(of_images, "--image-size is of a source in --images or --make-reference")
    out = out or (workdir and workdir.path / "evaluation")
    if out is None:
        raise ConfigError("give --out: where to write the result")
    common = {"settings": Settings(**settings), "quiet": quiet}
    compared, crop = {"reference_path": reference, **common}, {"split": split, "image_size": image_size}
    how = {"samples": samples, "guidance": parse_guidance(guidance), "dtype": dtype, "tensor": tensor, **compared}
    if make_reference:
        text = summary(reference_of(make_reference, inception, out, **crop, **common))
    elif reconstruction and source and images:
        text = summary(reconstruct(source, images, inception, out, download=download, **crop, **compared))
    elif images:
        text = summary(score_images(images, inception, out, **crop, **compared))
    elif steps and workdir:
        text = steps_table(score_steps(workdir.path, inception, out, steps=steps, **how))
    else:
        model = weights or directory
        assert model is not None
        extra = {"tokenizer": tokenizer, "download": download, "samples_npz": samples_npz, "shares": shares}
        text = summary(score_samples(model, inception, out, **extra, **how))
    if workdir is not None:
        workdir.send()
    if is_main():
        print(text, flush=True)
