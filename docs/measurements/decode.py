"""Measures decoding and cropping through a source against Pillow alone: python docs/measurements/decode.py

Writes 64 JPEGs of 500x375 pixels (ImageNet's commonest size), then reads all of them in turn through a folder: source's
`gather` and by the plainest Pillow calls that give the same crops, checks that the pixels are the same,
and writes the table beside this file. About 15 s on one core.
"""

from __future__ import annotations

import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from rar_jax.data.image_source import ImageSource
from rar_jax.data.sources import load_source

IMAGES, BATCH, SIZE, ROUNDS = 64, 8, 256, 10


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """JPEGs as large as photographs are (about 60 kB): smooth shapes and noise."""
    rng, paths = np.random.default_rng(0), []
    for split, count in (("train", IMAGES), ("val", 1)):
        (folder / split / "class").mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            pixels = np.clip(pixels + rng.normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)
            path = folder / split / "class" / f"{i:03d}.jpg"
            Image.fromarray(pixels).save(path, quality=90)
            paths += [path] * (split == "train")
    return paths


def shorter(path: pathlib.Path, size: int) -> Image.Image:
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def cut(image: Image.Image, x: int, y: int) -> Image.Image:
    return image.crop((x, y, x + SIZE, y + SIZE))


def center(paths: list[pathlib.Path]) -> np.ndarray:
    out = []
    for path in paths:
        image = shorter(path, SIZE)
        out.append(np.asarray(cut(image, (image.width - SIZE) // 2, (image.height - SIZE) // 2)))
    return np.stack(out)


def ten(paths: list[pathlib.Path]) -> np.ndarray:
    out = []
    for path in paths:
        size = int(1.1 * SIZE)
        image = shorter(path, size)
        x, y = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((x, y, x + size, y + size))
        right = down = size - SIZE
        places = [(0, 0), (right, 0), (0, down), (right, down), (right // 2, down // 2)]
        crops = [cut(image, x, y) for x, y in places]
        crops += [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
        out += [np.asarray(crop) for crop in crops]
    return np.stack(out)


def seconds(call: Callable[[int], np.ndarray], batch: int) -> float:
    began = time.perf_counter()
    call(batch)
    return time.perf_counter() - began


def compare(source: ImageSource, alone: Callable[[list[pathlib.Path]], np.ndarray], paths: list[pathlib.Path]) -> str:
    """The rates and the ratio, as cells of the table."""
    views = len(source) // len(paths)

    def ours(batch: int) -> np.ndarray:
        return source.gather(np.arange(batch * BATCH * views, (batch + 1) * BATCH * views))["images"]

    def theirs(batch: int) -> np.ndarray:
        return alone(paths[batch * BATCH : (batch + 1) * BATCH])

    batches = range(len(paths) // BATCH)
    for batch in batches:
        np.testing.assert_array_equal(ours(batch), theirs(batch))
    # Turn by turn within a batch: the machine is shared, and its speed changes from second to second. Each goes first in
    # every other round: it finds the file's pages and the allocator as the other left them.
    mine, other = [], []
    for turn in range(ROUNDS):
        for batch in batches:
            for call, times in ((ours, mine), (theirs, other))[:: 1 if turn % 2 else -1]:
                times.append(seconds(call, batch))
    ratio = np.array(other) / np.array(mine)
    low, middle, high = np.quantile(ratio, [0.1, 0.5, 0.9])
    rates = [BATCH / statistics.median(times) for times in (mine, other)]
    return f"{rates[0]:.0f} | {rates[1]:.0f} | {middle:.2f} ({low:.2f} to {high:.2f})"


with tempfile.TemporaryDirectory() as name:
    paths = write(pathlib.Path(name))
    size = statistics.mean(path.stat().st_size for path in paths) / 1000
    lines = [
        "# Decoding and cropping",
        "",
        f"Written by `python docs/measurements/decode.py`: {IMAGES} JPEGs of 500x375 pixels, {size:.0f} kB each, to {SIZE}; one",
        f"process, shared cores, batches of {BATCH}; medians of {ROUNDS * IMAGES // BATCH} batches that the two read in turn. The ratio is of the times of one",
        "batch, Pillow's over ours: above 1 the source is the faster. The pixels are checked to be the same.",
        "",
        "| view | the source, images/s | Pillow alone, images/s | ratio, median (tenth to ninetieth percentile) |",
        "|---|---|---|---|",
    ]
    for crop, label, alone in (("center", "centre crop", center), ("ten", "all ten crops", ten)):
        source = load_source(f"folder:{name}", "train", image_size=SIZE, crop=crop)
        lines.append(f"| {label} | {compare(source, alone, paths)} |")
    text = "\n".join(lines) + "\n"
    pathlib.Path(__file__).with_suffix(".md").write_text(text)
    print(text)
