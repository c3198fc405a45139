"""Square crops of images: ADM's centre crop, ten crops, random-resized crops.

Inputs are Pillow images of mode "L" or "RGB" (`decode_image`), outputs are uint8 (size, size, c).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

NUM_CROPS = 10
Bounds = tuple[float, float]
_MAX_ASPECT = 64


def center_crop(image: Image.Image, *, size: int) -> np.ndarray:
    """Crop the centre as ADM's `center_crop_arr` does, for FID references."""
    pixels_yxc = _resize_shorter(image, size)
    y, x = ((n - size) // 2 for n in pixels_yxc.shape[:2])
    return pixels_yxc[y : y + size, x : x + size]


def resize_for_ten(image: Image.Image, *, size: int) -> np.ndarray:
    """Crop the centre of int(1.1 * size), for `cut_one_of_ten`; uint8 (m, m, c)."""
    return center_crop(image, size=int(1.1 * size))


def cut_one_of_ten(resized_yxc: np.ndarray, *, size: int, crop: int) -> np.ndarray:
    """Cut one of ten crops out of `resize_for_ten`; uint8 (size, size, c).

    crop: 0 upper left, 1 upper right, 2 lower left, 3 lower right, 4 centre; 5..9 are 0..4 mirrored left to right.
    """
    assert 0 <= crop < NUM_CROPS
    bottom, right = (n - size for n in resized_yxc.shape[:2])
    y, x = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))[crop % 5]
    out = resized_yxc[y : y + size, x : x + size]
    return mirror(out) if crop >= 5 else out


def mirror(image_yxc: np.ndarray) -> np.ndarray:
    """Mirror left to right. Copying by channel is four times as fast in NumPy."""
    out = np.empty(image_yxc.shape, image_yxc.dtype)
    for channel in range(image_yxc.shape[-1]):
        out[..., channel] = image_yxc[:, ::-1, channel]
    return out


def random_resized_crop(image: Image.Image, rng: np.random.Generator, *, size: int) -> np.ndarray:
    """Crop as torchvision's RandomResizedCrop (bilinear) to (size, size, c)."""
    x, y, width, height = draw_box(image.width, image.height, rng)
    # Cropped first: resize(box=...) lets the filter see the pixels around the box.
    part = image.crop((x, y, x + width, y + height))
    return to_pixels(part.resize((size, size), Image.Resampling.BILINEAR))


def draw_box(
    width: int, height: int, rng: np.random.Generator, *, scale: Bounds = (0.08, 1.0), ratio: Bounds = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Draw the box (x, y, width, height) of `random_resized_crop`, of an area and a log width / height within bounds.

    Only `rng.random()` is used: NumPy may change how it draws bounded integers, and with it the data of a resumed run.
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
    """Resize as ADM: 2x2 boxes while the shorter side allows it, then bicubic."""
    # A strip of 1x5000 pixels would become 256x1,280,000: cut more than _MAX_ASPECT times its width at both ends.
    x, y = (max(n - _MAX_ASPECT * min(image.size), 0) // 2 for n in image.size)
    image = image.crop((x, y, image.width - x, image.height - y)) if x or y else image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return to_pixels(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC))


def to_pixels(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to uint8 (y, x, c)."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
