"""Decoding: every kind of image as independent arithmetic has it, or a refusal of one line."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rar_jax.data.crops import to_pixels
from rar_jax.data.decode import decode_image
from rar_jax.errors import DecodeError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (6, 9, 3), np.uint8)
# Smooth, so that JPEG keeps it within a few levels.
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:240:24j, 0:240:40j], 90), -1).astype(np.uint8)


def decode(data: bytes, *, channels: int = 3) -> np.ndarray:
    return to_pixels(decode_image(data, channels=channels))


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    pixels: np.ndarray, *, depth: int, colour: int, size: tuple[int, int] | None = None, extra: bytes = b""
) -> bytes:
    """A PNG by its specification, without Pillow: (y, x, c) samples of `depth` bits, unfiltered rows."""
    height, width = size or pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Rounded, by floats in [0, 1]."""
    share = alpha.astype(float)
    return np.floor((colour * share + 255 * (1 - share)) + 0.5)


@pytest.mark.parametrize(
    "data",
    [
        encoded(NOISE, "PNG"),
        encoded(NOISE, "BMP"),
        encoded(NOISE, "WEBP", lossless=True),
        encoded(NOISE, "TIFF"),
        png(NOISE, depth=8, colour=2),
    ],
)
def test_lossless_kinds_are_exact(data: bytes) -> None:
    out = decode(data)
    assert (out.dtype, out.shape) == (np.uint8, (6, 9, 3))
    np.testing.assert_array_equal(out, NOISE)


def test_grey_and_colour() -> None:
    grey = NOISE[..., 0]
    for data in (encoded(grey, "PNG"), encoded(grey, "BMP")):
        np.testing.assert_array_equal(decode(data, channels=1)[..., 0], grey)
        np.testing.assert_array_equal(decode(data), np.repeat(grey[..., None], 3, -1))
    luma = NOISE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(encoded(NOISE, "PNG"), channels=1)[..., 0] - luma).max() <= 0.51
    bits = (grey > 127).astype(np.uint8) * 255
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits).convert("1"), "PNG"), channels=1)[..., 0], bits)
    assert decode_image(encoded(grey, "PNG")).mode == "RGB"


def test_jpeg_is_whole_and_upright() -> None:
    data = encoded(SMOOTH, "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - SMOOTH).max() < 12
    turned = {
        1: SMOOTH,
        2: SMOOTH[:, ::-1],
        3: SMOOTH[::-1, ::-1],
        4: SMOOTH[::-1],
        5: SMOOTH.swapaxes(0, 1),
        6: np.rot90(SMOOTH, -1),
        7: SMOOTH[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(SMOOTH, 1),
        9: SMOOTH,  # no orientation
    }
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        out = decode(encoded(SMOOTH, "JPEG", quality=95, exif=exif))
        assert out.shape == expected.shape and np.abs(out.astype(int) - expected).max() < 12, orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_cut_short_is_harmless() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0"
    assert np.abs(decode(encoded(SMOOTH, "JPEG", quality=95, exif=exif)).astype(int) - SMOOTH).max() < 12


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg(adobe: bool) -> None:
    """Red has no cyan, whether the file holds ink (as its standard says) or its inverse (as Adobe writes)."""
    data = encoded(Image.fromarray(np.full((16, 16, 3), (230, 30, 20), np.uint8)).convert("CMYK"), "JPEG", quality=95)
    if not adobe:
        inverted = Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(data))), "CMYK")
        data = encoded(inverted, "JPEG", quality=95)
        start = data.index(b"\xff\xee")
        data = data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]
    assert np.abs(decode(data).astype(int) - (230, 30, 20)).max() < 6


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_16_bit_png(colour: int, channels: int) -> None:
    pixels = RNG.integers(0, 65536, (7, 11, channels))
    pixels[0, :, :] = np.array([0, 128, 129, 255, 256, 257, 385, 386, 65279, 65407, 65535])[:, None]
    expected = pixels >> 8
    np.testing.assert_array_equal(decode(png(pixels, depth=16, colour=colour), channels=channels), expected)
    # Pillow does not know a transparent colour of 16 bits.
    extra = chunk(b"tRNS", pixels[3, 5].astype(">u2").tobytes())
    with pytest.raises(DecodeError, match="16 bits with a transparent colour"):
        decode(png(pixels, depth=16, colour=colour, extra=extra), channels=channels)


def test_alpha_lies_over_white() -> None:
    pixels = RNG.integers(0, 256, (5, 8, 4), np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    expected = over_white(pixels[..., :3], pixels[..., 3:] / 255)
    assert (expected[0] == 255).all() and (expected[1] == pixels[1, :, :3]).all()
    for data in (encoded(pixels, "PNG"), encoded(pixels, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(decode(data), expected)
    grey = over_white(pixels[..., :1], pixels[..., 3:] / 255)
    data = png(pixels[..., [0, 3]], depth=8, colour=4)
    np.testing.assert_array_equal(decode(data, channels=1), grey)
    np.testing.assert_array_equal(decode(data), np.repeat(grey, 3, -1))
    deep = RNG.integers(0, 65536, (5, 8, 4))
    high = deep >> 8
    np.testing.assert_array_equal(decode(png(deep, depth=16, colour=6)), over_white(high[..., :3], high[..., 3:] / 255))
    grey = over_white(high[..., :1], high[..., 1:2] / 255)
    np.testing.assert_array_equal(decode(png(deep[..., :2], depth=16, colour=4), channels=1), grey)


def test_palette_with_transparency() -> None:
    palette = RNG.integers(0, 256, (4, 3), np.uint8)
    alpha = np.array([0, 77, 255, 255], np.uint8)
    places = RNG.integers(0, 4, (6, 6, 1))
    extra = chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", alpha[:2].tobytes())
    expected = over_white(palette[places[..., 0]], alpha[places] / 255)
    np.testing.assert_array_equal(decode(png(places, depth=8, colour=3, extra=extra)), expected)
    opaque = decode(png(places, depth=8, colour=3, extra=chunk(b"PLTE", palette.tobytes())))
    np.testing.assert_array_equal(opaque, palette[places[..., 0]])
    # Grey and colour may also have one transparent value.
    for colour, channels in ((0, 1), (2, 3)):
        pixels = NOISE[..., :channels].copy()
        data = png(pixels, depth=8, colour=colour, extra=chunk(b"tRNS", pixels[2, 2].astype(">u2").tobytes()))
        pixels[(pixels == pixels[2, 2]).all(-1)] = 255
        np.testing.assert_array_equal(decode(data, channels=channels), pixels)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_array_equal(decode(data), np.full((10, 12, 3), (255, 0, 0)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(decode(encoded(pixels, "PNG")), pixels)


def broken_crc(data: bytes) -> bytes:
    place = data.index(b"IDAT") + 8
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^0 bytes$"),
        (b"not an image at all", "not an image .*begins with b'not an image at '"),
        (b"<!DOCTYPE html><html>404</html>", "not an image .*begins with b'<!DOCTYPE html><'"),
        (encoded(NOISE, "PNG")[:20], "damaged|not an image"),
        (encoded(NOISE.repeat(20, 0), "PNG")[:200], "damaged image: "),
        (encoded(NOISE.repeat(20, 0), "JPEG")[:-300], "damaged image: image file is truncated"),
        (encoded(SMOOTH, "JPEG")[:40], "not an image|damaged"),
        (encoded(NOISE, "GIF")[:-60], "damaged image: "),
        (encoded(NOISE, "WEBP", lossless=True)[:-40], "not an image|damaged image: "),
        (broken_crc(encoded(NOISE, "PNG")), "damaged image: "),
        # One that decodes all the same: only the checksum tells.
        (encoded(NOISE, "PNG")[:-16] + b"\0\0\0\0" + encoded(NOISE, "PNG")[-12:], "damaged image: .*checksum"),
        (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "32-bit pixels .mode F"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of the first (an error here) and refuses the second."""
    bomb = png(np.zeros((1, 1, 3)), depth=8, colour=2, size=(side, side))
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(DecodeError, match=f"{side}|{side * side}|exceeds"):
            decode(bomb)
