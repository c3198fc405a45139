"""The grids of images that a training leaves while it goes on: what the report's slider moves through.

    <workdir>/grids/<stage>/<step>.png     cells side by side without gaps, what they are in the PNG's text

Bounded, however long the training: MOST steps a stage, spread over it, and SIDE pixels a cell.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MOST = 40  # steps of a stage that are kept: the first, the last, and those between as evenly as they come
SIDE = 96  # pixels; larger images are made smaller
TEXT = "rar_jax_grid"  # the key in the PNG's text


@dataclasses.dataclass(frozen=True)
class Grid:
    """images: uint8 (rows, columns, y, x, 1 or 3). rows, columns: what they are, such as class names; "" says nothing."""

    images: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 5 or shape[-1] not in (1, 3):
            raise ValueError(f"a grid of {self.images.dtype} {shape}: give uint8 (rows, columns, y, x, 1 or 3)")
        if shape[:2] != (len(self.rows), len(self.columns)) or 0 in shape:
            raise ValueError(f"{len(self.rows)} x {len(self.columns)} names for a grid of {shape[0]} x {shape[1]}")

    def sheet(self) -> np.ndarray:
        """uint8 (rows * y, columns * x, 1 or 3): the cells side by side."""
        rows, columns, height, width, channels = self.images.shape
        return self.images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def save(folder: pathlib.Path, step: int, grid: Grid) -> None:
    """Writes the grid of a step, and removes a step where there are more than MOST."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = _smaller(grid)
    sheet, text = grid.sheet(), PngInfo()
    text.add_itxt(TEXT, json.dumps({"rows": grid.rows, "columns": grid.columns, "cell": grid.images.shape[2:4]}))
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(file, "png", optimize=True, pnginfo=text)
    temporary = folder / "new.tmp"  # one name, so that a full disk is left with one at most
    temporary.write_bytes(file.getvalue())
    os.replace(temporary, folder / f"{step}.png")
    kept = steps(folder)
    while len(kept) > MOST:
        # The one whose neighbours are the nearest to each other leaves the smallest gap.
        places = range(1, len(kept) - 1)
        least = min(places, key=lambda i: kept[i + 1] - kept[i - 1])
        (folder / f"{kept.pop(least)}.png").unlink(missing_ok=True)


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a grid, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal())


def load(path: pathlib.Path) -> Grid:
    """A grid that `save` wrote. Raises: ValueError naming the file if it is none, or damaged."""
    try:
        with Image.open(path) as image:
            told = json.loads(image.text[TEXT])  # pyright: ignore[reportAttributeAccessIssue]
            sheet = np.asarray(image)
        rows, columns, (height, width) = tuple(told["rows"]), tuple(told["columns"]), told["cell"]
        cells = sheet.reshape(len(rows), height, len(columns), width, -1).swapaxes(1, 2)
        return Grid(cells, rows, columns)
    except (OSError, SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no grid of a training, or damaged ({error}): remove it") from None


def forget_after(folder: pathlib.Path, step: int) -> None:
    """Removes the grids of later steps: those of a way that a resumed training does not go."""
    for later in steps(folder):
        if later > step:
            (folder / f"{later}.png").unlink(missing_ok=True)


def _smaller(grid: Grid) -> Grid:
    rows, columns, height, width, channels = grid.images.shape
    if (largest := max(height, width)) <= SIDE:
        return grid
    size = (max(1, math.floor(width * SIDE / largest)), max(1, math.floor(height * SIDE / largest)))

    def one(cell: np.ndarray) -> np.ndarray:
        image = Image.fromarray(cell[..., 0] if channels == 1 else cell)
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS)).reshape(size[1], size[0], channels)

    cells = np.stack([one(cell) for row in grid.images for cell in row])
    return dataclasses.replace(grid, images=cells.reshape(rows, columns, *cells.shape[1:]))


def spread(count: int, most: int) -> Sequence[int]:
    """Up to `most` of the numbers below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist()
