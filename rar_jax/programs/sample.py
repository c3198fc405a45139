"""Samples images of named classes into PNG files and a labelled grid."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image

from rar_jax.config import ConfigError, nearest, require
from rar_jax.guidance import Guidance
from rar_jax.pipeline import load
from rar_jax.training.pictures import grid


def parse_classes(text: str, class_names: tuple[str, ...]) -> list[int]:
    """Class numbers of "3,sneaker,0-4": numbers, ranges, or names.

    Raises: ConfigError naming the nearest class for a name that is none.
    """
    labels: list[int] = []
    names = [name.lower() for name in class_names]
    for part in (p.strip() for p in text.split(",")):
        first, dash, last = part.partition("-")
        if part.isdecimal():
            labels.append(int(part))
        elif dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            labels.extend(range(int(first), int(last) + 1))
        elif part.lower() in names:
            labels.append(names.index(part.lower()))
        else:
            raise ConfigError(f"no class '{part}'.{nearest(part.lower(), names)}")
    return labels


def sample(
    weights: str,
    out: pathlib.Path,
    *,
    classes: str | None,
    per_class: int,
    seed: int,
    guidance: Guidance | None,
    tokenizer: str | None = None,
    quiet: bool = False,
) -> None:
    """Writes out/<class>_<n>.png and out/grid.png, a row a class; all classes if `classes` is None."""
    pipeline = load(weights, tokenizer=tokenizer)
    names = pipeline.class_names
    labels = list(range(len(names))) if classes is None else parse_classes(classes, names)
    labels = list(dict.fromkeys(labels))  # "3,2-4" names 3 twice; its files would overwrite each other
    require(per_class >= 1, f"--per-class is {per_class}: it must be at least 1")
    require(not out.exists() or out.is_dir(), f"--out {out} is not a folder: choose another")
    images = pipeline.sample(np.repeat(labels, per_class), seed=seed, guidance=guidance)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        squeezed = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(squeezed).save(out / f"{labels[i // per_class]:04d}_{i % per_class:03d}.png")
    grid(images, [names[label] for label in labels], out / "grid.png")
    if not quiet:
        print(f"{len(images)} images in {out}, all of them in {out / 'grid.png'}")
