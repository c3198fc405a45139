"""A device without memory for a batch is named, with what to make smaller."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from rar_jax.errors import DeviceMemoryError
from rar_jax.evaluation.image_sets import NpzImages
from rar_jax.evaluation.program import Program, Settings, open_program
from rar_jax.evaluation.scores import score_images


@pytest.mark.usefixtures("cheap")
def test_exhausted_memory_names_the_batch_size(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "given.npz", arr_0=images)

    def exhausted(*args: Any, **keywords: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(Program, "_scan", exhausted)
    settings, out = Settings(batch_size=8, neighbours=False), tmp_path / "out"
    with pytest.raises(DeviceMemoryError, match=r"scoring, batch_size 8: .*allocating 9 bytes\): make it smaller"):
        score_images(open_program(pathlib.Path("i"), settings), NpzImages(tmp_path / "given.npz"), out, quiet=True)
    assert not list(out.rglob("totals.npz"))
