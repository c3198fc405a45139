"""Encoded images to pixels: every kind that a data set of the web holds, or a refusal of one line."""

from __future__ import annotations

import io
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from rar_jax.config import require
from rar_jax.errors import DecodeError

# What Pillow itself warns of, so that it never warns of an image that is taken.
MAX_PIXELS = 1024**3 // 4 // 3

# Named, because Pillow's other readers start programs (EPS) or have no pixels of their own (PDF, WMF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# EXIF's tag 274 to what makes the image upright (EXIF 2.3, section 4.6.4); 1 is upright.
_ORIENTATION = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, *, channels: int = 3) -> np.ndarray:
    """uint8 (y, x, channels) of an encoded image, as `open_image` has it. Raises: DecodeError."""
    pixels = np.asarray(open_image(data, channels=channels))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def open_image(data: bytes, *, channels: int = 3) -> Image.Image:
    """The first frame of an encoded image, decoded and upright, in mode "RGB" (channels=3) or "L" (1).

    16-bit samples become round(value / 257). Transparent pixels are laid over white. Colour becomes grey by ITU-R 601.
    JPEGs are always decoded at their full size: libjpeg's scaled decoding gives other pixels than ADM's arithmetic.

    Raises: DecodeError for what is not, or not wholly, an image of a kind in FORMATS, or has over MAX_PIXELS pixels.
    """
    require(channels in (1, 3), f"channels is {channels}: images are decoded to 1 or 3")
    try:
        try:
            return _open(data, channels)
        except Warning:
            # Where warnings are errors, a harmless one (EXIF that is cut short) must not change which images are
            # good. Only here, because catch_warnings is not safe among threads.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _open(data, channels)
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"no image ({', '.join(FORMATS)}): it begins with {data[:16]!r}") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything: SyntaxError, IndexError, struct.error
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DecodeError(f"damaged image: {reason}") from error


class Header(NamedTuple):
    """What a file says of its image: Pillow's names of its kind ("JPEG") and mode ("RGB"), its pixels as they are stored, and
    whether EXIF says to turn or mirror it."""

    kind: str
    mode: str
    width: int
    height: int
    turned: bool


def read_header(data: bytes) -> Header:
    """The header of an encoded image that `open_image` takes; only of a PNG are the pixels decoded, EXIF may follow them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `open_image` takes it all the same
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        kind, mode = str(image.format), image.mode
        return Header(kind, mode, image.width, image.height, image.getexif().get(_ORIENTATION) in _UPRIGHT)


def _open(data: bytes, channels: int) -> Image.Image:
    if not data:
        raise DecodeError("0 bytes")
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        # Before decoding: a bomb is small until then.
        raise DecodeError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} in all: shrink it")
    if image.format == "PNG":
        # Pillow does not look at the checksums of what it decodes, and damage may still decode, to other pixels.
        Image.open(io.BytesIO(data), formats=FORMATS).verify()
    low = _low_bytes(data, image)
    image.load()
    orientation = image.getexif().get(_ORIENTATION)
    out = _opaque(image, low)
    if orientation in _UPRIGHT:
        out = out.transpose(_UPRIGHT[orientation])
    mode = "L" if channels == 1 else "RGB"
    return out if out.mode == mode else out.convert(mode)


def _low_bytes(data: bytes, image: Image.Image) -> np.ndarray | None:
    """uint8 (y, x, c), the low bytes of a 16-bit colour PNG; None for other images.

    Pillow keeps the high bytes only. The samples are big-endian; read as if little-endian, its high bytes are the low.
    """
    tiles: Any = getattr(image, "tile", None)
    rawmode = tiles[0].args if image.format == "PNG" and tiles else None
    if rawmode == "LA;16B":
        raise DecodeError("grey with alpha in 16 bits, which Pillow cannot read exactly: save it with 8")
    if rawmode not in ("RGB;16B", "RGBA;16B"):
        return None
    again: Any = Image.open(io.BytesIO(data), formats=FORMATS)
    again.tile = [
        tile._replace(args=rawmode.replace("B;16B", "B;16L").replace("A;16B", "A;16L")) for tile in again.tile
    ]
    return np.asarray(again)


def _opaque(image: Image.Image, low: np.ndarray | None) -> Image.Image:
    """An 8-bit image without transparency, in a mode that converts to L and RGB."""
    if low is not None:
        return _from_16_bits(np.asarray(image).astype(np.uint32) * 256 + low, image.info.get("transparency"))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(np.asarray(image).astype(np.uint32)[..., None], image.info.get("transparency"))
    if image.mode in ("I", "F"):
        raise DecodeError(f"32-bit pixels (mode {image.mode}), which have no agreed white: save it with 8 bits")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for one of Adobe's, which hold the inverse; the standard's hold ink.
        image = ImageChops.invert(image)
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB") if image.mode not in ("L", "RGB", "1") else image
    pixels = np.asarray(image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"), np.uint16)
    return _over_white(pixels, white=255)


def _from_16_bits(pixels: np.ndarray, transparent: Any) -> Image.Image:
    """pixels: uint32 (y, x, 1, 3 or 4), of which 4 has alpha. transparent: the colour of a PNG's tRNS, or None."""
    if pixels.shape[-1] == 4:
        return _over_white(pixels, white=65535)
    if transparent is not None:
        pixels[(pixels == np.array(transparent, np.uint32)).all(-1)] = 65535
    return _as_image((pixels + 128) // 257)


def _over_white(pixels: np.ndarray, *, white: int) -> Image.Image:
    """Lays unsigned (y, x, c + alpha) over white, then to 8 bits, rounded.

    Not dropped: what hides under transparency is arbitrary (often black, often the colours of a brush), and nobody
    has ever seen it. White, because that is what pages of the web, where the images are from, put behind them.
    """
    colour, alpha = pixels[..., :-1].astype(np.uint64), pixels[..., -1:].astype(np.uint64)
    whole = white * white
    blended = colour * alpha + white * (white - alpha)
    return _as_image((blended * 255 + whole // 2) // whole)


def _as_image(pixels: np.ndarray) -> Image.Image:
    pixels = pixels.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
