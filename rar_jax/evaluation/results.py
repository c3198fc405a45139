"""Sums to numbers, and what a reader of the numbers must know."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from rar_jax.evaluation.image_batches import ImageBatches
from rar_jax.evaluation.program import Program
from rar_jax.metrics.frechet import frechet_distance
from rar_jax.metrics.inception_score import score_splits
from rar_jax.metrics.kid import kid
from rar_jax.metrics.moments import finalize_moments
from rar_jax.metrics.precision_recall import precision_recall
from rar_jax.metrics.sums import ScoreTotals

ENOUGH = 2048  # images, below which the covariance of 2048 features is singular


def compute_scores(
    program: Program, totals: ScoreTotals, pool3: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, float]:
    """Compute all numbers that the sums allow.

    pool3: features of the reference's images and of the samples, for precision, recall and KID.
    """
    numbers: dict[str, float] = {}
    if (reference := program.reference) is not None:
        counts: dict[str, Any] = {"n1": reference.n, "n2": totals.done}
        ours = finalize_moments(totals.pool3, program.shift.pool3)
        numbers["fid"] = frechet_distance(reference.mean, reference.cov, *ours, **counts)
        if reference.spatial_mean is not None and reference.spatial_cov is not None:
            ours = finalize_moments(totals.spatial, program.shift.spatial)
            numbers["sfid"] = frechet_distance(reference.spatial_mean, reference.spatial_cov, *ours, **counts)
    numbers["inception_score"] = score_splits(totals.splits)
    if pool3 is not None:
        numbers |= precision_recall(*pool3)
        numbers["kid"] = kid(*pool3)
    return numbers


def make_remarks(program: Program, batches: ImageBatches) -> list[str]:
    """Return what a reader of the numbers must know."""
    n, size, reference, remarks = batches.num, batches.shape[:2], program.reference, []
    if n < ENOUGH:
        remarks.append(f"n is {n}, below {ENOUGH}: the covariance is singular, and the FID is far above that of 50,000")
    if batches.classes is not None and n % batches.classes:
        remarks.append(f"n is {n}, not a multiple of the {batches.classes} classes: some have more samples than others")
    if reference is None:
        return remarks
    if reference.images is not None and (theirs := reference.images.shape[1:3]) != size:
        remarks.append(
            f"the reference's images have {theirs[0]} x {theirs[1]} pixels, these {size[0]} x {size[1]}, which "
            "changes the distance: rar-jax evaluate --make-reference makes one of images of this size"
        )
    if reference.n is not None and reference.n < ENOUGH:
        remarks.append(f"the reference is of {reference.n} images, below {ENOUGH}: its covariance is singular")
    if reference.weights_sha256 not in (None, program.network.sha256):
        remarks.append("the reference was made with another file of Inception's weights: check that they are the same")
    return remarks


def describe_scoring(program: Program, batches: ImageBatches, remarks: list[str], began: float) -> dict[str, Any]:
    """Return what result.json holds beside the numbers. began: time.monotonic() at the start."""
    return {
        "n": batches.num,
        "reference": str(program.reference.path) if program.reference else None,
        "made_from": program.describe_inputs(batches),
        "made_on": program.describe_execution(),
        "remarks": remarks,
        "seconds": time.monotonic() - began,
    }


def format_scores(result: dict[str, Any]) -> str:
    """Format the numbers of a result and its remarks, one a line."""
    lines = [f"{name:24} {value:12.4f}" for name, value in list_numbers(result).items()]
    return "\n".join([*lines, *_format_remarks(result)])


def format_steps(result: dict[str, Any]) -> str:
    """Format the result of `score_steps`, a row a step, the best one marked."""
    names = list(next(iter(result["steps"].values())))
    lines = ["      step " + "".join(f"{name:>22}" for name in names)]
    for step, numbers in result["steps"].items():
        best = " <- best" if step == result["best"] else ""
        lines.append(f"{step:10} " + "".join(f"{numbers[name]:22.4f}" for name in names) + best)
    return "\n".join([*lines, *_format_remarks(result)])


def list_numbers(result: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a result."""
    return {name: value for name, value in result.items() if isinstance(value, float) and name != "seconds"}


def _format_remarks(result: dict[str, Any]) -> list[str]:
    return [f"n {result['n']}", *(f"note: {remark}" for remark in result["remarks"])]
