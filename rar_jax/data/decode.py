"""Decode images of any kind that web data sets hold."""

from __future__ import annotations

import io
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from rar_jax.errors import DecodeError

# Where Pillow starts to warn.
MAX_PIXELS = 1024**3 // 4 // 3

# Pillow's other readers start programs (EPS) or have no pixels of their own (PDF, WMF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Values of EXIF's tag 274 to what makes the image upright (EXIF 2.3, section 4.6.4); 1 is upright.
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


def decode_image(data: bytes, *, channels: int = 3) -> Image.Image:
    """Decode an image's first frame, upright, to "RGB" (channels=3) or "L" (1).

    16-bit samples become round(value / 257). Transparent pixels are blended with white. Grey is ITU-R 601.
    JPEGs are decoded at full size: libjpeg's scaled decoding gives other pixels than ADM's arithmetic.

    Raises: DecodeError unless it is a whole image of a kind in FORMATS with at most MAX_PIXELS pixels.
    """
    assert channels in (1, 3)
    try:
        try:
            return _open(data, channels)
        except Warning:
            # Warnings as errors must not change which images are good. Only here: catch_warnings is not thread-safe.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _open(data, channels)
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"not an image ({', '.join(FORMATS)}): begins with {data[:16]!r}") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything: SyntaxError, IndexError, struct.error
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DecodeError(f"damaged image: {reason}") from error


class Header(NamedTuple):
    """Pillow's kind and mode, the stored size, and whether EXIF turns the image."""

    kind: str
    mode: str
    width: int
    height: int
    turned: bool


def read_header(data: bytes) -> Header:
    """Read the header of an image. PNGs are decoded: EXIF may follow the pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
        # Pillow ignores checksums while decoding, and damaged data may decode to other pixels.
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
    """Return the low bytes of a 16-bit colour PNG, uint8 (y, x, c), else None.

    Pillow keeps only the high bytes of the big-endian samples. Read as little-endian, those are the low bytes.
    """
    tiles: Any = getattr(image, "tile", None)
    rawmode = tiles[0].args if image.format == "PNG" and tiles else None
    if rawmode == "LA;16B":
        raise DecodeError("grey with alpha in 16 bits: save it with 8 bits")
    if rawmode not in ("RGB;16B", "RGBA;16B"):
        return None
    again: Any = Image.open(io.BytesIO(data), formats=FORMATS)
    again.tile = [
        tile._replace(args=rawmode.replace("B;16B", "B;16L").replace("A;16B", "A;16L")) for tile in again.tile
    ]
    return np.asarray(again)


def _opaque(image: Image.Image, low: np.ndarray | None) -> Image.Image:
    """Return an 8-bit image without transparency that converts to L and RGB."""
    if low is not None:
        return _from_16_bits(np.asarray(image).astype(np.uint32) * 256 + low, image.info.get("transparency"))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(np.asarray(image).astype(np.uint32)[..., None], image.info.get("transparency"))
    if image.mode in ("I", "F"):
        raise DecodeError(f"32-bit pixels (mode {image.mode}), without a defined white: save it with 8 bits")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow assumes that every CMYK JPEG is Adobe's, which store the inverse.
        image = ImageChops.invert(image)
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB") if image.mode not in ("L", "RGB", "1") else image
    pixels = np.asarray(image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"), np.uint16)
    return _over_white(pixels, white=255)


def _from_16_bits(pixels: np.ndarray, transparent: Any) -> Image.Image:
    """Round uint32 (y, x, 1, 3 or 4) to 8 bits. transparent: a PNG's tRNS, or None."""
    if pixels.shape[-1] == 4:
        return _over_white(pixels, white=65535)
    if transparent is not None:
        pixels[(pixels == np.array(transparent, np.uint32)).all(-1)] = 65535
    return _as_image((pixels + 128) // 257)


def _over_white(pixels: np.ndarray, *, white: int) -> Image.Image:
    """Blend unsigned (y, x, c + alpha) with white, and round to 8 bits."""
    colour, alpha = pixels[..., :-1].astype(np.uint64), pixels[..., -1:].astype(np.uint64)
    whole = white * white
    blended = colour * alpha + white * (white - alpha)
    return _as_image((blended * 255 + whole // 2) // whole)


def _as_image(pixels: np.ndarray) -> Image.Image:
    pixels = pixels.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
