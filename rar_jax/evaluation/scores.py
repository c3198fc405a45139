"""Score samples and sets of images as the ADM suite does.

Rerun after an interruption, everything here continues after its last finished chunk, with bitwise identical results.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rar_jax.config import require, to_dict
from rar_jax.evaluation.chunks import ChunkStore
from rar_jax.evaluation.image_batches import ImageBatches, batch_image_set, batch_samples
from rar_jax.evaluation.image_sets import ImageSet
from rar_jax.evaluation.npz import write_npz
from rar_jax.evaluation.program import Program, shift_to_mean
from rar_jax.evaluation.reference import write_reference
from rar_jax.evaluation.results import compute_scores, describe_scoring, make_remarks
from rar_jax.metrics.moments import finalize_moments
from rar_jax.metrics.sums import ScoreTotals
from rar_jax.parallel.mesh import matmul_dtype
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.pipeline import Pipeline, load
from rar_jax.runs.manifest import write_json
from rar_jax.runs.pictures import save_image_grid

MAX_REFERENCE_IMAGES = 10_000


def score_samples(
    program: Program,
    weights: str | pathlib.Path,
    out: pathlib.Path,
    *,
    samples: int,
    sampling: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    step: int | None = None,
    samples_npz: bool = False,
    quiet: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Score samples of a directory or released file, and draw out/grid.png.

    weights, dtype, step, how (tokenizer, download, facts, models, raw): as in `rar_jax.load`.
    sampling: settings that differ from the weights' own.
    samples_npz: write the images to out/samples.npz, as ADM's `arr_0`.

    Returns: what out/result.json holds. Raises: as `score_batches` and `rar_jax.load`.
    """
    pipeline = load(weights, mesh=program.mesh, dtype=dtype, step=step, **how)
    settings, chosen = program.settings, pipeline.make_sampling(sampling or {})
    batches = batch_samples(
        (pipeline.generator, pipeline.tokenizer), pipeline.params, chosen, num=samples, seed=settings.seed,
        rounding=settings.rounding, made_from=_hash_weights(pipeline, dtype),
    )  # fmt: skip
    description = "evaluate" if step is None else f"step {step}"
    result, store = score_batches(
        program, batches, out, keep=("images",) * samples_npz, description=description, quiet=quiet
    )
    if samples_npz and is_main():
        write_npz(out / "samples.npz", {}, ((samples, *batches.shape[:2], 3), _to_rgb(store.load_kept("images"))))
    classes = min(pipeline.generator.config.num_classes, 8)
    # The same images that were scored, except for the rounding.
    images = pipeline.sample(np.arange(classes), seed=settings.seed, **to_dict(chosen))
    if is_main():
        save_image_grid(images, [name.split(",")[0] for name in pipeline.class_names[:classes]], out / "grid.png")
    from_main(lambda: write_json(out / "result.json", result))
    return result


def score_images(program: Program, images: ImageSet, out: pathlib.Path, *, quiet: bool = False) -> dict[str, Any]:
    """Score images made elsewhere.

    Returns: what out/result.json holds. Raises: as `score_batches`.
    """
    result, _ = score_batches(program, batch_image_set(images), out, quiet=quiet)
    from_main(lambda: write_json(out / "result.json", result))
    return result


def make_reference(program: Program, images: ImageSet, out: pathlib.Path, *, quiet: bool = False) -> dict[str, Any]:
    """Write statistics of a set, and up to 10,000 of its images, to the file `out`."""
    require(out.suffix == ".npz", f"{out}: a reference is a .npz file")
    _check_count(images.num)
    batches = batch_image_set(images)
    program = shift_to_mean(program, batches)
    folder = out.with_name(f"{out.stem}_chunks")
    totals, _ = program.accumulate(batches, folder, description="reference", quiet=quiet)
    mean, cov = finalize_moments(totals.pool3, program.shift.pool3)
    spatial_mean, spatial_cov = finalize_moments(totals.spatial, program.shift.spatial)
    # At equal distances: of sorted class folders the first images would be of few classes.
    kept = np.unique(np.linspace(0, images.num - 1, min(MAX_REFERENCE_IMAGES, images.num)).astype(int))

    def write() -> None:
        write_reference(
            out, mean=mean, cov=cov, spatial_mean=spatial_mean, spatial_cov=spatial_cov, n=images.num,
            protocol=program.settings.protocol, weights_sha256=program.network.sha256, source=images.name,
            images=((len(kept), *batches.shape[:2], 3), _to_rgb(_read_images(images, kept))),
        )  # fmt: skip

    from_main(write)
    remarks = make_remarks(program, batches)
    return {"reference": str(out), "n": images.num, "images_kept": len(kept), "remarks": remarks}


def score_batches(
    program: Program,
    batches: ImageBatches,
    out: pathlib.Path,
    *,
    keep: tuple[str, ...] = (),
    description: str = "evaluate",
    quiet: bool = False,
) -> tuple[dict[str, Any], ChunkStore]:
    """Score images against the program's reference; chunks are stored in out/chunks.

    Returns: numbers, inputs and remarks, and the store that holds the arrays named in `keep`.
    Raises: ConfigError, ReferenceFileError.
    """
    began, num, reference = time.monotonic(), batches.num, program.reference
    _check_count(num)
    neighbours = reference.images if reference is not None and program.settings.neighbours else None
    if neighbours is not None:
        few = min(num, neighbours.num)
        require(few >= 4, f"{few} images are too few for precision and recall: at least 4, or --no-neighbours")
        keep = ("pool3", *keep)
    remarks = make_remarks(program, batches)
    for remark in remarks if is_main() and not quiet else []:  # before hours of work, and in the result again
        print(f"note: {remark}", file=sys.stderr)

    def accumulate(batches: ImageBatches, keep: tuple[str, ...], description: str) -> tuple[ScoreTotals, ChunkStore]:
        return program.accumulate(batches, out / "chunks", keep=keep, description=description, quiet=quiet)

    totals, store = accumulate(batches, keep, description)
    pool3 = None
    if neighbours is not None:
        _, theirs = accumulate(batch_image_set(neighbours), ("pool3",), "reference images")
        pool3 = theirs.concatenate("pool3"), store.concatenate("pool3")
    return compute_scores(program, totals, pool3) | describe_scoring(program, batches, remarks, began), store


def _hash_weights(pipeline: Pipeline, dtype: str | None) -> dict[str, Any]:
    generator, tokenizer = (weights.sha256() for weights in pipeline.sources)
    made_with = matmul_dtype(dtype or "float32")
    return {"generator_sha256": generator, "tokenizer_sha256": tokenizer, "generator_dtype": made_with}


def _check_count(images: int) -> None:
    require(images >= 2, f"{images} images: a distance needs the covariance of at least 2 (published ones take 50000)")


def _read_images(images: ImageSet, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the images with these ascending ids, in batches."""
    for start in range(0, images.num, 1000):
        count = min(1000, images.num - start)
        wanted = ids[(ids >= start) & (ids < start + count)]
        if len(wanted):
            yield images.read(start, count)[wanted - start]


def _to_rgb(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    return (np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x for x in batches)
