"""The verb `inspect`: what a token store or a source of images holds, and what is wrong with it.

Another kind of thing is one more function that makes a report, one that tells it, and one line in KINDS.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rar_jax.config import ConfigError, require
from rar_jax.data.decode import DecodeError, read_header
from rar_jax.data.encoded import EncodedSource, reason_of
from rar_jax.data.folder import SUFFIXES
from rar_jax.data.sources import ARRAYS, SPECS, ImageSource, Split, load_source
from rar_jax.data.token_store import StoreError, TokenStore
from rar_jax.evaluation.reconstruction import code_usage
from rar_jax.training.pictures import grid
from rar_jax.training.report import progress

# What is told: JSON values, of which "kind", "name" and "problems" are in every report.
Report = dict[str, Any]

LISTED = 20  # problems, and classes of a table; of more classes the smallest, the median and the largest
ROWS, COLUMNS, CELL = 10, 8, 128  # classes, images of each and pixels in the picture
PICTURE = pathlib.Path("inspect.png")
_BLOCK = 65_536  # records of a store at a time


def inspect(what: str, **flags: Any) -> Report:
    """Looks at a thing.

    Args:
      what: any of KINDS. flags: of its kind, as the keywords of its function; None is its default.

    Returns: a report; report["problems"] is {"total": how many, "first": [[name, reason], ...]}.
    Raises: ConfigError for a thing that is not known, or a flag that its kind does not have; what opening it raises.
    """
    kind = next((kind for kind in KINDS if kind.takes(what)), None)
    if kind is None:
        missing = "" if pathlib.Path(what).exists() else ", and there is no such file or folder"
        known = "; ".join(kind.known_as for kind in KINDS)
        raise ConfigError(f"{what} is nothing that inspect knows{missing}. It knows {known}")
    given = {name: value for name, value in flags.items() if value is not None}
    if wrong := [name for name in given if name not in kind.flags]:
        raise ConfigError(f"--{wrong[0].replace('_', '-')} means nothing for {what}: leave it out")
    for name in {"image_size", "limit", "problems"} & given.keys():
        require(given[name] >= 1, f"--{name.replace('_', '-')} is {given[name]}: at least 1")
    return kind.look(what, **given)


def tell(report: Report) -> str:
    """A report as lines of text."""
    return "\n".join(next(kind for kind in KINDS if kind.name == report["kind"]).tell(report))


# ---------------------------------------------------------------- images


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
    spec = f"folder:{what}" if _class_folders(what) else what
    kind, _, folder = spec.partition(":")
    out = PICTURE if out is None else out
    require(
        kind != "folder" or pathlib.Path(folder).expanduser().resolve() not in out.resolve().parents,
        f"the picture {out} would lie among the images of {spec}: give --out, a file elsewhere",
    )
    source = load_source(spec, split) if kind in ARRAYS else load_source(spec, split, image_size=CELL, crop="center")
    files = source if isinstance(source, EncodedSource) else None
    images = _spread(source.num_images, limit)
    shown = functools.partial(progress, description=f"inspect {spec}", unit="images", quiet=quiet)
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
            "width": _three(sizes[:, 0]),
            "height": _three(sizes[:, 1]),
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
    lines = [
        f"{report['name']}, split {report['split']}",
        f"  images     {images:,}",
        f"  looked at  {some}; {looked - good:,} cannot be used",
        f"  bytes      {_readable(report['bytes'])}",
    ]
    if good:
        for name in ("width", "height"):
            least, middle, most = (f"{sizes[name][key]:,}" for key in ("min", "median", "max"))
            lines.append(f"  {name:10} {least} to {most}, median {middle}")
        lines += [
            f"  small      {sizes['below']:,} have a side below {sizes['image_size']:,}",
            f"  kinds      {_counts(report['kinds'])}",
            f"  modes      {_counts(report['modes'])}",
            f"  turned     {report['turned']:,} are turned or mirrored by their EXIF",
        ]
    lines += _class_lines(report["class_names"], report["per_class"], report["per_class_of"])
    lines += _problem_lines(report)
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
            data, label = source.encoded(image), source.label(image)
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
    labels = [sorted(of_class)[i] for i in _spread(len(of_class), ROWS)]
    columns = max(len(of_class[label]) for label in labels)
    cells = np.full((len(labels), columns, *source.image_shape), 255, np.uint8)  # white where a class has fewer
    for row, label in zip(cells, labels, strict=True):
        row[: len(of_class[label])] = source.gather(np.array(of_class[label]))["images"]
    names = [source.class_names[label].split(",")[0] for label in labels]
    grid(cells.reshape(-1, *source.image_shape), names, out, title=title)
    return True


def _class_folders(what: str) -> bool:
    """Whether it is a folder with images in folders in it, or, in two splits, in folders of those."""
    found = itertools.chain.from_iterable(pathlib.Path(what).glob(pattern) for pattern in ("*/*", "*/*/*"))
    return any(path.suffix.lower() in SUFFIXES for path in found)


def _is_source(what: str) -> bool:
    kind = what.partition(":")[0]
    return what in SPECS or any(spec.startswith(f"{kind}:") for spec in SPECS if ":" in what)


# ---------------------------------------------------------------- token stores


def inspect_tokens(what: str, *, problems: int = LISTED, quiet: bool = False) -> Report:
    """Verifies and counts a token store.

    Returns: a report; of a damaged store "codes" and "per_class" are None.
    Raises: StoreError if it cannot be opened.
    """
    store = TokenStore(what)
    card, found = store.card, []
    shown = functools.partial(progress, quiet=quiet)
    codes: dict[str, Any] | None = None
    per_class = np.zeros(store.num_classes, np.int64)
    try:
        store.verify(seen=functools.partial(shown, description=f"verify {what}", unit="shards"))
    except StoreError as error:
        found.append([what, str(error)])
    else:
        counts = np.zeros(store.codebook_size, np.int64)
        for start in shown(range(0, len(store), _BLOCK), description=f"count {what}", unit="blocks"):
            rows = store.gather(np.arange(start, min(start + _BLOCK, len(store))))
            counts += np.bincount(rows["tokens"].reshape(-1), minlength=len(counts))
            per_class += np.bincount(rows["labels"], minlength=len(per_class))
        codes = {"used": int((counts > 0).sum()), **code_usage(counts)}
    files = [store.folder / shard["name"] for shard in card["shards"]]
    keys = ("source", "tokenizer_sha256", "codebook_size", "grid", "crops", "num_classes")
    return {
        "kind": "token store",
        "name": what,
        **{key: card[key] for key in keys},
        "tokenizer": card.get("tokenizer"),
        "records": len(store),
        "images": card.get("num_images"),
        "bad_images": card.get("num_bad_images"),
        "shards": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "codes": codes,
        "class_names": list(store.class_names),
        "per_class": per_class.tolist() if codes else None,
        "problems": {"total": len(found), "first": found[:problems]},
    }


def tell_tokens(report: Report) -> list[str]:
    """The report of `inspect_tokens` as lines."""
    codes, tokenizer = report["codes"], report["tokenizer"] or {}
    made_by = f"{tokenizer.get('name', 'a tokenizer')}, sha256 {report['tokenizer_sha256'] or 'not known'}"
    lines = [
        f"{report['name']}, a token store",
        f"  source     {report['source']}",
        f"  tokenizer  {made_by}",
        f"  records    {report['records']:,} of a grid {report['grid']} of tokens, {report['codebook_size']:,} codes",
    ]
    if report["images"] is not None:
        crops = f"{len(report['crops'])} crop(s): {'; '.join(report['crops'])}"
        lines.append(f"  images     {report['images']:,}; {report['bad_images']:,} more could not be decoded")
        lines.append(f"  crops      {crops}")
    lines.append(f"  shards     {report['shards']:,}, {_readable(report['bytes'])}")
    if codes:
        lines.append(f"  codes      {codes['used']:,} are used, perplexity {codes['perplexity']:,.1f}")
        lines += _class_lines(report["class_names"], report["per_class"], "records")
        lines.append("  checksums  verified")
    lines += _problem_lines(report)
    return [*lines, f"  pictures   rar-jax tokenize --verify {report['name']} --weights TOKENIZER"]


def _is_store(what: str) -> bool:
    """Also an unfinished one, of which opening tells what is missing."""
    folder = pathlib.Path(what)
    return (folder / "card.json").is_file() or (folder / "making.json").is_file()


# ---------------------------------------------------------------- what reports share


def _spread(count: int, most: int | None) -> np.ndarray:
    """int64, the numbers below `count`, or `most` of them at equal distances."""
    return np.unique(np.linspace(0, count - 1, min(count, most or count)).astype(np.int64))


def _three(values: np.ndarray) -> dict[str, int] | None:
    if not len(values):
        return None
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _readable(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _class_lines(names: Sequence[str], counts: Sequence[int], of: str) -> list[str]:
    """A table of up to LISTED classes; of more, three of them and those that are empty."""
    if len(names) <= LISTED:
        lines = [f"    {count:9,}  {name}" for name, count in zip(names, counts, strict=True)]
    else:
        order = np.argsort(counts, kind="stable")
        places = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
        lines = [f"    {counts[i]:9,}  {names[i]} ({which})" for which, i in places.items()]
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            more = f", and {len(empty) - LISTED:,} more" if len(empty) > LISTED else ""
            lines.append(f"    {len(empty):,} have none: {'; '.join(empty[:LISTED])}{more}")
    return [f"  classes    {len(names):,}, of so many {of}:", *lines]


def _problem_lines(report: Report) -> list[str]:
    problems = report["problems"]
    lines = [f"    {name}: {reason}" for name, reason in problems["first"]]
    more = problems["total"] - len(lines)
    return [f"  problems   {problems['total']:,}", *lines, *([f"    and {more:,} more: --problems N"] if more else [])]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of thing. known_as: for people. takes: whether WHAT is one. look: makes the report, with these flags."""

    name: str
    known_as: str
    takes: Callable[[str], bool]
    look: Callable[..., Report]
    tell: Callable[[Report], list[str]]
    flags: tuple[str, ...]


KINDS = (
    Kind(
        "token store",
        "a token store (a folder with card.json)",
        _is_store,
        inspect_tokens,
        tell_tokens,
        ("problems", "quiet"),
    ),
    Kind(
        "images",
        f"a folder with a folder of images for each class, and the sources {', '.join(SPECS)}",
        lambda what: _is_source(what) or _class_folders(what),
        inspect_images,
        tell_images,
        ("split", "image_size", "limit", "problems", "out", "quiet"),
    ),
)
