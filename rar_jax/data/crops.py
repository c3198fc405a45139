"""How an image of any size becomes a square one: ADM's centre crop, ten crops, a random-resized crop.

Images come as Pillow images of mode "L" or "RGB" (`decode.open_image`) and leave as uint8 (size, size, c).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from rar_jax.config import require

NUM_CROPS = 10
# Longer images are cut to their middle first: a strip of 1x5000 pixels would become one of 256x1,280,000.
_MAX_ASPECT = 64


def center_crop(image: Image.Image, *, size: int) -> np.ndarray:
    """ADM's centre crop (`center_crop_arr` of openai/guided-diffusion), which FID references were made with.

    Returns: uint8 (size, size, c).
    """
    pixels_yxc = _resize_shorter(image, size)
    y, x = ((n - size) // 2 for n in pixels_yxc.shape[:2])
    return pixels_yxc[y : y + size, x : x + size]


def ten_crop(image: Image.Image, *, size: int) -> np.ndarray:
    """All ten crops, uint8 (10, size, size, c), in the order of `ten_crop_one`, from one resize."""
    resized_yxc = resize_for_ten(image, size=size)
    return np.stack([cut_one_of_ten(resized_yxc, size=size, crop=i) for i in range(NUM_CROPS)])


def ten_crop_one(image: Image.Image, *, size: int, crop: int) -> np.ndarray:
    """One of the ten crops, uint8 (size, size, c), cut from the centre crop of int(1.1 * size).

    From its square, and not from the whole image: RAR's released tokens were made so.

    crop: 0 upper left, 1 upper right, 2 lower left, 3 lower right, 4 centre; 5..9 are 0..4 mirrored left to right.
    """
    return cut_one_of_ten(resize_for_ten(image, size=size), size=size, crop=crop)


def resize_for_ten(image: Image.Image, *, size: int) -> np.ndarray:
    """What ten crops are cut from, uint8 (m, m, c): the centre crop of m = int(1.1 * size)."""
    return center_crop(image, size=int(1.1 * size))


def cut_one_of_ten(resized_yxc: np.ndarray, *, size: int, crop: int) -> np.ndarray:
    """uint8 (size, size, c), cut from what `resize_for_ten` gave; `crop` as in `ten_crop_one`."""
    require(0 <= crop < NUM_CROPS, f"crop is {crop}: there are ten, 0..9")
    bottom, right = (n - size for n in resized_yxc.shape[:2])
    y, x = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))[crop % 5]
    out = resized_yxc[y : y + size, x : x + size]
    return flip(out) if crop >= 5 else out


def flip(image_yxc: np.ndarray) -> np.ndarray:
    """The image mirrored left to right: a copy, channel by channel, which NumPy does in a quarter of the time."""
    out = np.empty(image_yxc.shape, image_yxc.dtype)
    for channel in range(image_yxc.shape[-1]):
        out[..., channel] = image_yxc[:, ::-1, channel]
    return out


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """torchvision's RandomResizedCrop: a box of random area and aspect, resized (bilinear, its default) to a square.

    Args:
      scale: bounds of the box's share of the area.  ratio: bounds of its width over height, drawn evenly in the log.

    Returns: uint8 (size, size, c).
    """
    x, y, width, height = random_box(image.width, image.height, rng, scale=scale, ratio=ratio)
    # Cropped first: resize(box=...) lets the filter see the pixels around the box.
    part = image.crop((x, y, x + width, y + height))
    return _pixels(part.resize((size, size), Image.Resampling.BILINEAR))


def random_box(
    width: int, height: int, rng: np.random.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The box (x, y, width, height) of `random_resized_crop`.

    Only `rng.random()` is drawn from: how NumPy makes bounded integers of its bits may change between releases, and
    with it the data of a run that goes on.
    """
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return x, y, w, h
    # No box fits a long image: the middle, as near as the ratio allows.
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def _resize_shorter(image: Image.Image, size: int) -> np.ndarray:
    """ADM's resize, uint8 (y, x, c): boxes of 2x2 while that leaves the shorter side at least `size`, then bicubic."""
    image = _cut_long(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return _pixels(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC))


def _cut_long(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than _MAX_ASPECT times as long as wide."""
    width, height = image.size
    most = _MAX_ASPECT * min(width, height)
    if max(width, height) <= most:
        return image
    # As odd as the length, so that the middle stays where it was.
    keep = most + (max(width, height) - most) % 2
    x, y = max(width - keep, 0) // 2, max(height - keep, 0) // 2
    return image.crop((x, y, x + min(width, keep), y + min(height, keep)))


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
