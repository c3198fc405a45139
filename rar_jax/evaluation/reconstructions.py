"""Score a tokenizer by its reconstructions: rFID, PSNR, SSIM and codebook usage."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.sources import Split
from rar_jax.evaluation.chunks import ChunkStore
from rar_jax.evaluation.image_batches import ImageBatches, batch_image_set, batch_reconstructions
from rar_jax.evaluation.image_sets import open_image_set
from rar_jax.evaluation.program import Program, Settings, estimate_shift, load_inception
from rar_jax.evaluation.reference import Reference, read_reference
from rar_jax.evaluation.results import check_protocol, get_shift, make_remarks
from rar_jax.evaluation.scores import describe_inputs
from rar_jax.metrics.frechet import frechet_distance
from rar_jax.metrics.moments import finalize_moments
from rar_jax.metrics.reconstruction import WINDOW, measure_code_usage
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.processes import from_main
from rar_jax.runs.manifest import write_json
from rar_jax.weights import registry as released
from rar_jax.weights.loading import open_weights

PSNR_OF_EQUAL = 100.0  # decibels, instead of infinity, which would be the mean's whole value


def score_reconstructions(
    weights: str,
    images: str,
    inception_path: pathlib.Path,
    out: pathlib.Path,
    *,
    settings: Settings,
    reference_path: pathlib.Path | None = None,
    split: Split = "train",
    image_size: int | None = None,
    download: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score the reconstructions of images; resumes after the last finished chunk, and writes out/result.json.

    Args:
      weights: a tokenizer's file or released name, or a directory. images, image_size: as in `open_image_set`.
      reference_path: statistics for the rFID; by default those of the images themselves.

    Returns: {"rfid", "psnr" (dB, mean over images), "ssim" (of images of 11 pixels and more), "codebook_usage",
      "perplexity" (of the codes), "n", "made_from", ...}.
    Raises: ConfigError, ReferenceFileError, WeightsError.
    """
    began, mesh = time.monotonic(), make_mesh(MeshConfig())
    opened = open_weights(released.locate(weights, download=download), "tokenizers")
    source, tokenizer = open_image_set(images, split, image_size=image_size), opened.model
    originals, takes = batch_image_set(source), tokenizer.module.image_spec(tokenizer.config).shape
    require(
        originals.shape == takes,
        f"{images} has images {list(originals.shape)}, the tokenizer takes {list(takes)}: crop them first",
    )
    require(source.num >= 2, f"{images} has {source.num} images: a covariance needs at least 2")
    reference = read_reference(reference_path) if reference_path else None
    check_protocol(reference, settings)
    network = load_inception(inception_path, mesh, settings)
    shift = get_shift(reference) or estimate_shift(Program(network, mesh, settings, None), originals)
    program = Program(network, mesh, settings, shift)
    reconstructed = batch_reconstructions(
        source, tokenizer, opened.place(mesh), rounding=settings.rounding, tokenizer_sha256=opened.sha256()
    )
    remarks = make_remarks(source.num, None, reference, network.sha256, takes[:2])
    if reference is None:
        remarks.append("rfid is to the images themselves")
    result = {
        **_compute_scores(program, originals, reconstructed, reference, out, quiet),
        "n": source.num,
        "made_from": describe_inputs(program, reconstructed, reference),
        "made_on": program.execution,
        "reference": str(reference.path) if reference else None,
        "remarks": remarks,
        "seconds": time.monotonic() - began,
    }
    from_main(lambda: write_json(out / "result.json", result))
    return result


def _compute_scores(
    program: Program,
    originals: ImageBatches,
    reconstructed: ImageBatches,
    reference: Reference | None,
    out: pathlib.Path,
    quiet: bool,
) -> dict[str, float]:
    def score(batches: ImageBatches, description: str, keep: tuple[str, ...] = ()) -> tuple[Any, ChunkStore]:
        made_from = describe_inputs(program, batches, reference)
        totals, store = program.accumulate(
            batches, out / "chunks", made_from=made_from, keep=keep, description=description, quiet=quiet
        )
        return finalize_moments(totals.pool3, program.shift.pool3), store

    if reference is None:
        theirs, n = score(originals, "originals")[0], originals.num
    else:
        theirs, n = (reference.mean, reference.cov), reference.n
    keep = ("tokens", "psnr", "ssim")[: 3 if min(originals.shape[:2]) >= WINDOW else 2]
    ours, store = score(reconstructed, "reconstructions", keep)
    kept = {name: np.concatenate(list(store.load_kept(name))) for name in keep}
    numbers = {"rfid": frechet_distance(*theirs, *ours, n1=n, n2=reconstructed.num)}
    numbers["psnr"] = float(np.minimum(kept["psnr"], PSNR_OF_EQUAL).mean(dtype=np.float64))
    if "ssim" in kept:
        numbers["ssim"] = float(kept["ssim"].mean(dtype=np.float64))
    codebook_size = reconstructed.make.tokenizer.config.codebook_size  # pyright: ignore[reportFunctionMemberAccess]
    return numbers | measure_code_usage(np.bincount(kept["tokens"].reshape(-1), minlength=codebook_size))
