import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rar_jax.runs import pictures


def _images(n: int, size: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)


def _read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


def _holds(sheet: np.ndarray, cell: np.ndarray) -> tuple[int, int]:
    """(y, x) where the cell stands in the sheet, or fails."""
    height, width = cell.shape[:2]
    for y, x in np.argwhere((sheet[: -height + 1, : -width + 1] == cell[0, 0]).all(axis=-1)):
        if (sheet[y : y + height, x : x + width] == cell).all():
            return int(y), int(x)
    pytest.fail("the image is not in the sheet, pixel for pixel")


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    return np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, axis=0).repeat(scale, axis=1)


@pytest.mark.parametrize(("size", "channels", "scale"), [(8, 1, 6), (28, 1, 2), (8, 3, 6), (64, 3, 1)])
def test_grid_shows_every_image_in_its_place(tmp_path: pathlib.Path, size: int, channels: int, scale: int) -> None:
    images = _images(6, size, channels)
    pictures.save_image_grid(images, ["cat", "a longer name"], tmp_path / "new" / "grid.png", title="Samples")
    sheet = _read(tmp_path / "new" / "grid.png")
    places = [_holds(sheet, _enlarge(image, scale)) for image in images]
    rows, columns = sorted({y for y, _ in places}), sorted({x for _, x in places})
    assert places == [(y, x) for y in rows for x in columns] and len(rows) == 2
    assert (sheet[0] == 255).all() and (sheet[:, 0] == 255).all()
    for y in rows:  # the labels
        assert (sheet[y : y + size * scale, : columns[0]] < 128).any()
    assert (sheet[: rows[0]] < 128).any()  # the title
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_a_grid_has_text_above_its_columns() -> None:
    images = _images(6)
    plain, named = (
        np.asarray(pictures.draw_image_grid(images, ["a", "b"], column_labels=labels))
        for labels in ((), ("one", "two", "three"))
    )
    moved = named.shape[0] - plain.shape[0]
    for image in images:
        (y, x), (y_named, x_named) = (_holds(sheet, _enlarge(image, 6)) for sheet in (plain, named))
        assert (y_named, x_named) == (y + moved, x)
    above = named[: _holds(named, _enlarge(images[0], 6))[0]] < 128
    inked = [above[:, x : x + 48].any() for x in (_holds(named, _enlarge(image, 6))[1] for image in images[:3])]
    assert moved > 10 and inked == [True] * 3
    with pytest.raises(ValueError, match="2 column labels for 3 columns"):
        pictures.draw_image_grid(images, ["a", "b"], column_labels=["one", "two"])


def test_pairs_put_a_reconstruction_under_its_original(tmp_path: pathlib.Path) -> None:
    originals = _images(5)
    reconstructions = 255 - originals
    pictures.save_image_pairs(originals, reconstructions, tmp_path / "pairs.png", columns=3)
    sheet = _read(tmp_path / "pairs.png")
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        y, x = _holds(sheet, _enlarge(original, 6))
        below_y, below_x = _holds(sheet, _enlarge(reconstruction, 6))
        assert below_x == x and 48 <= below_y - y < 60


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (_images(5), "5 images do not fill 2 rows"),
        (_images(0), "0 images do not fill"),
        (_images(4)[..., 0], "must be uint8"),
        (_images(4).astype(np.float32), "images are float32"),
    ],
)
def test_grid_refuses_what_it_cannot_show(tmp_path: pathlib.Path, images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.save_image_grid(images, ["a", "b"], tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_pairs_must_be_pairs(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="give as many"):
        pictures.save_image_pairs(_images(3), _images(4), tmp_path / "pairs.png")


# ---------------------------------------------------------------- curves


def _rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(10, 1001, 10):
        x = step / 1000
        rows.append(
            {"stage": "tokenizer", "step": step, "psnr": 14 + 8 * x**0.3 + rng.normal() / 4, "codebook_usage": x}
        )
        rows.append({"stage": "classifier", "step": step, "accuracy": 1 - 0.9 * np.exp(-9 * x) + rng.normal() / 99})
        noise = rng.normal() / 10
        rows.append({"stage": "generator", "step": step, "loss": 2 + 3 * np.exp(-4 * x) + noise, "random_ratio": 1 - x})
    for step in range(100, 1001, 100):
        x = step / 1000
        losses = {f"validation/{name}_loss": 2.1 + 3 * np.exp(-4 * x) for name in ("raster", "random")}
        rows.append({"stage": "generator", "step": step, **losses, "fd_classifier_n360": 9 * np.exp(-5 * x) + 0.4})
        rows.append({"stage": "tokenizer", "step": step, "validation/psnr": 13.5 + 8 * x**0.3})
        rows.append({"stage": "classifier", "step": step, "validation/accuracy": 0.98 - np.exp(-9 * x)})
    return rows


def _lines_of(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    panels = {title: pictures._lines(*which, rows) for title, _, *which in pictures._PANELS}
    return {title: [(label, len(steps)) for label, steps, _ in lines] for title, lines in panels.items() if lines}


def test_curves_have_every_panel(tmp_path: pathlib.Path) -> None:
    assert _lines_of(_rows()) == {
        "Generator loss": [("training", 100), ("validation/raster_loss", 10), ("validation/random_loss", 10)],
        "Share of random orders": [("", 100)],
        "Fréchet distance of samples": [("fd_classifier_n360", 10)],
        "Tokenizer PSNR": [("training", 100), ("validation", 10)],
        "Codebook usage": [("", 100)],
        "Classifier accuracy": [("training", 100), ("validation", 10)],
    }
    (training,) = pictures._lines(*pictures._PANELS[0][2:], [{"stage": "generator", "step": 1, "loss": 2.0}])
    assert training[2] == [2.0]  # of any unit: cross-entropy, or the error of a velocity
    pictures.plot_curves(_rows(), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000


def test_curves_leaves_out_panels_nulls_and_other_metrics(tmp_path: pathlib.Path) -> None:
    rows = [
        {"stage": "generator", "step": 1, "loss": None, "grad_norm": 1.0},
        {"stage": "generator", "step": 2, "loss": 1.0},
        {"stage": "classifier", "step": 2, "loss": 1.0},
    ]
    assert _lines_of(rows) == {"Generator loss": [("training", 1)]}
    pictures.plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_of_nothing_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="nothing yet"):
        pictures.plot_curves([{"stage": "generator", "step": 1, "loss": None}], tmp_path / "curves.png")


def test_running_mean() -> None:
    values = np.arange(6.0)
    np.testing.assert_allclose(pictures._running_mean(values, 3), [0, 0.5, 1, 2, 3, 4])
    np.testing.assert_allclose(pictures._running_mean(values, 1), values)
