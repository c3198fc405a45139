"""Work directories made by hand, with nasty names in them: what `run` would leave, without the training."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
from commands import TINY

from rar_jax.config import load_experiment
from rar_jax.experiment import resolve
from rar_jax.runs.grids import Grid
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.workdir import Workdir

NASTY = "<script>document.title='owned'</script>"
CLASSES = (NASTY, "</script><img src=x onerror=\"document.title='owned'\">", "a & b", "tench", '"quoted"')
STEPS = range(10, 1001, 10)
SHA = "0123456789abcdef" * 4


def loss(step: int) -> float:
    """Of the training at a step."""
    return 3 * math.exp(-step / 200) + 0.5 + 0.01 * math.sin(step)


def images(rows: int, columns: int, step: int) -> np.ndarray:
    """uint8 (rows, columns, 8, 8, 1): other ones for each step."""
    return np.random.default_rng(step).integers(0, 256, (rows, columns, 8, 8, 1), np.uint8)


def claimed(path: pathlib.Path) -> pathlib.Path:
    """A work directory in which nothing has happened yet."""
    config = resolve(load_experiment(str(TINY)), "tiny").resolved()
    config["name"] = NASTY
    config["data"]["class_names"] = list(CLASSES)
    Workdir(path).claim(config)
    return path


def trained(path: pathlib.Path) -> pathlib.Path:
    """A work directory of a finished run."""
    claimed(path)
    book = Ledger(path)
    versions = {"jax": "0.10.2", "rar_jax": "0.1.0"}
    book.row("start", verb="run", host=NASTY, pid=1, processes=1, device="cpu", devices=4, versions=versions)
    book._seconds = {"training": 30.0, "saving": 10.0}
    with RunLogger(path, "tokenizer", total_steps=12, quiet=True) as reporter:
        for step in (6, 12):
            reporter.write_metrics(
                step, {"loss": 1.0 / step, "validation/loss": 2.0 / step, "validation/psnr": 10.0 + step}
            )
            pair = Grid(images(2, len(CLASSES), step), ("original", "reconstruction"), CLASSES)
            reporter.write_grid(step, "reconstructions", pair)
    with RunLogger(path, "generator", total_steps=1000, quiet=True) as reporter:
        for step in STEPS:
            reporter.write_metrics(step, {"loss": loss(step), "grad_norm": math.nan if step == 50 else 1e3 / step})
            if step % 250 == 0:
                reporter.write_metrics(
                    step, {"validation/raster_loss": 1.1 * loss(step), "fd_classifier_n20": 100.0 / step}
                )
                reporter.write_grid(step, "samples", Grid(images(len(CLASSES), 3, step), CLASSES, ("",) * 3))
    result = {
        "fd_classifier": {"reference": "the 1437 training images", "samples_n40": 1.25},
        "last_validation": {"generator": {"step": 1000, "validation/raster_loss": 0.5}},
        "made_from": {"weights": {"generator": SHA}, "sampling": {"scale": 2.0}, "seed": 7, "rounding": "truncate"},
        "made_on": {"device": "cpu", "features": "float32", "generator_dtype": "float32", "protocol": "none"},
        "fid_n50000": 2.5,
    }
    (path / "result.json").write_text(json.dumps(result))
    (path / "evaluation").mkdir()
    made_from = {
        "images": 50000, "protocol": "adm", "inception_sha256": "f" * 64, "features": "float64", "reference_sha256": "e" * 64,
        "generator_sha256": SHA, "tokenizer_sha256": "d" * 64, "generator_dtype": "bfloat16",
        "sampling": {"scale": 4.0, "power": 1.5}, "seed": 3, "rounding": "round",
    }  # fmt: skip
    scored = {"fid": 2.5, "n": 50000, "reference": "in.npz", "made_from": made_from, "remarks": [NASTY], "seconds": 9.0}
    versions = {"jax": "0.10.2", "rar_jax": "0.1.0"}
    scored["made_on"] = {
        "split_size": 5000,
        "batch_size": 64,
        "chunk": 1000,
        "mesh": {"data": 4, "fsdp": 2},
        "device": "TPU v5p",
        "versions": versions,
    }
    (path / "evaluation" / "result.json").write_text(json.dumps(scored))
    book.row("saved", stage="generator", step=1000)
    book.row("stop", reason="done")
    return path
