"""The verb `evaluate` with Inception: FID, sFID, Inception Score, precision and recall, KID, as the ADM suite defines them.

Of samples, of images made elsewhere, or statistics of one's own images to compare with. (`fd_classifier.py` is the verb without
Inception's weights.) Killed anywhere, the same command goes on behind the last chunk and ends in the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.config import require, to_dict
from rar_jax.data.sources import Split
from rar_jax.evaluation.chunks import ChunkStore, accumulate
from rar_jax.evaluation.image_sets import ImageSet, NpzImages, open_images
from rar_jax.evaluation.program import Network, Program, Settings, check_protocol, metrics, remarks, shift_of
from rar_jax.evaluation.reference import Reference, SamplesWriter, read_reference, write_reference
from rar_jax.metrics import moments
from rar_jax.metrics.sums import Shift
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import MeshConfig, make_mesh, matmul_dtype
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.parallel.rules import replicated
from rar_jax.pipeline import Pipeline, load
from rar_jax.runs.machine import versions
from rar_jax.runs.manifest import file_sha256, write_json
from rar_jax.runs.pictures import save_image_grid
from rar_jax.sampling import Guidance
from rar_jax.weights import inception
from rar_jax.weights import registry as released
from rar_jax.weights.loading import open_weights


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
    """Draws samples of a directory or released file and scores them; see `evaluate`.

    tensor: devices that share one copy of the generator.
    """
    _check_count(samples, "samples")
    mesh = make_mesh(MeshConfig(tensor=tensor))
    reference = read_reference(reference_path) if reference_path else None
    network = load_network(inception_path, mesh, settings)
    pipeline = load(weights, tokenizer=tokenizer, mesh=mesh, dtype=dtype, download=download)
    program = Program(network, mesh, settings, shift_of(reference))
    result = evaluate(
        program, network, pipeline, out, images=samples, made_from=made_from(weights, tokenizer, dtype),
        reference=reference, guidance=guidance, samples_npz=samples_npz, quiet=quiet,
    )  # fmt: skip
    if shares:
        models = pipeline.generator, pipeline.tokenizer
        result["seconds_a_batch"] = program.time_shares(models, pipeline.params, guidance or pipeline.guidance)
        from_main(lambda: write_json(out / "result.json", result))
    return result


def made_from(
    weights: str | pathlib.Path, tokenizer: str | None, dtype: str | None, step: int | None = None
) -> dict[str, Any]:
    """Checksums of the weights that samples are drawn with."""
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
    """Scores images made elsewhere (folder, ADM's .npz, or a source); see `open_images` and `evaluate`."""
    mesh = make_mesh(MeshConfig())
    source = open_images(images, split, image_size=image_size)
    reference = read_reference(reference_path) if reference_path else None
    network = load_network(inception_path, mesh, settings)
    given = {"images_from": source.name, "images_sha256": source.fingerprint()}
    program = Program(network, mesh, settings, shift_of(reference))
    return evaluate(program, network, source, out, images=source.num, made_from=given, reference=reference, quiet=quiet)


def reference_of(
    images: str,
    inception_path: pathlib.Path,
    out: pathlib.Path,
    *,
    settings: Settings,
    split: Split = "train",
    image_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes statistics of one's own images as a reference file; see `open_images` and `make_reference`."""
    require(out.suffix == ".npz", f"--out {out}: a reference is a .npz file")
    mesh = make_mesh(MeshConfig())
    source = open_images(images, split, image_size=image_size)
    network = load_network(inception_path, mesh, settings)
    program = Program(network, mesh, settings, near_the_mean(network, mesh, settings, source))
    return make_reference(program, network, source, out, source=source.name, quiet=quiet)


def near_the_mean(network: Network, mesh: Mesh, settings: Settings, images: ImageSet) -> Shift:
    """Means of the first batch. About zero, float32 sums lose what small eigenvalues are made of: 1e-4 of an FID was seen."""
    first = Program(network, mesh, settings, None).images(images, ())(0, min(settings.batch_size, images.num)).sums
    return Shift(first.pool3.sum / first.pool3.count, first.spatial.sum / first.spatial.count)


def load_network(path: pathlib.Path, mesh: Mesh, settings: Settings) -> Network:
    """Inception's weights on every device. Raises: WeightsError that says where to get them."""
    with jax.enable_x64(settings.features == "float64"):
        params = put_on_mesh(inception.load(path, dtype=settings.features), replicated(mesh))
    return Network(params, file_sha256(path))


# ---------------------------------------------------------------- scoring


def evaluate(
    program: Program,
    network: Network,
    source: Pipeline | ImageSet,
    out: pathlib.Path,
    *,
    images: int,
    made_from: dict[str, Any],
    reference: Reference | None,
    guidance: Guidance | None = None,
    samples_npz: bool = False,
    quiet: bool = False,
    description: str = "evaluate",
) -> dict[str, Any]:
    """Scores samples of a pipeline, or images of a set; resumes where it was stopped.

    Writes out/result.json, and for samples out/grid.png and, if asked for, out/samples.npz (ADM's `arr_0`).

    Args:
      made_from: what the images are made from (sha256 of weights), for the record and the resuming.

    Returns: what result.json holds.
    Raises: ConfigError, ReferenceFileError, WeightsError.
    """
    settings, began = program.settings, time.monotonic()
    sampled = isinstance(source, Pipeline)
    _check_count(images, "images")
    check_protocol(reference, settings)
    neighbours = settings.neighbours and reference is not None and reference.images is not None
    few = min(images, reference.images.num if reference and reference.images else images)
    require(
        not neighbours or few >= 4, f"{few} images are too few for precision and recall: at least 4, or --no-neighbours"
    )
    keep = ("pool3",) * neighbours + ("images",) * (samples_npz and sampled)
    what = {
        "images": images,
        "protocol": settings.protocol,
        "inception_sha256": network.sha256,
        "features": settings.features,
        "reference_sha256": reference.sha256 if reference else None,
        **made_from,
    }
    classes = None
    if isinstance(source, Pipeline):
        guidance = guidance or source.guidance
        classes = source.generator.config.num_classes
        what |= {"guidance": to_dict(guidance), "seed": settings.seed, "rounding": settings.rounding}
        compute = program.samples((source.generator, source.tokenizer), source.params, guidance, keep)
    else:
        compute = program.images(source, keep)
    said = remarks(images, classes, reference, network.sha256, _size(source))
    for remark in said if is_main() and not quiet else []:  # before hours of work, and in the result again
        print(f"note: {remark}", file=sys.stderr)
    store = ChunkStore(out / "chunks", {**what, **cut(program)}, keep)
    totals = accumulate(
        store, compute, images=images, chunk=settings.chunk, split_size=settings.split_size,
        description=description, quiet=quiet,
    )  # fmt: skip
    pool3 = None
    if neighbours and reference is not None:
        pool3 = (_reference_pool3(program, network, reference, out, quiet), np.concatenate(list(store.kept("pool3"))))
    numbers = metrics(totals, program, reference, pool3)
    if "images" in keep and is_main():
        _write_samples(store, out / "samples.npz", images)
    if sampled:
        _draw(source, guidance, settings, out / "grid.png")
    result = {
        **numbers,
        "n": images,
        "reference": str(reference.path) if reference else None,
        "made_from": what,
        "made_on": cut(program),
        "remarks": said,
        "seconds": time.monotonic() - began,
    }
    from_main(lambda: write_json(out / "result.json", result))
    return result


def _size(source: Pipeline | ImageSet) -> tuple[int, int]:
    """Height and width of the images."""
    if isinstance(source, Pipeline):
        return source.tokenizer.module.image_spec(source.tokenizer.config).shape[:2]
    return source.read(0, 1).shape[1:3]  # pyright: ignore[reportReturnType]


def _check_count(images: int, name: str) -> None:
    require(
        images >= 2, f"{name} is {images}: a distance needs the covariance of at least 2 (published ones take 50000)"
    )


def make_reference(
    program: Program, network: Network, images: ImageSet, path: pathlib.Path, *, source: str, quiet: bool = False
) -> dict[str, Any]:
    """Writes statistics of one's own images, all of them, as a reference file; images up to 10,000 go into it.

    Raises: ConfigError, ReferenceFileError.
    """
    settings = program.settings
    require(images.num >= 2, f"{source} has {images.num} images: a covariance needs at least 2")
    what = {
        "reference": source,
        "images": images.num,
        "images_sha256": images.fingerprint(),
        "protocol": settings.protocol,
        "features": settings.features,
        "inception": network.sha256,
    }
    store = ChunkStore(path.with_name(f"{path.stem}_chunks"), what | cut(program))
    totals = accumulate(
        store, program.images(images, ()), images=images.num, chunk=settings.chunk, split_size=settings.split_size,
        description="reference", quiet=quiet,
    )  # fmt: skip
    mean, cov = moments.finalize(totals.pool3, program.shift.pool3)
    spatial_mean, spatial_cov = moments.finalize(totals.spatial, program.shift.spatial)
    kept = _spread(images, 10_000)
    write = functools.partial(
        write_reference, path, mean=mean, cov=cov, n=images.num, protocol=settings.protocol, weights_sha256=network.sha256, source=source,
        spatial_mean=spatial_mean, spatial_cov=spatial_cov,
        images=np.repeat(kept, 3, axis=-1) if kept.shape[-1] == 1 else kept,
    )  # fmt: skip
    from_main(write)
    return {
        "reference": str(path),
        "n": images.num,
        "images_kept": len(kept),
        "remarks": remarks(images.num, None, None, network.sha256),
    }


def _spread(images: ImageSet, most: int) -> np.ndarray:
    """All images, or `most` of them at equal distances: of sorted class folders the first would be of few classes."""
    wanted = np.unique(np.linspace(0, images.num - 1, min(most, images.num)).astype(int))
    parts = []
    for start in range(0, images.num, 1000):
        count = min(1000, images.num - start)
        here = wanted[(wanted >= start) & (wanted < start + count)] - start
        parts.append(images.read(start, count)[here])
    return np.concatenate(parts)


def _reference_pool3(
    program: Program, network: Network, reference: Reference, out: pathlib.Path, quiet: bool
) -> np.ndarray:
    """Features of the reference's images, kept beside the chunks for the next evaluation."""
    assert reference.images is not None
    settings = program.settings
    what = {
        "reference_sha256": reference.sha256,
        "inception_sha256": network.sha256,
        "features": settings.features,
        "protocol": settings.protocol,
        **cut(program),
    }
    store, images = ChunkStore(out / "chunks", what, ("pool3",)), NpzImages(reference.images)
    accumulate(
        store, program.images(images, ("pool3",)), images=images.num, chunk=settings.chunk,
        split_size=settings.split_size, description="reference images", quiet=quiet,
    )  # fmt: skip
    return np.concatenate(list(store.kept("pool3")))


def _write_samples(store: ChunkStore, path: pathlib.Path, num: int) -> None:
    with contextlib.ExitStack() as stack:
        writer: SamplesWriter | None = None
        for images in store.kept("images"):
            images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
            if writer is None:
                new = SamplesWriter(path, num=num, height=images.shape[1], width=images.shape[2])
                writer = stack.enter_context(new)
            writer.append(images)


def _draw(pipeline: Any, guidance: Guidance | None, settings: Settings, path: pathlib.Path) -> None:
    """The first samples, of up to 8 classes: the same images that were scored (but for the rounding)."""
    classes = min(pipeline.generator.config.num_classes, 8)
    images = pipeline.sample(np.arange(classes), seed=settings.seed, guidance=guidance)
    if is_main():
        save_image_grid(images, [name.split(",")[0] for name in pipeline.class_names[:classes]], path)


def cut(program: Program) -> dict[str, Any]:
    """What changes the last bits of the sums."""
    settings = program.settings
    return {
        "batch_size": settings.batch_size,
        "chunk": settings.chunk,
        "split_size": settings.split_size,
        "mesh": dict(program.mesh.shape),
        **where(),
    }


def where() -> dict[str, Any]:
    """The device and the versions: sums of another are not gone on with."""
    return {"device": jax.devices()[0].device_kind, "versions": versions(("jax", "jaxlib", "flax", "numpy"))}


def summary(result: dict[str, Any]) -> str:
    """A table of the numbers and what must be known with them."""
    lines = [
        f"{name:24} {value:12.4f}" for name, value in result.items() if isinstance(value, float) and name != "seconds"
    ]
    if parts := result.get("seconds_a_batch"):
        whole = sum(parts.values())
        lines += [f"{f'share of {name}':24} {seconds / whole:12.1%}" for name, seconds in parts.items()]
    lines += [f"n {result['n']}", *(f"note: {remark}" for remark in result["remarks"])]
    return "\n".join(lines)
