"""Decode images of any kind that web data sets hold."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError

from rar_jax.errors import DecodeError

# Where Pillow starts to warn.
MAX_PIXELS = 1024**3 // 4 // 3

# Pillow's other readers start programs (EPS) or have no pixels of their own (PDF, WMF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, *, channels: int = 3) -> Image.Image:
    """Decode an image's first frame, upright, to "RGB" (channels=3) or "L" (1).

    Of 16-bit samples the high byte is used. Transparent pixels are blended with white. Grey is ITU-R 601.
    JPEGs are decoded at full size: libjpeg's scaled decoding gives other pixels than ADM's arithmetic.

    Raises: DecodeError unless it is a whole image of a kind in FORMATS with at most MAX_PIXELS pixels.
    """
    assert channels in (1, 3)
    try:
        return _open(data, channels)
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"not an image ({', '.join(FORMATS)}): begins with {data[:16]!r}") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything: SyntaxError, IndexError, struct.error
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DecodeError(f"damaged image: {reason}") from error


def read_header(data: bytes) -> tuple[int, int, str, str, bool]:
    """Return the stored width and height, Pillow's format and mode, and whether EXIF turns the image."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    size, kind, mode = image.size, str(image.format), image.mode  # PNGs are decoded now: EXIF may follow the pixels
    return *size, kind, mode, image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _open(data: bytes, channels: int) -> Image.Image:
    if not data:
        raise DecodeError("0 bytes")
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        # Before decoding: a bomb is small until then.
        raise DecodeError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} in all: shrink it")
    tiles = getattr(image, "tile", None)
    if image.format == "PNG":
        # Pillow ignores checksums while decoding, and damaged data may decode to other pixels.
        Image.open(io.BytesIO(data), formats=FORMATS).verify()
        if "transparency" in image.info and tiles and str(tiles[0].args).endswith("16B"):
            raise DecodeError("16 bits with a transparent colour: save it with 8 bits")
    image.getexif()  # now cached; without its bytes Pillow need not write it again, which fails for odd tags
    image.info.pop("exif", None)
    ImageOps.exif_transpose(image, in_place=True)
    out, mode = _make_opaque(image), "L" if channels == 1 else "RGB"
    return out if out.mode == mode else out.convert(mode)


def _make_opaque(image: Image.Image) -> Image.Image:
    """Return an 8-bit image without transparency that converts to L and RGB."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DecodeError(f"32-bit pixels (mode {image.mode}), without a defined white: save it with 8 bits")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow assumes that every CMYK JPEG is Adobe's, which store the inverse.
        image = ImageChops.invert(image)
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB") if image.mode not in ("L", "RGB", "1") else image
    is_grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("LA" if is_grey else "RGBA")
    out = Image.new("L" if is_grey else "RGB", image.size, "white")
    out.paste(image.convert(out.mode), mask=image.getchannel("A"))
    return out
