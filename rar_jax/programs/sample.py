"""Sample images of given classes into PNG files and a labelled grid."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from PIL import Image

from rar_jax.config import require
from rar_jax.data.class_names import parse_classes
from rar_jax.data.crops import to_pixels
from rar_jax.data.decode import decode_image
from rar_jax.errors import ConfigError, DecodeError
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.pipeline import load
from rar_jax.runs.pictures import save_image_grid
from rar_jax.runs.progress import track_progress
from rar_jax.weights.loading import Reading

MAX_IMAGES = 100_000
ROWS, COLUMNS = 50, 16  # of the grid


def sample_classes(
    weights: str,
    out: pathlib.Path,
    *,
    classes: str | None,
    per_class: int,
    complete: pathlib.Path | None,
    mask: pathlib.Path | None,
    keep_pixels: bool,
    seed: int,
    sampling: dict[str, Any],
    tokenizer: str | None,
    dtype: str | None,
    tensor: int,
    batch_size: int | None,
    reading: Reading,
    quiet: bool,
) -> None:
    """Write out/<class>_<n>.png and out/grid.png, a row per class; all classes if `classes` is None.

    complete, mask: image of which each sample draws the part that is white in the mask.

    All devices of all processes draw, `tensor` of them share one copy of the generator. Process 0 writes.
    """
    require(per_class >= 1, f"--per-class is {per_class}: it must be at least 1")
    require(not out.exists() or out.is_dir(), f"--out {out} is not a folder: choose another")
    require((complete is None) == (mask is None), "--complete and --mask go together: give both")
    require(complete is not None or not keep_pixels, "--keep-pixels is of --complete")
    mesh = make_mesh(MeshConfig(tensor=tensor))
    pipeline = load(weights, tokenizer=tokenizer, dtype=dtype, mesh=mesh, **vars(reading))
    names = pipeline.class_names
    labels = list(range(len(names))) if classes is None else parse_classes(classes, names)
    labels = list(dict.fromkeys(labels))  # "3,2-4" names 3 twice
    total = len(labels) * per_class
    require(total <= MAX_IMAGES, f"{total} images are more than {MAX_IMAGES}: draw parts, with different seeds")
    each = np.repeat(labels, per_class)
    how = {"seed": seed, "batch_size": batch_size, **sampling}
    if complete and mask:
        spec = pipeline.tokenizer.module.image_spec(pipeline.tokenizer.config)
        image, white = _read_pixels(complete, spec.shape[-1]), _read_pixels(mask, 1)[..., 0] > 127
        batches = pipeline.complete_batches(image, white, each, keep_pixels=keep_pixels, **how)
    else:
        batches = pipeline.sample_batches(each, **how)
    count = pipeline.batch_count(len(each), batch_size)
    from_main(lambda: out.mkdir(parents=True, exist_ok=True))
    done, shown = 0, []
    for batch in track_progress(batches, count, f"sample {total} images", "batches", quiet):
        for image in batch:  # written as they come, so that nothing is lost by an interruption
            row, n = divmod(done, per_class)
            squeezed = image[..., 0] if image.shape[-1] == 1 else image
            if is_main():
                Image.fromarray(squeezed).save(out / f"{labels[row]:04d}_{n:03d}.png")
            shown += [image] if row < ROWS and n < COLUMNS else []
            done += 1
    if is_main():
        save_image_grid(np.stack(shown), [names[label].split(",")[0] for label in labels[:ROWS]], out / "grid.png")
        if not quiet:
            print(f"{done} images in {out}, {len(shown)} of them in {out / 'grid.png'}")


def _read_pixels(path: pathlib.Path, channels: int) -> np.ndarray:
    try:
        return to_pixels(decode_image(path.read_bytes(), channels=channels))
    except DecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
