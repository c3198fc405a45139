"""Small sets of images, written as the kinds of source hold them."""

from __future__ import annotations

import io
import os
import pathlib

import numpy as np
from PIL import Image

from rar_jax.data.encoded import EncodedSource, reason_of


def find_problems(source: EncodedSource) -> dict[str, str]:
    """Decode every image; the reasons by name, those of listing the source first."""
    problems = dict(source.listed)
    for image in range(source.num_images):
        try:
            source.prepare(image)
        except (OSError, ValueError) as error:
            problems[source.name(image)] = reason_of(error)
    return problems


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

    def write_zoo(self, root: pathlib.Path) -> None:
        """Everything that people's folders hold, in one: class folders of 11, 2 and no images, of which 2 are none, one
        class linked, and all that stands beside images. Nothing that depends on who reads it."""
        self.write_folder(root, self.image_set((3, 2, 0)))
        good, first = self.jpeg(77), root / self.CLASSES[0]
        (root / self.CLASSES[2]).mkdir()  # empty: label 2 all the same
        (first / "deeper" / "still").mkdir(parents=True)
        (first / "deeper" / "still" / "a.png").write_bytes(good)  # a JPEG under another name: read
        (first / "folder.jpg").mkdir()
        (first / "folder.jpg" / "inside.jpeg").write_bytes(good)
        (first / "dangling.jpg").symlink_to("nowhere")
        (first / "linked.jpg").symlink_to(f"{self.CLASSES[0]}_000.JPEG")
        (first / "circle").symlink_to(".", target_is_directory=True)
        os.mkfifo(first / "pipe.jpg")
        (first / "new\nline.jpg").write_bytes(good)
        (first / "README.md").write_text("hello")
        for hidden in (".DS_Store", "Thumbs.db", "._a.jpg", "desktop.ini"):
            (first / hidden).write_bytes(b"x")
            (root / hidden).write_bytes(b"x")
        (root / "stray.jpg").write_bytes(good)
        (root / ".git").mkdir()
        (root / "n09999999").symlink_to(
            f"{self.CLASSES[0]}/deeper", target_is_directory=True
        )  # a linked class: followed
        with open(os.fsencode(first) + b"/caf\xe9.jpg", "wb") as file:
            file.write(good)
        # Listed as images, and bad when read.
        (first / "empty.jpg").write_bytes(b"")
        (first / "page.png").write_text("<html>")
        (first / "secret.jpg").write_bytes(good)  # good, until a test denies it
