"""Score a tokenizer by its reconstructions: rFID, PSNR, SSIM and codebook usage."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.evaluation.image_batches import ImageBatches, batch_image_set, batch_reconstructions
from rar_jax.evaluation.image_sets import ImageSet
from rar_jax.evaluation.program import Program, shift_to_mean
from rar_jax.evaluation.results import describe_scoring, make_remarks
from rar_jax.metrics.frechet import frechet_distance
from rar_jax.metrics.moments import finalize_moments
from rar_jax.metrics.reconstruction import WINDOW, measure_code_usage
from rar_jax.models import token_spec
from rar_jax.parallel.processes import from_main
from rar_jax.runs.manifest import write_json
from rar_jax.weights.loading import Reading, open_weights

PSNR_OF_EQUAL = 100.0  # decibels, instead of infinity, which would be the mean's whole value


def score_reconstructions(
    program: Program,
    weights: str,
    images: ImageSet,
    out: pathlib.Path,
    *,
    reading: Reading = Reading(),
    quiet: bool = False,
) -> dict[str, Any]:
    """Score the reconstructions of images, and write out/result.json.

    The rFID is to the program's reference, by default to the images themselves.

    weights: a tokenizer's file or released name, or a directory. reading: as of `open_weights`.
    Returns: {"rfid", "psnr" (dB, mean over images), "ssim" (of images of 11 pixels and more), "codebook_usage"
      and "perplexity" (of codes), "n", "made_from", ...}.
    Raises: ConfigError, ReferenceFileError, WeightsError.
    """
    began, reference = time.monotonic(), program.reference
    opened = open_weights(weights, "tokenizers", reading=reading)
    originals, model = batch_image_set(images), opened.model
    takes = model.module.image_spec(model.config).shape
    require(
        originals.shape == takes,
        f"{images.name} has images {list(originals.shape)}, the tokenizer takes {list(takes)}: crop them first",
    )
    require(images.num >= 2, f"{images.name} has {images.num} images: a covariance needs at least 2")
    if reference is None:
        program = shift_to_mean(program, originals)
    params, rounding = opened.place(program.mesh), program.settings.rounding
    reconstructed = batch_reconstructions(originals, model, params, rounding, tokenizer_sha256=opened.sha256())
    remarks = make_remarks(program, reconstructed)
    if reference is None:
        remarks.append("rfid is to the images themselves")
    result = _compute_scores(program, originals, reconstructed, token_spec(model).vocab, out / "chunks", quiet)
    result |= describe_scoring(program, reconstructed, remarks, began)
    from_main(lambda: write_json(out / "result.json", result))
    return result


def _compute_scores(
    program: Program,
    originals: ImageBatches,
    reconstructed: ImageBatches,
    codes: int | None,
    chunks: pathlib.Path,
    quiet: bool,
) -> dict[str, float]:
    if (reference := program.reference) is not None:
        theirs, n = (reference.mean, reference.cov), reference.n
    else:
        totals, _ = program.accumulate(originals, chunks, description="originals", quiet=quiet)
        theirs, n = finalize_moments(totals.pool3, program.shift.pool3), originals.num
    keep = ("tokens",) * (codes is not None) + ("psnr",) + ("ssim",) * (min(originals.shape[:2]) >= WINDOW)
    totals, store = program.accumulate(reconstructed, chunks, keep=keep, description="reconstructions", quiet=quiet)
    kept = {name: store.concatenate(name) for name in keep}
    ours = finalize_moments(totals.pool3, program.shift.pool3)
    numbers = {"rfid": frechet_distance(*theirs, *ours, n1=n, n2=totals.done)}
    numbers["psnr"] = float(np.minimum(kept["psnr"], PSNR_OF_EQUAL).mean(dtype=np.float64))
    if "ssim" in kept:
        numbers["ssim"] = float(kept["ssim"].mean(dtype=np.float64))
    if codes is not None:
        numbers |= measure_code_usage(np.bincount(kept["tokens"].reshape(-1), minlength=codes))
    return numbers
