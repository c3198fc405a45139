"""Grids that a training leaves: read back, bounded in number and size, forgotten with the way that they are of."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from rar_jax.runs import grids
from rar_jax.runs.grids import Grid
from rar_jax.runs.logging import RunLogger


def _grid(size: int = 8, channels: int = 1, rows: int = 2, columns: int = 3) -> Grid:
    images = np.random.default_rng(0).integers(0, 256, (rows, columns, size, size, channels), np.uint8)
    return Grid(images, tuple(f"<{i}>" for i in range(rows)), ("a",) * columns)


@pytest.mark.parametrize("channels", [1, 3])
def test_read_back(tmp_path: pathlib.Path, channels: int) -> None:
    grid = _grid(channels=channels)
    grids.save_grid(tmp_path / "new", 7, grid)
    with Image.open(tmp_path / "new" / "7.png") as image:  # what any viewer shows
        assert image.size == (24, 16) and image.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(image)[8:, 8:16].reshape(8, 8, channels), grid.images[1, 1])
    back = grids.load_grid(tmp_path / "new" / "7.png")
    np.testing.assert_array_equal(back.images, grid.images)
    assert (back.rows, back.columns) == (grid.rows, grid.columns)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["7.png"]


def test_large_images_are_made_smaller(tmp_path: pathlib.Path) -> None:
    cell = np.zeros((1, 1, 256, 192, 3), np.uint8)
    cell[:, :, :, 96:] = 200
    grids.save_grid(tmp_path, 1, Grid(cell, ("a",), ("",)))
    small = grids.load_grid(tmp_path / "1.png").images
    assert small.shape == (1, 1, 96, 72, 3) and small[0, 0, 48, 5, 0] == 0 and small[0, 0, 48, 66, 0] == 200


def test_there_are_at_most_so_many_and_evenly(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "MOST", 9)
    for step in range(10, 2010, 10):
        grids.save_grid(tmp_path, step, _grid())
    kept = grids.list_grid_steps(tmp_path)
    assert len(kept) == 9 and (kept[0], kept[-1]) == (10, 2000)
    gaps = np.diff(kept)
    assert gaps.max() <= 2.5 * 2000 / 8, "no long part of the training is without one"


def test_a_resumed_training_forgets_the_later_ones_of_its_stage(tmp_path: pathlib.Path) -> None:
    for stage in ("tokenizer", "generator"):
        with RunLogger(tmp_path, stage, total_steps=30, quiet=True) as reporter:
            for step in (10, 20, 30):
                reporter.write_grid(step, "samples", _grid())
    with RunLogger(tmp_path, "generator", total_steps=30, quiet=True) as reporter:
        reporter.resume_from(20)
    assert grids.list_grid_steps(tmp_path / "grids" / "generator") == [10, 20]
    assert grids.list_grid_steps(tmp_path / "grids" / "tokenizer") == [10, 20, 30]


@pytest.mark.parametrize("harm", ["cut", "other", "empty"])
def test_what_is_no_grid_is_named(tmp_path: pathlib.Path, harm: str) -> None:
    grids.save_grid(tmp_path, 5, _grid())
    path = tmp_path / "5.png"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-60])
    elif harm == "other":
        Image.new("L", (24, 16)).save(path)
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"5\.png is no grid of a training, or damaged"):
        grids.load_grid(path)


def test_refusals() -> None:
    images = _grid().images
    with pytest.raises(ValueError, match="give uint8"):
        Grid(images.astype(np.float32), ("a", "b"), ("",) * 3)
    with pytest.raises(ValueError, match="1 x 3 labels for a grid of 2 x 3"):
        Grid(images, ("a",), ("",) * 3)


def test_names_are_json_in_the_file(tmp_path: pathlib.Path) -> None:
    grids.save_grid(tmp_path, 5, Grid(_grid().images, ("Fußball, 足球", "b"), ("",) * 3))
    with Image.open(tmp_path / "5.png") as image:
        assert json.loads(image.text[grids.TEXT])["rows"] == ["Fußball, 足球", "b"]
