"""Crops against arithmetic derived again: separable filters in float64, and Pillow used in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from rar_jax.data import crops

SIZES = [(500, 375), (375, 500), (31, 33), (33, 31), (64, 64), (129, 257), (97, 1000), (7, 5), (1, 1), (40, 3)]


def picture(width: int, height: int, channels: int = 3) -> Image.Image:
    """Structure and noise."""
    rng = np.random.default_rng(width * 10_007 + height)
    y, x = np.mgrid[:height, :width] / 9
    base = 128 + 70 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    pixels = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    t = np.abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def triangle(t: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(t), 0)


def weights(old: int, new: int, kernel) -> np.ndarray:
    """(new, old) matrix: the kernel widened by the factor of shrinking, cut at the border, summing to 1."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    matrix = kernel((np.arange(old)[None] + 0.5 - centres[:, None]) / max(scale, 1))
    return matrix / matrix.sum(1, keepdims=True)


def resized(pixels: np.ndarray, height: int, width: int, kernel) -> np.ndarray:
    """Float64, first the rows, rounded to bytes as Pillow does between its passes, then the columns."""
    out = np.einsum("xw,ywc->yxc", weights(pixels.shape[1], width, kernel), pixels.astype(float))
    out = np.clip(np.floor(out + 0.5), 0, 255)
    return np.clip(np.einsum("yh,hxc->yxc", weights(pixels.shape[0], height, kernel), out), 0, 255)


def halved(pixels: np.ndarray) -> np.ndarray:
    """Boxes: of 2 pixels, and where a side is odd one of 3."""

    def boxes(old: int) -> np.ndarray:
        # A source pixel belongs to the boxes that hold its middle; on an edge, as floats in Pillow's order have it.
        new, place, scale = old // 2, np.arange(old), old / (old // 2)
        centre = ((np.arange(new) + 0.5) * scale)[:, None]
        distance = (place - centre + 0.5) * (1 / scale)
        window = (place >= np.floor(centre - scale / 2 + 0.5)) & (place < np.floor(centre + scale / 2 + 0.5))
        matrix = (window & (distance > -0.5) & (distance <= 0.5)).astype(float)
        matrix /= matrix.sum(1, keepdims=True)
        return matrix

    out = np.floor(np.einsum("xw,ywc->yxc", boxes(pixels.shape[1]), pixels.astype(float)) + 0.5)
    return np.floor(np.einsum("yh,hxc->yxc", boxes(pixels.shape[0]), out) + 0.5)


def adm_resized(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size`, float64 (y, x, c).

    Of very tall images newer Pillows resize the columns first; the bytes between the passes are then others.
    """
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if columns_first := image.height > 3 * image.width:
        pixels = pixels.swapaxes(0, 1)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halved(pixels)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    out = resized(pixels, round(height * scale), round(width * scale), cubic)
    return out.swapaxes(0, 1) if columns_first else out


def ten_crops(image: Image.Image, size: int) -> np.ndarray:
    resized = crops.resize_for_ten(image, size=size)
    return np.stack([crops.cut_one_of_ten(resized, size=size, crop=i) for i in range(10)])


def check_near(ours: np.ndarray, exact: np.ndarray) -> None:
    """Equal but for rounding: half a level off, and few pixels more, where a half fell the other way."""
    assert ours.shape == exact.shape and ours.dtype == np.uint8
    off = np.abs(ours - exact)
    # A byte of the first pass rounded the other way moves the result by up to the weight of a row.
    assert off.max(initial=0) <= 1.3 and np.mean(off > 0.51) < 0.01, (off.max(), np.mean(off > 0.51))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [32, 27])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_center_crop(width: int, height: int, size: int, channels: int) -> None:
    image = picture(width, height, channels)
    full = adm_resized(image, size)
    y, x = math.floor((full.shape[0] - size) / 2), math.floor((full.shape[1] - size) / 2)
    check_near(crops.center_crop(image, size=size), full[y : y + size, x : x + size])


def test_center_crop_of_imagenet_size_is_pillows_own() -> None:
    """Bit for bit: 500x375 to 128 is one halving, one resize of the whole, and Pillow's crop."""
    image = picture(500, 375)
    whole = image.resize((250, 187), Image.Resampling.BOX).resize((171, 128), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crops.center_crop(image, size=128), np.asarray(whole.crop((21, 0, 149, 128))))


@pytest.mark.parametrize("size", [32, 27, 256])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (31, 33), (129, 257), (64, 64), (7, 5), (1, 1)])
def test_ten_crops(width: int, height: int, size: int) -> None:
    image = picture(width, height)
    ten = ten_crops(image, size)
    assert (ten.shape, ten.dtype) == ((10, size, size, 3), np.uint8)
    square = {32: 35, 27: 29, 256: 281}[size]
    full = adm_resized(image, square)
    top, left = math.floor((full.shape[0] - square) / 2), math.floor((full.shape[1] - square) / 2)
    full, rest = full[top : top + square, left : left + square], square - size
    corners = [(0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2)]
    for i, (y, x) in enumerate(corners):
        check_near(ten[i], full[y : y + size, x : x + size])
        np.testing.assert_array_equal(ten[i + 5], np.fliplr(ten[i]))


def strip_of(colours: np.ndarray, *, upright: bool) -> Image.Image:
    return Image.fromarray(colours[:, None] if upright else colours[None])


@pytest.mark.parametrize("upright", [True, False])
def test_a_strip_is_cut_to_its_middle(upright: bool) -> None:
    """1x5000 to 8: ADM's own arithmetic would make 8x40000 of it first; the middle is the same pixels."""
    colours = np.random.default_rng(1).integers(0, 256, (5000, 3), np.uint8)
    image = strip_of(colours, upright=upright)
    whole = image.resize((8, 40_000) if upright else (40_000, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[19_996:20_004] if upright else np.asarray(whole)[:, 19_996:20_004]
    np.testing.assert_array_equal(crops.center_crop(image, size=8), expected)
    assert ten_crops(image, 256).shape == (10, 256, 256, 3)
    assert crops.random_resized_crop(image, np.random.default_rng(0), size=256).shape == (256, 256, 3)


class Scripted:
    """Stands in for a Generator: gives the numbers it was given."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def test_random_box_by_hand() -> None:
    """Area 100 * 80 * (0.08 + 0.92 * 0.25) = 2480, aspect (3/4)^0.5 * (4/3)^0.5 = 1: a side of 50 in 50x30 places."""
    rng = Scripted(0.25, 0.5, 0.999, 0.5)
    box = crops.draw_box(100, 80, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))  # pyright: ignore[reportArgumentType]
    assert box == (25, 30, 50, 50) and not rng.numbers


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13)), ((1, 5000), (0, 2499, 1, 1))]
)
def test_random_box_of_a_long_image_is_its_middle(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """At the whole area no box fits: ten tries, then the middle at the nearest ratio (10 * 4/3 = 13.3)."""
    rng = Scripted(*[1.0, 0.5] * 10)
    found = crops.draw_box(*size, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))  # pyright: ignore[reportArgumentType]
    assert found == box


def test_random_boxes_have_torchvisions_distribution() -> None:
    """In a square few boxes are refused: the area is even in [s, 1] but for those, the log of the aspect even."""
    rng, boxes = np.random.default_rng(0), []
    for _ in range(4000):
        boxes.append(crops.draw_box(600, 600, rng, scale=(0.1, 0.5), ratio=(3 / 4, 4 / 3)))
    x, y, w, h = np.array(boxes, float).T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= 600).all() and (y + h <= 600).all()
    area, aspect = w * h / 600**2, np.log(w / h) / math.log(4 / 3)
    for values, low, high in ((area, 0.1, 0.5), (aspect, -1, 1), (x / (600 - w), 0, 1), (y / (600 - h), 0, 1)):
        share = np.histogram(values, bins=5, range=(low, high))[0] / 4000
        assert np.abs(share - 0.2).max() < 0.03, share


def test_random_resized_crop_sees_nothing_around_its_box() -> None:
    image = picture(90, 70)
    rng = Scripted(0.25, 0.5, 0.999, 0.5)
    out = crops.random_resized_crop(image, rng, size=16)  # pyright: ignore[reportArgumentType]
    # 6300 * 0.31 = 1953: a side of 44; y = 0.999 * 27, x = 0.5 * 47.
    part = np.asarray(image)[26:70, 23:67]
    check_near(out, resized(part, 16, 16, triangle))


def test_flip() -> None:
    image = np.arange(24).reshape(2, 4, 3)
    np.testing.assert_array_equal(crops.mirror(image), image[:, [3, 2, 1, 0]])
