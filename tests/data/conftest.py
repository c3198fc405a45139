"""Images for the tests of sources."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest
from PIL import Image


class ImageFiles:
    """Makes small sets of JPEGs, and writes them as the kinds of source hold them."""

    SIZE = 16
    CLASSES = ("n01440764", "n01443537", "n02085620")

    def jpeg(self, seed: int) -> bytes:
        """A small JPEG of a size of its own, of smooth colours."""
        rng = np.random.default_rng(seed)
        corners = rng.integers(0, 256, (3, 3, 3), np.uint8)
        buffer = io.BytesIO()
        size = (int(rng.integers(20, 50)), int(rng.integers(20, 50)))
        Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    def image_set(self, counts: tuple[int, ...] = (7, 5, 6), seed: int = 0) -> list[tuple[bytes, int, str]]:
        """(JPEG, label, name) of a set with so many images a class, sorted by class and name."""
        return [
            (self.jpeg(seed + 1000 * label + i), label, f"{self.CLASSES[label]}_{i:03d}")
            for label, count in enumerate(counts)
            for i in range(count)
        ]

    def write_folder(self, root: pathlib.Path, images: list[tuple[bytes, int, str]]) -> None:
        """As folder: reads them."""
        for data, label, name in images:
            (root / self.CLASSES[label]).mkdir(parents=True, exist_ok=True)
            (root / self.CLASSES[label] / f"{name}.JPEG").write_bytes(data)


@pytest.fixture(scope="session")
def files() -> ImageFiles:
    """Small sets of images."""
    return ImageFiles()
