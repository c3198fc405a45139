"""Measures what tokenizing waits for: python docs/measurements/tokenizing.py

Writes JPEGs of 500x375 pixels (ImageNet's commonest size) of gradients and noise, and tokenizes their ten crops with a
MaskGIT-VQ of the released size (random weights: they change no time) by the same function as `rar-jax tokenize`. Before and after
that, the loader alone reads the same records. Writes tokenizing.md beside this file. About fifteen minutes on two shared cores.
(A program called tokenize.py would stand before Python's own module of that name.)
"""

from __future__ import annotations

import pathlib
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from rar_jax.data.image_source import ImageSource
from rar_jax.data.loader import sequential_batches
from rar_jax.data.sources import load_source
from rar_jax.models import Model
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import replicated
from rar_jax.tokenizers import maskgit_vq
from rar_jax.tokens.tokenize import CROPS, write_store
from rar_jax.tokens.writer import TokenStoreWriter

IMAGES, BATCH = 24, 8


def write(folder: pathlib.Path) -> float:
    """One class of images in train/, and one image in val/. Returns: the mean size in kB."""
    rng, sizes = np.random.default_rng(0), []
    for split, count in (("train", IMAGES), ("val", 1)):
        (folder / split / "class").mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            pixels = np.clip(pixels + rng.normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)
            path = folder / split / "class" / f"{i:03d}.jpg"
            Image.fromarray(pixels).save(path, quality=90)
            sizes.append(path.stat().st_size / 1000)
    return float(np.mean(sizes))


def alone(source: ImageSource) -> float:
    """Records/s of the loader, with nothing else to do."""
    began = time.perf_counter()
    for _ in sequential_batches(source, global_batch=BATCH, spans=[(0, len(source))]):
        pass
    return len(source) / (time.perf_counter() - began)


config = maskgit_vq.Config(image_size=256)
mesh = make_mesh(MeshConfig())
params = jax.device_put(maskgit_vq.init(config, jax.random.key(0)), replicated(mesh))
card = {
    "codebook_size": config.codebook_size,
    "grid": [256],
    "num_classes": 1,
    "class_names": ["class"],
    "crops": CROPS["ten"],
    "source": "generated",
    "tokenizer_sha256": None,
}
with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    size = write(folder / "images")
    source = load_source(f"folder:{folder}/images", "train", image_size=256, crop="ten")
    before = alone(source)
    writer = TokenStoreWriter(folder / "store", card, source_records=len(source))
    made = write_store(writer, source, Model(maskgit_vq, config), params, mesh, batch_size=BATCH)
    after = alone(source)

rate, loader = made.records / made.seconds, (before + after) / 2
lines = [
    "# What tokenizing waits for",
    "",
    f"Written by `python docs/measurements/tokenizing.py`: {IMAGES} JPEGs of 500x375 pixels, {size:.0f} kB each, their ten crops of",
    f"256x256 through a MaskGIT-VQ of the released size in float32, batches of {BATCH}; one process, whose loader is a thread; two",
    "shared cores, no accelerator.",
    "",
    "| | |",
    "|---|---|",
    f"| tokenizing, compilation included | {made.records} records in {made.seconds:.0f} s, {rate:.2f} records/s |",
    f"| of that the loop waited for the loader | {made.waited:.2f} s, {made.waited / made.seconds:.2%} |",
    f"| the loader alone, before and after | {before:.0f} and {after:.0f} records/s, {loader / rate:.0f} times as many |",
    "",
    "Until the encoder is that many times faster than here, it does not wait for this one thread; `config.data.workers` adds",
    "processes. `rar-jax tokenize` ends with the share of its own run.",
    "",
]
pathlib.Path(__file__).with_suffix(".md").write_text("\n".join(lines))
print("\n".join(lines))
