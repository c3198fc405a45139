"""Score samples, checkpoints, reconstructions or images made elsewhere."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from rar_jax.config import require
from rar_jax.data.image_source import Split
from rar_jax.errors import ConfigError
from rar_jax.evaluation.fd_classifier import score_with_classifier
from rar_jax.evaluation.image_sets import open_image_set
from rar_jax.evaluation.program import Settings, open_program
from rar_jax.evaluation.reconstructions import score_reconstructions
from rar_jax.evaluation.results import format_scores, format_steps
from rar_jax.evaluation.scores import make_reference as write_reference
from rar_jax.evaluation.scores import score_images, score_samples
from rar_jax.evaluation.steps import score_steps
from rar_jax.experiment import Experiment, fill_defaults
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import is_main
from rar_jax.runs.session import open_session
from rar_jax.runs.workdir import Workdir
from rar_jax.weights.inception import WHERE
from rar_jax.weights.loading import Reading


def print_scores(
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
    sampling: dict[str, Any],
    dtype: str | None,
    tensor: int,
    samples_npz: bool,
    reading: Reading,
    quiet: bool,
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
        with open_session(workdir, "evaluate", lambda: workdir.claim(experiment.resolved(), fill_defaults)) as around:
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
    require(experiment is None, "--inception reads no --config: change settings of sampling with --sampling.NAME=VALUE")
    given = [x for x in (weights, workdir, images, make_reference) if x is not None]
    directory = str(workdir.path) if workdir else None
    source = tokenizer or weights or directory
    if reconstruction and not (source and images and not make_reference):
        raise ConfigError("--reconstruction needs a tokenizer (--tokenizer FILE, or --workdir) and --images")
    if not reconstruction:
        require(len(given) == 1, "give one of --weights, --workdir, --images and --make-reference")
    require(not (make_reference and reference), "--make-reference compares with nothing: leave --reference out")
    require(not steps or workdir is not None, "--steps needs --workdir: its checkpoints are scored")
    require(not (steps and samples_npz), "--samples-npz needs one checkpoint: leave --steps out")
    of_images = image_size is None or images is not None or make_reference is not None
    require(of_images, "--image-size is of a source in --images or --make-reference")
    out = out or (workdir and workdir.path / "evaluation")
    if out is None:
        raise ConfigError("give --out: where to write the result")
    require(not make_reference or out.suffix == ".npz", f"--out {out}: a reference is a .npz file")
    checked, named = Settings(**settings), images or make_reference
    image_set = open_image_set(named, split, image_size=image_size) if named else None
    how: dict[str, Any] = {"sampling": sampling, "dtype": dtype, "quiet": quiet, **vars(reading)}
    chunks = workdir.chunks if workdir else None
    program = open_program(inception, checked, reference_path=reference, tensor=tensor, chunks=chunks)
    if image_set and make_reference:
        text = format_scores(write_reference(program, image_set, out, quiet=quiet))
    elif image_set and reconstruction and source:
        text = format_scores(score_reconstructions(program, source, image_set, out, reading=reading, quiet=quiet))
    elif image_set:
        text = format_scores(score_images(program, image_set, out, quiet=quiet))
    elif steps and workdir:
        text = format_steps(score_steps(program, workdir.path, out, steps=steps, samples=samples, **how))
    else:
        scored = weights or directory
        assert scored is not None
        how |= {"samples": samples, "tokenizer": tokenizer, "samples_npz": samples_npz}
        text = format_scores(score_samples(program, scored, out, **how))
    if workdir is not None:
        workdir.send()
    if is_main():
        print(text, flush=True)
