"""Score samples and sets of images: FID, sFID, Inception Score, precision, recall and KID, as the ADM suite does.

Rerun after an interruption, everything here continues after its last finished chunk, with bitwise identical results.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.sources import Split
from rar_jax.evaluation.chunks import ChunkStore
from rar_jax.evaluation.image_batches import ImageBatches, batch_image_set, batch_samples
from rar_jax.evaluation.image_sets import ImageSet, open_image_set
from rar_jax.evaluation.npz import write_npz
from rar_jax.evaluation.program import Program, Settings, estimate_shift, load_inception
from rar_jax.evaluation.reference import Reference, read_reference, write_reference
from rar_jax.evaluation.results import check_protocol, compute_scores, get_shift, make_remarks
from rar_jax.metrics.moments import finalize_moments
from rar_jax.parallel.mesh import MeshConfig, make_mesh, matmul_dtype
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.pipeline import Pipeline, load
from rar_jax.runs.manifest import write_json
from rar_jax.runs.pictures import grid
from rar_jax.sampling import Guidance
from rar_jax.weights import registry as released
from rar_jax.weights.loading import open_weights

MAX_REFERENCE_IMAGES = 10_000


def score_samples(
    weights: str,
    inception_path: pathlib.Path,
    out: pathlib.Path,
    *,
    samples: int,
    settings: Settings,
    reference_path: pathlib.Path | None = None,
    tokenizer: str | None = None,
    guidance: Guidance | None = None,
    dtype: str | None = None,
    tensor: int = 1,
    download: bool = False,
    samples_npz: bool = False,
    shares: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Draw samples of a directory or released file and score them.

    Args:
      tensor: devices that share one copy of the generator.
      samples_npz: write the images to out/samples.npz, as ADM's `arr_0`.
      shares: measure the seconds of a batch in each part.

    Returns: what out/result.json holds. Raises: as `score_batches`; ConfigError, WeightsError of loading.
    """
    _check_count(samples)
    mesh = make_mesh(MeshConfig(tensor=tensor))
    reference = read_reference(reference_path) if reference_path else None
    program = Program(load_inception(inception_path, mesh, settings), mesh, settings, get_shift(reference))
    pipeline = load(weights, tokenizer=tokenizer, mesh=mesh, dtype=dtype, download=download)
    made_from = hash_weights(weights, tokenizer, dtype)
    return score_pipeline(
        program, pipeline, out, samples=samples, made_from=made_from, reference=reference, guidance=guidance,
        samples_npz=samples_npz, shares=shares, quiet=quiet,
    )  # fmt: skip


def score_pipeline(
    program: Program,
    pipeline: Pipeline,
    out: pathlib.Path,
    *,
    samples: int,
    made_from: dict[str, Any],
    reference: Reference | None,
    guidance: Guidance | None = None,
    samples_npz: bool = False,
    shares: bool = False,
    quiet: bool = False,
    description: str = "evaluate",
) -> dict[str, Any]:
    """Score samples of a pipeline; see `score_samples`. Also draws out/grid.png."""
    settings, guidance = program.settings, guidance or pipeline.guidance
    batches = batch_samples(
        (pipeline.generator, pipeline.tokenizer), pipeline.params, guidance, num=samples, seed=settings.seed,
        rounding=settings.rounding, made_from=made_from,
    )  # fmt: skip
    result, store = score_batches(
        program, batches, out, reference=reference, keep=("images",) * samples_npz, quiet=quiet, description=description
    )
    if samples_npz and is_main():
        write_npz(out / "samples.npz", {}, ((samples, *batches.shape[:2], 3), _to_rgb(store.load_kept("images"))))
    classes = min(pipeline.generator.config.num_classes, 8)
    # The same images that were scored, except for the rounding.
    images = pipeline.sample(np.arange(classes), seed=settings.seed, guidance=guidance)
    if is_main():
        grid(images, [name.split(",")[0] for name in pipeline.class_names[:classes]], out / "grid.png")
    if shares:
        result["seconds_a_batch"] = program.time_parts(batches)
    return _write_result(out, result)


def hash_weights(
    weights: str | pathlib.Path, tokenizer: str | None, dtype: str | None, step: int | None = None
) -> dict[str, Any]:
    """Return checksums of the weights that samples are drawn with."""
    path = released.locate(weights)
    other = path if path.is_dir() else released.locate(tokenizer or released.TOKENIZER)
    return {
        "generator_sha256": open_weights(path, "generators", step=step).sha256(),
        "tokenizer_sha256": open_weights(other, "tokenizers").sha256(),
        "generator_dtype": matmul_dtype(dtype or "float32"),
    }


def score_images(
    images: str,
    inception_path: pathlib.Path,
    out: pathlib.Path,
    *,
    settings: Settings,
    reference_path: pathlib.Path | None = None,
    split: Split = "train",
    image_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score images made elsewhere; `images`, `split` and `image_size` as in `open_image_set`.

    Returns: what out/result.json holds. Raises: as `score_batches` and `open_image_set`.
    """
    mesh = make_mesh(MeshConfig())
    source = open_image_set(images, split, image_size=image_size)
    reference = read_reference(reference_path) if reference_path else None
    program = Program(load_inception(inception_path, mesh, settings), mesh, settings, get_shift(reference))
    result, _ = score_batches(program, batch_image_set(source), out, reference=reference, quiet=quiet)
    return _write_result(out, result)


def make_reference(
    images: str,
    inception_path: pathlib.Path,
    out: pathlib.Path,
    *,
    settings: Settings,
    split: Split = "train",
    image_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write statistics of all images of a set, with up to 10,000 of the images, to the reference file `out`.

    Raises: ConfigError; as `open_image_set`.
    """
    require(out.suffix == ".npz", f"--out {out}: a reference is a .npz file")
    mesh = make_mesh(MeshConfig())
    source = open_image_set(images, split, image_size=image_size)
    _check_count(source.num)
    batches, network = batch_image_set(source), load_inception(inception_path, mesh, settings)
    shift = estimate_shift(Program(network, mesh, settings, None), batches)
    program = Program(network, mesh, settings, shift)
    totals, _ = program.accumulate(
        batches, out.with_name(f"{out.stem}_chunks"), made_from=describe_inputs(program, batches, None),
        description="reference", quiet=quiet,
    )  # fmt: skip
    mean, cov = finalize_moments(totals.pool3, program.shift.pool3)
    spatial_mean, spatial_cov = finalize_moments(totals.spatial, program.shift.spatial)
    # At equal distances: of sorted class folders the first images would be of few classes.
    kept = np.unique(np.linspace(0, source.num - 1, min(MAX_REFERENCE_IMAGES, source.num)).astype(int))

    def write() -> None:
        write_reference(
            out, mean=mean, cov=cov, n=source.num, protocol=settings.protocol, weights_sha256=network.sha256,
            source=source.name, spatial_mean=spatial_mean, spatial_cov=spatial_cov,
            images=((len(kept), *batches.shape[:2], 3), _to_rgb(_read_images(source, kept))),
        )  # fmt: skip

    from_main(write)
    remarks = make_remarks(source.num, None, None, network.sha256)
    return {"reference": str(out), "n": source.num, "images_kept": len(kept), "remarks": remarks}


# ---------------------------------------------------------------- scoring


def score_batches(
    program: Program,
    batches: ImageBatches,
    out: pathlib.Path,
    *,
    reference: Reference | None,
    keep: tuple[str, ...] = (),
    quiet: bool = False,
    description: str = "evaluate",
) -> tuple[dict[str, Any], ChunkStore]:
    """Score images against a reference; chunks are stored in out/chunks.

    Returns: numbers, inputs and remarks, and the store that holds the arrays named in `keep`.
    Raises: ConfigError, ReferenceFileError.
    """
    began, settings, num = time.monotonic(), program.settings, batches.num
    _check_count(num)
    check_protocol(reference, settings)
    neighbours = reference.images if reference is not None and settings.neighbours else None
    if neighbours is not None:
        few = min(num, neighbours.num)
        require(few >= 4, f"{few} images are too few for precision and recall: at least 4, or --no-neighbours")
        keep = ("pool3", *keep)
    remarks = make_remarks(num, batches.classes, reference, program.network.sha256, batches.shape[:2])
    for remark in remarks if is_main() and not quiet else []:  # before hours of work, and in the result again
        print(f"note: {remark}", file=sys.stderr)
    made_from = describe_inputs(program, batches, reference)
    totals, store = program.accumulate(
        batches, out / "chunks", made_from=made_from, keep=keep, description=description, quiet=quiet
    )
    pool3 = None
    if neighbours is not None:
        theirs = _extract_pool3(program, neighbours, out, quiet)
        pool3 = theirs, np.concatenate(list(store.load_kept("pool3")))
    result = {
        **compute_scores(totals, program, reference, pool3),
        "n": num,
        "reference": str(reference.path) if reference else None,
        "made_from": made_from,
        "made_on": program.execution,
        "remarks": remarks,
        "seconds": time.monotonic() - began,
    }
    return result, store


def describe_inputs(program: Program, batches: ImageBatches, reference: Reference | None) -> dict[str, Any]:
    """Return what the numbers depend on, besides the machine."""
    return {
        "images": batches.num,
        "protocol": program.settings.protocol,
        "inception_sha256": program.network.sha256,
        "features": program.settings.features,
        "reference_sha256": reference.sha256 if reference else None,
        **batches.made_from,
    }


def _extract_pool3(program: Program, images: ImageSet, out: pathlib.Path, quiet: bool) -> np.ndarray:
    """Return features of the reference's images, stored beside the chunks for the next evaluation."""
    batches = batch_image_set(images)
    _, store = program.accumulate(
        batches, out / "chunks", made_from=describe_inputs(program, batches, None), keep=("pool3",),
        description="reference images", quiet=quiet,
    )  # fmt: skip
    return np.concatenate(list(store.load_kept("pool3")))


def _write_result(out: pathlib.Path, result: dict[str, Any]) -> dict[str, Any]:
    from_main(lambda: write_json(out / "result.json", result))
    return result


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
