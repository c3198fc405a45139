"""Samples images of named classes into PNG files and a labelled grid."""

from __future__ import annotations

import pathlib
import re

import numpy as np
from PIL import Image

from rar_jax.config import nearest, require
from rar_jax.errors import ConfigError
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.pipeline import load
from rar_jax.runs.pictures import save_image_grid
from rar_jax.runs.progress import track_progress
from rar_jax.sampling import Guidance

MOST = 100_000  # images of one command
ROWS, COLUMNS = 50, 16  # of the grid


def parse_classes(text: str, class_names: tuple[str, ...]) -> list[int]:
    """Class numbers of "3,sneaker,0-4": numbers, ranges, or names, whatever their case.

    Args:
      class_names: one a class, with its synonyms: "tench, Tinca tinca".

    Raises: ConfigError naming the nearest class for a name that is none, and the numbers for one that is several.
    """
    synonyms: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        for synonym in {name.lower(), *(part.strip() for part in name.lower().split(","))}:
            synonyms.setdefault(synonym, []).append(label)
    labels: list[int] = []
    for part in (" ".join(p.split()) for p in text.split(",")):
        first, dash, last = part.partition("-")
        if part.isdecimal():
            labels.append(int(part))
        elif dash and first.isdecimal() and last.isdecimal():
            if int(first) > int(last):
                raise ConfigError(f"classes {part}: a range is LOW-HIGH, as in {last}-{first}")
            if int(last) >= len(class_names):
                raise ConfigError(f"classes {part} go beyond 0..{len(class_names) - 1}")
            labels.extend(range(int(first), int(last) + 1))
        elif len(found := synonyms.get(part.lower(), [])) == 1:
            labels.append(found[0])
        elif found:
            which = " or ".join(f"{label} ({class_names[label]})" for label in found)
            raise ConfigError(f"'{part}' is {len(found)} classes: give {which}")
        elif re.fullmatch("-[0-9]+", part):
            raise ConfigError(f"class {part} is outside 0..{len(class_names) - 1}")
        elif re.fullmatch("[0-9]+-", part):
            raise ConfigError(f"classes {part}: a range is LOW-HIGH, as in 0-{len(class_names) - 1}")
        else:
            raise ConfigError(f"no class '{part}'.{_suggest(part.lower(), synonyms)}")
    return labels


def _suggest(name: str, synonyms: dict[str, list[int]]) -> str:
    """Classes of which the name is a word, else the nearest."""
    holding = [f"{synonym} ({labels[0]})" for synonym, labels in synonyms.items() if name and name in synonym.split()]
    if holding:
        return f" There is: {', '.join(holding[:8])}{', ...' if len(holding) > 8 else ''}."
    few = list(synonyms) if len(synonyms) <= 20 else []  # a thousand names are no help
    return nearest(name, synonyms) if "Did you mean" in nearest(name, synonyms) else nearest(name, few)


def sample(
    weights: str,
    out: pathlib.Path,
    *,
    classes: str | None,
    per_class: int,
    seed: int,
    guidance: Guidance | None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    tensor: int = 1,
    batch_size: int | None = None,
    download: bool = False,
    quiet: bool = False,
) -> None:
    """Writes out/<class>_<n>.png and out/grid.png, a row a class; all classes if `classes` is None.

    Drawn on all devices of all processes, of which `tensor` share one copy of the generator; process 0 writes.
    """
    require(per_class >= 1, f"--per-class is {per_class}: it must be at least 1")
    require(not out.exists() or out.is_dir(), f"--out {out} is not a folder: choose another")
    mesh = make_mesh(MeshConfig(tensor=tensor))
    pipeline = load(weights, tokenizer=tokenizer, dtype=dtype, download=download, mesh=mesh)
    names = pipeline.class_names
    labels = list(range(len(names))) if classes is None else parse_classes(classes, names)
    labels = list(dict.fromkeys(labels))  # "3,2-4" names 3 twice; its files would overwrite each other
    total = len(labels) * per_class
    require(total <= MOST, f"{total} images are more than {MOST}: draw them in parts, with other seeds")
    each = np.repeat(labels, per_class)
    batches = pipeline.sample_batches(each, seed=seed, guidance=guidance, batch_size=batch_size)
    count = pipeline.batch_count(len(each), batch_size)
    from_main(lambda: out.mkdir(parents=True, exist_ok=True))
    done, shown = 0, []
    for batch in track_progress(batches, count, f"sample {total} images", "batches", quiet):
        for image in batch:  # written as they come, so that nothing is lost when it is stopped
            row, n = divmod(done, per_class)
            squeezed = image[..., 0] if image.shape[-1] == 1 else image
            if is_main():
                Image.fromarray(squeezed).save(out / f"{labels[row]:04d}_{n:03d}.png")
            shown += [image] if row < ROWS and n < COLUMNS else []
            done += 1
    if not is_main():
        return
    save_image_grid(np.stack(shown), [names[label].split(",")[0] for label in labels[:ROWS]], out / "grid.png")
    if not quiet:
        print(f"{done} images in {out}, {'all' if done == len(shown) else len(shown)} of them in {out / 'grid.png'}")
