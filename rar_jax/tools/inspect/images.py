"""`inspect` of a source of images."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import numpy as np

from rar_jax.config import require
from rar_jax.data.decode import read_header
from rar_jax.data.encoded import EncodedSource, reason_of
from rar_jax.data.folder import SUFFIXES
from rar_jax.data.sources import ARRAYS, SPECS, ImageSource, Split, load_source
from rar_jax.errors import DecodeError
from rar_jax.runs.pictures import save_image_grid
from rar_jax.runs.progress import track_progress
from rar_jax.tools.inspect.text import LISTED, Report, class_lines, counts, problem_lines, readable, spread, three

ROWS, COLUMNS, CELL = 10, 8, 128  # classes, images of each and pixels in the picture
PICTURE = pathlib.Path("inspect.png")


def inspect_images(
    what: str,
    *,
    split: Split = "train",
    image_size: int = 256,
    limit: int | None = None,
    problems: int = LISTED,
    out: pathlib.Path | None = None,
    quiet: bool = False,
) -> Report:
    """Reads and decodes the images of a split of a source, and draws some of each class.

    Args:
      what: a source as `load_source` takes it, or the PATH of folder:PATH. image_size: images below it are counted.
      limit: how many images to look at, at equal distances; default all. problems: how many to list.
      out: the picture, default inspect.png in the current folder.

    Returns: a report; "sizes", "kinds", "modes", "turned" and "bytes" are of the good images that were looked at.
    Raises: ConfigError if the source cannot be opened, or the picture would lie among the images.
    """
    spec = f"folder:{what}" if class_folders(what) else what
    kind, _, folder = spec.partition(":")
    out = PICTURE if out is None else out
    require(
        kind != "folder" or pathlib.Path(folder).expanduser().resolve() not in out.resolve().parents,
        f"the picture {out} would lie among the images of {spec}: give --out, a file elsewhere",
    )
    source = load_source(spec, split) if kind in ARRAYS else load_source(spec, split, image_size=CELL, crop="center")
    files = source if isinstance(source, EncodedSource) else None
    images = spread(source.num_images, limit)
    shown = functools.partial(track_progress, description=f"inspect {spec}", unit="images", quiet=quiet)
    seen = _look_into_files(files, images, shown) if files is not None else _look_into_arrays(source, images, shown)
    # Labels of all images, or where reading alone tells them, of the good ones that were looked at.
    known = files.labels if files is not None and files.labels is not None else seen.labels
    per_class = np.bincount(known, minlength=source.num_classes)
    sizes = np.array(seen.sizes, np.int64).reshape(-1, 2)
    # Nothing was gathered yet: what the source knows of is from when it was listed, and it keeps the first of it only.
    listed, first = (len(files.problems), files.listed) if files is not None else (0, ())
    first = [[name, reason] for name, reason in (*first, *seen.problems)][:problems]
    drawn = _draw(source, seen, out, f"{spec} ({split})")
    return {
        "kind": "images",
        "name": spec,
        "split": split,
        "images": source.num_images,
        "looked_at": len(images),
        "bytes": seen.bytes,
        "sizes": {
            "width": three(sizes[:, 0]),
            "height": three(sizes[:, 1]),
            "image_size": image_size,
            "below": int((sizes.min(axis=1) < image_size).sum()) if len(sizes) else 0,
        },
        "kinds": dict(seen.kinds.most_common()),
        "modes": dict(seen.modes.most_common()),
        "turned": seen.turned,
        "class_names": list(source.class_names),
        "per_class": per_class.tolist(),
        "per_class_of": "images" if len(known) == source.num_images else "good images looked at",
        "problems": {"total": listed + len(seen.problems), "first": first},
        "picture": str(out) if drawn else None,
    }


def tell_images(report: Report) -> list[str]:
    """The report of `inspect_images` as lines."""
    images, looked, good = report["images"], report["looked_at"], sum(report["kinds"].values())
    sizes = report["sizes"]
    some = f"{looked:,}, spread evenly: what follows is of them" if looked < images else "all"
    other = "heldout" if report["split"] == "train" else "train"
    lines = [
        f"{report['name']}, split {report['split']}; --split {other} looks at the others",
        f"  images     {images:,}",
        f"  looked at  {some}; {looked - good:,} cannot be used",
        f"  bytes      {readable(report['bytes'])}",
    ]
    if good:
        for name in ("width", "height"):
            least, middle, most = (f"{sizes[name][key]:,}" for key in ("min", "median", "max"))
            lines.append(f"  {name:10} {least} to {most}, median {middle}")
        lines += [
            f"  small      {sizes['below']:,} have a side below {sizes['image_size']:,}",
            f"  kinds      {counts(report['kinds'])}",
            f"  modes      {counts(report['modes'])}",
            f"  turned     {report['turned']:,} are turned or mirrored by their EXIF",
        ]
    lines += class_lines(report["class_names"], report["per_class"], report["per_class_of"])
    lines += problem_lines(report)
    return [*lines, f"  picture    {report['picture'] or 'none: there is no image to draw'}"]


@dataclasses.dataclass
class _Seen:
    """What was found in images; sizes (width, height) and the rest are of the good ones, `images` and `labels` theirs."""

    images: list[int] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    modes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    turned: int = 0
    bytes: int = 0


def _look_into_files(source: EncodedSource, images: np.ndarray, shown: Any) -> _Seen:
    seen = _Seen()
    for image in shown(images.tolist()):
        try:
            if reason := source.problem(image):
                raise DecodeError(reason)
            data, label = source.read_image(image)
        except (OSError, ValueError) as error:
            seen.problems.append((source.name(image), reason_of(error)))
            continue
        header = read_header(data)
        seen.images.append(image)
        seen.labels.append(label)
        seen.sizes.append((header.width, header.height))
        seen.kinds[header.kind] += 1
        seen.modes[header.mode] += 1
        seen.turned += header.turned
        seen.bytes += len(data)
    return seen


def _look_into_arrays(source: ImageSource, images: np.ndarray, shown: Any) -> _Seen:
    height, width, channels = source.image_shape
    labels = [int(source.gather(images[[i]])["labels"][0]) for i in shown(range(len(images)))]
    return _Seen(
        images=images.tolist(),
        labels=labels,
        sizes=[(width, height)] * len(images),
        kinds=collections.Counter({"array": len(images)}),
        modes=collections.Counter({"L" if channels == 1 else "RGB": len(images)}),
        bytes=len(images) * height * width * channels,
    )


def _draw(source: ImageSource, seen: _Seen, out: pathlib.Path, title: str) -> bool:
    """The first good images of up to ROWS classes, evenly spread over those that have any. Returns: whether there are any."""
    of_class: dict[int, list[int]] = collections.defaultdict(list)
    for image, label in zip(seen.images, seen.labels, strict=True):
        if len(of_class[label]) < COLUMNS:
            of_class[label].append(image)
    if not of_class:
        return False
    labels = [sorted(of_class)[i] for i in spread(len(of_class), ROWS)]
    columns = max(len(of_class[label]) for label in labels)
    cells = np.full((len(labels), columns, *source.image_shape), 255, np.uint8)  # white where a class has fewer
    for row, label in zip(cells, labels, strict=True):
        row[: len(of_class[label])] = source.gather(np.array(of_class[label]))["images"]
    names = [source.class_names[label].split(",")[0] for label in labels]
    save_image_grid(cells.reshape(-1, *source.image_shape), names, out, title=title)
    return True


def class_folders(what: str) -> bool:
    """Whether it is a folder with images in folders in it, or, in two splits, in folders of those."""
    found = itertools.chain.from_iterable(pathlib.Path(what).glob(pattern) for pattern in ("*/*", "*/*/*"))
    return any(path.suffix.lower() in SUFFIXES for path in found)


def is_source(what: str) -> bool:
    """Whether it is a source as `load_source` takes it."""
    kind = what.partition(":")[0]
    return what in SPECS or any(spec.startswith(f"{kind}:") for spec in SPECS if ":" in what)
