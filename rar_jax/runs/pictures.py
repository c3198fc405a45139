"""PNG files that a person looks at: labelled grids of images, reconstructions, and curves of a run.

Shapes: n images, y x height width, c channels (1 or 3).
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

Path = str | os.PathLike[str]

CELL = 48  # small images are enlarged until a cell is at least this many pixels
INK, PALE = (40, 40, 40), (228, 228, 228)


# ---------------------------------------------------------------- grids


def grid(
    images: np.ndarray, row_labels: Sequence[str], path: Path, *, scale: int | None = None, title: str | None = None
) -> None:
    """Writes a labelled grid, one row a label: image i is in row i // columns.

    Args:
      images: uint8 (n, y, x, 1 or 3), n a multiple of the number of labels.
      row_labels: text at the left of each row, such as class names.
      path: the PNG file.
      scale: enlargement, nearest neighbour; by default a cell is at least 48 pixels.
      title: a line above the grid.

    Raises: ValueError if the images are not uint8 images or do not fill the rows.
    """
    _save_png(sheet(images, row_labels, scale=scale, title=title), path)


def sheet(
    images: np.ndarray,
    row_labels: Sequence[str],
    *,
    column_labels: Sequence[str] = (),
    scale: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """The picture that `grid` writes, for a notebook to show; `column_labels`: text above each column.

    Raises: ValueError as `grid`, and for another number of column labels than columns.
    """
    rows = len(row_labels)
    _check(images)
    if rows == 0 or len(images) == 0 or len(images) % rows:
        raise ValueError(f"{len(images)} images do not fill {rows} rows: give the same number for each label")
    cells = images.reshape(rows, -1, *images.shape[1:])
    if column_labels and len(column_labels) != cells.shape[1]:
        raise ValueError(f"{len(column_labels)} column labels for {cells.shape[1]} columns: give one for each")
    return _sheet(cells, row_labels, column_labels, scale=scale, title=title, gaps=[3] * rows)


def pairs(
    originals: np.ndarray, reconstructions: np.ndarray, path: Path, *, columns: int = 12, title: str | None = None
) -> None:
    """Writes rows that alternate originals and their reconstructions, one below the other.

    Args:
      originals, reconstructions: uint8 (n, y, x, 1 or 3), in the same order.
      columns: images in a row.

    Raises: ValueError if there are none, they are not uint8 images, or the two differ in shape.
    """
    _check(originals)
    _check(reconstructions)
    if originals.shape != reconstructions.shape or len(originals) == 0:
        raise ValueError(
            f"originals {originals.shape} and reconstructions {reconstructions.shape} must be as many, >= 1"
        )
    columns = min(columns, len(originals))
    blocks = math.ceil(len(originals) / columns)
    empty = ((0, blocks * columns - len(originals)), (0, 0), (0, 0), (0, 0))

    def rows(images: np.ndarray) -> np.ndarray:
        return np.pad(images, empty, constant_values=255).reshape(blocks, columns, *images.shape[1:])

    cells = np.stack([rows(originals), rows(reconstructions)], axis=1).reshape(
        2 * blocks, columns, *originals.shape[1:]
    )
    labels = ["original", "reconstruction"] * blocks
    _save_png(_sheet(cells, labels, (), scale=None, title=title, gaps=[3, 14] * blocks), path)


def _check(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}: they must be uint8 (n, height, width, 1 or 3)")


def _sheet(
    cells: np.ndarray,
    labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scale: int | None,
    title: str | None,
    gaps: Sequence[int],
) -> Image.Image:
    """cells uint8 (rows, columns, y, x, c); gaps in pixels below each row, the last one unused."""
    rows, columns, height, width, _ = cells.shape
    scale = scale or max(1, math.ceil(CELL / min(height, width)))
    cells = np.broadcast_to(cells, (*cells.shape[:-1], 3)).repeat(scale, axis=2).repeat(scale, axis=3)
    height, width = height * scale, width * scale

    label_font, title_font = _font(max(12, min(18, height // 4))), _font(18, bold=True)
    margin, gap = 14, 3
    left = margin + math.ceil(max(label_font.getlength(label) for label in labels)) + 10
    heading = margin + (32 if title else 0)
    top = heading + (math.ceil(label_font.size) + 8 if column_labels else 0)
    sheet_width = left + columns * (width + gap) - gap + margin
    if title:
        sheet_width = max(sheet_width, 2 * margin + math.ceil(title_font.getlength(title)))
    sheet_height = top + rows * height + sum(gaps[: rows - 1]) + margin
    picture = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((margin, margin - 2), title, INK, title_font)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + gap) + width // 2, heading), label, INK, label_font, anchor="ma")
    y = top
    for row, label in enumerate(labels):
        draw.text((left - 10, y + height // 2), label, INK, label_font, anchor="rm")
        for column in range(columns):
            x = left + column * (width + gap)
            picture.paste(Image.fromarray(cells[row, column]), (x, y))
        y += height + gaps[row]
    return picture


def _save_png(picture: Image.Image, path: Path) -> None:
    _save(path, lambda temporary: picture.save(temporary, format="png", optimize=True))


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font, so pictures look alike on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _save(path: Path, write: Callable[[pathlib.Path], object]) -> None:
    """A killed run leaves the whole old picture or the whole new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------- curves


class _Curve(NamedTuple):
    stage: str
    metric: str  # a name, or its beginning followed by *
    label: str
    factor: float = 1.0
    noisy: bool = False  # drawn pale, with its running mean over it


class _Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[_Curve, ...]


_PANELS = (
    _Panel(
        "Generator loss",
        "bits a token",
        (
            _Curve("generator", "loss", "training", 1 / math.log(2), noisy=True),
            _Curve("generator", "validation/raster_bits", "validation, raster order"),
            _Curve("generator", "validation/random_bits", "validation, random order"),
        ),
    ),
    _Panel("Share of random orders", "", (_Curve("generator", "random_ratio", "random ratio"),)),
    _Panel("Fréchet distance of samples", "", (_Curve("generator", "fd_classifier_n*", ""),)),
    _Panel(
        "Tokenizer PSNR",
        "dB",
        (
            _Curve("tokenizer", "psnr", "training", noisy=True),
            _Curve("tokenizer", "validation/psnr", "validation"),
        ),
    ),
    _Panel("Codebook in use", "share of codes", (_Curve("tokenizer", "codebook_usage", "codebook usage"),)),
    _Panel(
        "Classifier accuracy",
        "",
        (
            _Curve("classifier", "accuracy", "training", noisy=True),
            _Curve("classifier", "validation/accuracy", "validation"),
        ),
    ),
)
_COLOURS = ("#3b6fb6", "#d1495b", "#2a9d78", "#8a5fb0")


def curves(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes the curves of a run; a panel without data is left out.

    Args:
      rows: from `rar_jax.runs.logging.read_metrics`.
      path: the PNG file.

    Raises: ValueError if no row holds a metric that is drawn.
    """
    rows = list(rows)
    panels = [(panel, lines) for panel in _PANELS if (lines := _lines(panel, rows))]
    if not panels:
        raise ValueError("no metric to draw in these rows: the run has reported nothing yet")
    columns = min(3, len(panels))
    lines_down = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines_down), dpi=110, layout="constrained", facecolor="white")
    for place, (panel, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines_down, columns, place)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(panel.unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for (label, steps, values, noisy), colour in zip(lines, _COLOURS, strict=False):
            window = max(1, len(values) // 25) if noisy else 1
            if window > 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            marker = "o" if len(values) < 40 and not noisy else None
            axes.plot(
                steps,
                _running_mean(values, window),
                label=label,
                color=colour,
                linewidth=1.8,
                marker=marker,
                markersize=3,
            )
        if len(lines) > 1 or lines[0][0] not in ("", "random ratio", "codebook usage"):
            axes.legend(fontsize=8, frameon=False)
    FigureCanvasAgg(figure)  # not pyplot: no global state, no display
    _save(path, lambda temporary: figure.savefig(temporary, format="png"))


def _lines(panel: _Panel, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, np.ndarray, np.ndarray, bool]]:
    """(label, steps, values, noisy) of each curve of the panel that has data."""
    lines: list[tuple[str, np.ndarray, np.ndarray, bool]] = []
    for curve in panel.curves:
        mine = [row for row in rows if row["stage"] == curve.stage]
        prefix = curve.metric.removesuffix("*")
        names = dict.fromkeys(name for row in mine for name in row if name.startswith(prefix))
        for name in names if prefix != curve.metric else (curve.metric,):
            points = [(row["step"], row[name] * curve.factor) for row in mine if row.get(name) is not None]
            if points:
                steps, values = np.array(sorted(points), np.float64).T
                lines.append((curve.label or name, steps, values, curve.noisy))
    return lines


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values, over fewer at the start; (n,) -> (n,)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
