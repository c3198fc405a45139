"""`inspect` of a source of images."""

from __future__ import annotations

import collections
import pathlib
from typing import NamedTuple

import numpy as np

from rar_jax.config import require
from rar_jax.data.decode import read_header
from rar_jax.data.encoded import EncodedSource, reason_of
from rar_jax.data.folder import SUFFIXES
from rar_jax.data.sources import ARRAYS, SPECS, ImageSource, Split, load_source
from rar_jax.runs.pictures import save_image_grid
from rar_jax.runs.progress import track_progress
from rar_jax.tools.inspect.layout import LISTED, Summary

ROWS, COLUMNS, CELL = 10, 8, 128  # of the picture: classes, images per class, pixels per image


class GoodImage(NamedTuple):
    """An image that can be used, as its file stores it."""

    number: int
    label: int
    width: int
    height: int
    format: str
    mode: str
    rotated: bool
    bytes: int


def is_source(target: str) -> bool:
    """Whether it is a source as in `load_source`, or a folder of class folders."""
    kind = target.partition(":")[0]
    known = target in SPECS or any(spec.startswith(f"{kind}:") for spec in SPECS if ":" in target)
    return known or _has_class_folders(target)


def inspect_source(
    target: str,
    *,
    split: Split = "train",
    image_size: int = 256,
    limit: int | None = None,
    max_problems: int = LISTED,
    out: pathlib.Path = pathlib.Path("inspect.png"),
    quiet: bool = False,
) -> Summary:
    """Decode the images of a split of a source, and draw some of each class.

    Args:
      target: a source as in `load_source`, or the PATH of folder:PATH.
      image_size: images with a shorter side are counted.
      limit: number of images to check, evenly spaced; None checks all.
      out: file of the picture.

    Returns: a summary; "bytes" to "rotated_by_exif" describe the good images among the checked ones.
    Raises: ConfigError if the source cannot be opened, or the picture would be written among the images.
    """
    spec = f"folder:{target}" if _has_class_folders(target) else target
    kind, _, folder = spec.partition(":")
    inside = kind == "folder" and pathlib.Path(folder).expanduser().resolve() in out.resolve().parents
    require(not inside, f"the picture {out} would be written among the images of {spec}: give --out, a file elsewhere")
    source = load_source(spec, split) if kind in ARRAYS else load_source(spec, split, image_size=CELL, crop="center")
    encoded = source if isinstance(source, EncodedSource) else None
    problems = list(encoded.listed) if encoded else []
    unlisted = encoded.problems.total - len(problems) if encoded else 0  # the source keeps the first problems only
    good, indices = [], _space_evenly(source.num_images, limit)
    for index in track_progress(indices, description=f"inspect {spec}", unit="images", quiet=quiet):
        try:
            good.append(_read_image(source, index))
        except (OSError, ValueError) as error:
            assert encoded is not None
            problems.append((encoded.name(index), reason_of(error)))
    _draw_classes(source, good, out, f"{spec} ({split})")
    # Containers with labels inside their records tell only those of the images that were read.
    labels = encoded.labels if encoded and encoded.labels is not None else [image.label for image in good]
    counts = np.bincount(labels, minlength=source.num_classes).tolist()
    return {
        "kind": "images",
        "name": spec,
        "split": split,
        "num_images": source.num_images,
        "num_checked": len(indices),
        **_summarize_files(good, image_size),
        "num_classes": source.num_classes,
        "counted": "all images" if len(labels) == source.num_images else "good images among the checked ones",
        "classes": [{"count": n, "class": name} for name, n in zip(source.class_names, counts, strict=True)],
        "num_problems": unlisted + len(problems),
        "problems": [{"name": name, "reason": reason} for name, reason in problems[:max_problems]],
        "picture": str(out) if good else None,
    }


def _summarize_files(good: list[GoodImage], image_size: int) -> Summary:
    sizes = {"width": [image.width for image in good], "height": [image.height for image in good]} if good else {}
    return {
        "bytes": sum(image.bytes for image in good),
        **{k: {"min": min(v), "median": int(np.median(v)), "max": max(v)} for k, v in sizes.items()},
        "image_size": image_size,
        "below_image_size": sum(min(image.width, image.height) < image_size for image in good),
        "formats": dict(collections.Counter(image.format for image in good).most_common()),
        "modes": dict(collections.Counter(image.mode for image in good).most_common()),
        "rotated_by_exif": sum(image.rotated for image in good),
    }


def _has_class_folders(target: str) -> bool:
    """Whether a folder holds images at CLASS/IMAGE or SPLIT/CLASS/IMAGE."""
    patterns = ("*/*", "*/*/*")
    return any(path.suffix.lower() in SUFFIXES for pattern in patterns for path in pathlib.Path(target).glob(pattern))


def _read_image(source: ImageSource, index: int) -> GoodImage:
    """Decode an image. Raises: OSError, ValueError if it cannot be used."""
    if not isinstance(source, EncodedSource):
        height, width, channels = source.image_shape
        label = int(source.gather(np.array([index]))["labels"][0])
        mode = "L" if channels == 1 else "RGB"
        return GoodImage(index, label, width, height, "array", mode, False, height * width * channels)
    source.prepare(index)
    data, label = source.read_image(index)
    return GoodImage(index, label, *read_header(data), len(data))


def _draw_classes(source: ImageSource, good: list[GoodImage], out: pathlib.Path, title: str) -> None:
    """Draw the first good images of up to ROWS classes, evenly spaced among those that have any."""
    by_class: dict[int, list[int]] = collections.defaultdict(list)
    for image in good:
        by_class[image.label].append(image.number)
    if not by_class:
        return
    labels = [sorted(by_class)[i] for i in _space_evenly(len(by_class), ROWS)]
    columns = min(COLUMNS, max(len(by_class[label]) for label in labels))
    cells = np.full((len(labels), columns, *source.image_shape), 255, np.uint8)  # white where a class has fewer
    for row, label in zip(cells, labels, strict=True):
        indices = np.array(by_class[label][:columns])
        row[: len(indices)] = source.gather(indices)["images"]
    names = [source.class_names[label].split(",")[0] for label in labels]
    save_image_grid(cells.reshape(-1, *source.image_shape), names, out, title=title)


def _space_evenly(count: int, limit: int | None) -> list[int]:
    """All numbers below `count`, or `limit` evenly spaced ones."""
    return np.unique(np.linspace(0, count - 1, min(count, limit or count)).astype(int)).tolist()
