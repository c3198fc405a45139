"""Grids of images saved during training, which the report shows over time.

<workdir>/grids/<stage>/<step>.png     cells side by side without gaps, labels in the PNG's text
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MOST = 40  # grids of a stage: the first, the last, and those between as evenly as possible
SIDE = 96  # pixels; larger images are shrunk
TEXT = "rar_jax_grid"  # the key in the PNG's text


@dataclasses.dataclass(frozen=True)
class Grid:
    """images: uint8 (rows, columns, y, x, 1 or 3). rows, columns: labels, such as class names; may be ""."""

    images: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 5 or shape[-1] not in (1, 3):
            raise ValueError(f"a grid of {self.images.dtype} {shape}: give uint8 (rows, columns, y, x, 1 or 3)")
        if shape[:2] != (len(self.rows), len(self.columns)) or 0 in shape:
            raise ValueError(f"{len(self.rows)} x {len(self.columns)} labels for a grid of {shape[0]} x {shape[1]}")

    def sheet(self) -> np.ndarray:
        """Cells side by side: uint8 (rows * y, columns * x, 1 or 3)."""
        rows, columns, height, width, channels = self.images.shape
        return self.images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def save_grid(folder: pathlib.Path, step: int, grid: Grid) -> None:
    """Save the grid of a step; remove another one where there are more than MOST."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([np.stack([_shrink(cell) for cell in row]) for row in grid.images])
    sheet, text = Grid(images, grid.rows, grid.columns).sheet(), PngInfo()
    text.add_itxt(TEXT, json.dumps({"rows": grid.rows, "columns": grid.columns, "cell": images.shape[2:4]}))
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(file, "png", optimize=True, pnginfo=text)
    temporary = folder / "new.tmp"  # the same name each time: a full disk leaves one of them at most
    temporary.write_bytes(file.getvalue())
    os.replace(temporary, folder / f"{step}.png")
    kept = list_grid_steps(folder)
    while len(kept) > MOST:  # remove the one that leaves the smallest gap
        least = min(range(1, len(kept) - 1), key=lambda i: kept[i + 1] - kept[i - 1])
        (folder / f"{kept.pop(least)}.png").unlink(missing_ok=True)


def list_grid_steps(folder: pathlib.Path) -> list[int]:
    """Steps that have a grid, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal())


def load_grid(path: pathlib.Path) -> Grid:
    """Load a grid that `save_grid` wrote. Raises: ValueError naming a file that is damaged or something else."""
    try:
        with Image.open(path) as image:
            labels = json.loads(image.text[TEXT])  # pyright: ignore[reportAttributeAccessIssue]
            sheet = np.asarray(image)
        rows, columns, (height, width) = tuple(labels["rows"]), tuple(labels["columns"]), labels["cell"]
        return Grid(sheet.reshape(len(rows), height, len(columns), width, -1).swapaxes(1, 2), rows, columns)
    except (OSError, SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no grid of a training, or damaged ({error}): remove it") from None


def drop_grids_after(folder: pathlib.Path, step: int) -> None:
    """Remove the grids of later steps."""
    for later in list_grid_steps(folder):
        if later > step:
            (folder / f"{later}.png").unlink(missing_ok=True)


def _shrink(cell: np.ndarray) -> np.ndarray:
    """(y, x, c) at most SIDE pixels high and wide."""
    image = Image.fromarray(cell[..., 0] if cell.shape[-1] == 1 else cell)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, cell.shape[-1])


def pick_evenly(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, most).astype(int)).tolist()
