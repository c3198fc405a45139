"""`evaluate --reconstruction`: what a tokenizer keeps of images. rFID, PSNR, SSIM, and how its codebook is used."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.sources import Split
from rar_jax.evaluation.chunks import ChunkStore, accumulate
from rar_jax.evaluation.image_sets import open_images
from rar_jax.evaluation.program import Program, Settings, check_protocol, remarks, shift_of
from rar_jax.evaluation.reference import read_reference
from rar_jax.evaluation.scores import cut, load_network, near_the_mean
from rar_jax.metrics import frechet, moments
from rar_jax.metrics.reconstruction import WINDOW, code_usage
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.processes import from_main
from rar_jax.runs.manifest import write_json
from rar_jax.weights import registry as released
from rar_jax.weights.loading import open_weights

PSNR_OF_EQUAL = 100.0  # decibels, which would be infinite: one equal image would be the mean's whole value


def reconstruct(
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
    """Scores the reconstructions of images; resumes where it was stopped, and writes out/result.json.

    Args:
      weights: a tokenizer's file or released name, or a directory. images, image_size: as `open_images` takes them.
      reference_path: statistics that rFID is to; default those of the images themselves.

    Returns: {"rfid", "psnr" (dB, mean over images), "ssim" (of images of 11 pixels and more), "codebook_usage" (share of
      codes in use), "perplexity" (of the codes), "n", "made_from", ...}.
    Raises: ConfigError, ReferenceFileError, WeightsError.
    """
    began, mesh = time.monotonic(), make_mesh(MeshConfig())
    opened = open_weights(released.locate(weights, download=download), "tokenizers")
    tokenizer, source = opened.model, open_images(images, split, image_size=image_size)
    takes, given = tokenizer.module.image_spec(tokenizer.config).shape, source.read(0, 1).shape[1:]
    require(given == takes, f"{images} has images {list(given)}, the tokenizer takes {list(takes)}: crop them first")
    require(source.num >= 2, f"{images} has {source.num} images: a covariance needs at least 2")
    reference = read_reference(reference_path) if reference_path else None
    check_protocol(reference, settings)
    network = load_network(inception_path, mesh, settings)
    shift = shift_of(reference) or near_the_mean(network, mesh, settings, source)
    program = Program(network, mesh, settings, shift)
    what = {
        "images": source.num,
        "images_from": source.name,
        "images_sha256": source.fingerprint(),
        "tokenizer_sha256": opened.sha256(),
        "rounding": settings.rounding,
        "protocol": settings.protocol,
        "features": settings.features,
        "inception_sha256": network.sha256,
        "reference_sha256": reference.sha256 if reference else None,
    }
    common: dict[str, Any] = {
        "images": source.num, "chunk": settings.chunk, "split_size": settings.split_size, "quiet": quiet
    }  # fmt: skip
    if reference is None:
        store = ChunkStore(out / "chunks", what | cut(program) | {"of": "originals"})
        totals = accumulate(store, program.images(source, ()), description="originals", **common)
        theirs = *moments.finalize(totals.pool3, program.shift.pool3), source.num
    else:
        theirs = reference.mean, reference.cov, reference.n
    keep = ("tokens", "psnr", "ssim")[: 3 if min(takes[:2]) >= WINDOW else 2]
    store = ChunkStore(out / "chunks", what | cut(program) | {"of": "reconstructions"}, keep)
    compute = program.reconstructions(tokenizer, opened.place(mesh), source)
    totals = accumulate(store, compute, description="reconstructions", **common)
    mean, cov = moments.finalize(totals.pool3, program.shift.pool3)
    numbers = {"rfid": frechet.distance(theirs[0], theirs[1], mean, cov, n1=theirs[2], n2=source.num)}
    numbers["psnr"] = float(np.minimum(np.concatenate(list(store.kept("psnr"))), PSNR_OF_EQUAL).mean(dtype=np.float64))
    if "ssim" in keep:
        numbers["ssim"] = float(np.concatenate(list(store.kept("ssim"))).mean(dtype=np.float64))
    tokens = np.concatenate(list(store.kept("tokens"))).reshape(-1)
    numbers |= code_usage(np.bincount(tokens, minlength=tokenizer.config.codebook_size))
    said = remarks(source.num, None, reference, network.sha256, given[:2])
    if reference is None:
        said.append("rfid is to the images themselves")
    result = {
        **numbers,
        "n": source.num,
        "made_from": what,
        "made_on": cut(program),
        "reference": str(reference.path) if reference else None,
        "remarks": said,
        "seconds": time.monotonic() - began,
    }
    from_main(lambda: write_json(out / "result.json", result))
    return result
