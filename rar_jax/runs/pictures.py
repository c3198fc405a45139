"""PNG files of a run: labelled grids of images (PIL) and curves (matplotlib)."""

from __future__ import annotations

import fnmatch
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

Path = str | os.PathLike[str]

CELL = 48  # minimum pixels of a cell: small images are enlarged
INK, MARGIN, GAP = (40, 40, 40), 14, 3


# ---------------------------------------------------------------- grids


def draw_image_grid(
    images: np.ndarray,
    row_labels: Sequence[str],
    *,
    column_labels: Sequence[str] = (),
    title: str | None = None,
    gaps: Sequence[int] = (GAP,),
) -> Image.Image:
    """Draw a labelled grid, one row per label: image i is in row i // columns.

    Args:
      images: uint8 (n, y, x, 1 or 3), n a multiple of the number of labels.
      row_labels, column_labels: text beside each row and above each column, such as class names.
      gaps: pixels below the rows, repeated.

    Raises: ValueError if the images are not uint8 images or do not match the labels.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}: they must be uint8 (n, height, width, 1 or 3)")
    rows = len(row_labels)
    if rows == 0 or len(images) == 0 or len(images) % rows:
        raise ValueError(f"{len(images)} images do not fill {rows} rows: give the same number for each label")
    columns = len(images) // rows
    if column_labels and len(column_labels) != columns:
        raise ValueError(f"{len(column_labels)} column labels for {columns} columns: give one for each")
    scale = max(1, math.ceil(CELL / min(images.shape[1:3])))
    images = np.broadcast_to(images, (*images.shape[:3], 3)).repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1:3]

    font, title_font = _font("DejaVuSans", max(12, min(18, height // 4))), _font("DejaVuSans-Bold", 18)
    left = MARGIN + math.ceil(max(font.getlength(label) for label in row_labels)) + 10
    heading = MARGIN + (32 if title else 0)
    top = heading + (math.ceil(font.size) + 8 if column_labels else 0)
    tops = top + height * np.arange(rows) + np.cumsum([0, *(gaps[row % len(gaps)] for row in range(rows - 1))])
    right = left + columns * (width + GAP) - GAP
    if title:
        right = max(right, MARGIN + math.ceil(title_font.getlength(title)))
    picture = Image.new("RGB", (right + MARGIN, int(tops[-1]) + height + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN - 2), title, INK, title_font)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + GAP) + width // 2, heading), label, INK, font, anchor="ma")
    for label, y in zip(row_labels, tops, strict=True):
        draw.text((left - 10, int(y) + height // 2), label, INK, font, anchor="rm")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture.paste(Image.fromarray(image), (left + column * (width + GAP), int(tops[row])))
    return picture


def save_image_grid(images: np.ndarray, row_labels: Sequence[str], path: Path, **options: Any) -> None:
    """Save the picture that `draw_image_grid` draws, with its options, as a PNG file."""
    picture = draw_image_grid(images, row_labels, **options)
    _replace(path, lambda temporary: picture.save(temporary, format="png", optimize=True))


def save_image_pairs(originals: np.ndarray, reconstructions: np.ndarray, path: Path, *, columns: int = 12) -> None:
    """Save rows that alternate originals and reconstructions, uint8 (n, y, x, 1 or 3), one below the other.

    Raises: ValueError if there are none, they are not uint8 images, or the two differ in shape.
    """
    n = len(originals)
    if originals.shape != reconstructions.shape or n == 0:
        raise ValueError(f"originals {originals.shape}, reconstructions {reconstructions.shape}: give as many, >= 1")
    columns = min(columns, n)
    blocks = math.ceil(n / columns)
    pairs = np.stack([originals, reconstructions])
    pairs = np.pad(pairs, ((0, 0), (0, blocks * columns - n), (0, 0), (0, 0), (0, 0)), constant_values=255)
    cells = pairs.reshape(2, blocks, columns, *originals.shape[1:]).swapaxes(0, 1)
    labels = ["original", "reconstruction"] * blocks
    save_image_grid(cells.reshape(-1, *originals.shape[1:]), labels, path, gaps=(GAP, 14))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font, so pictures look alike on every machine.
    return ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def _replace(path: Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write a file that is complete or, after a kill, still the old one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------- curves

# (title, unit, stage, {metric: label}). Metrics may be patterns; "*" in a label is the metric's name.
_PANELS = (
    ("Generator loss", "", "generator", {"loss": "training", "validation/*loss": "*"}),
    ("Share of random orders", "", "generator", {"random_ratio": ""}),
    ("Fréchet distance of samples", "", "generator", {"fd_classifier_n*": "*"}),
    ("Tokenizer PSNR", "dB", "tokenizer", {"psnr": "training", "validation/psnr": "validation"}),
    ("Codebook usage", "share of codes", "tokenizer", {"codebook_usage": ""}),
    ("Classifier accuracy", "", "classifier", {"accuracy": "training", "validation/accuracy": "validation"}),
)  # fmt: skip
_COLOURS = ("#3b6fb6", "#d1495b", "#2a9d78", "#8a5fb0")


def plot_curves(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Save the curves of `read_metrics` as a PNG file; a panel without data is left out.

    Raises: ValueError if no row holds a metric that is drawn.
    """
    rows = list(rows)
    panels = [
        (title, unit, lines) for title, unit, stage, metrics in _PANELS if (lines := _lines(stage, metrics, rows))
    ]
    if not panels:
        raise ValueError("no metric to draw in these rows: the run has reported nothing yet")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.6 * across, 3.3 * down), dpi=110, layout="constrained", facecolor="white")
    for position, (title, unit, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(down, across, position)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for (label, steps, values), colour in zip(lines, _COLOURS, strict=False):
            if label == "training":  # noisy: pale, with its running mean over it
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                values = _running_mean(values, max(1, len(values) // 25))
            marker = "o" if len(values) < 40 and label != "training" else None
            axes.plot(steps, values, label=label, color=colour, linewidth=1.8, marker=marker, markersize=3)
        if any(label for label, *_ in lines):
            axes.legend(fontsize=8, frameon=False)
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    _replace(path, lambda temporary: figure.savefig(temporary, format="png"))


def _lines(
    stage: str, metrics: Mapping[str, str], rows: Iterable[Mapping[str, Any]]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(label, steps, values) of each metric that has data."""
    lines: list[tuple[str, np.ndarray, np.ndarray]] = []
    mine = [row for row in rows if row["stage"] == stage]
    for pattern, label in metrics.items():
        for name in dict.fromkeys(name for row in mine for name in row if fnmatch.fnmatchcase(name, pattern)):
            points = sorted((row["step"], row[name]) for row in mine if row.get(name) is not None)
            if points:
                steps, values = np.array(points, np.float64).T
                lines.append((label.replace("*", name), steps, values))
    return lines


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values, over fewer at the start; (n,) -> (n,)."""
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return np.convolve(values, np.ones(window))[: len(values)] / counts
