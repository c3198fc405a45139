"""evaluate says how much memory a batch takes before it takes it."""

import pathlib
from typing import Any

import numpy as np
import pytest

from rar_jax.errors import ConfigError
from rar_jax.evaluation import scores as evaluate
from rar_jax.evaluation.program import Settings
from rar_jax.parallel import memory


@pytest.mark.usefixtures("cheap")
def test_what_memory_does_not_hold_is_refused_before_it_runs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte too few; what was given up left no chunk behind, and with that byte it goes on."""
    takes: list[int] = []
    real = memory.needed
    monkeypatch.setattr(memory, "needed", lambda compiled: takes.append(real(compiled)) or takes[-1])
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "given.npz", arr_0=images)

    def run(out: str) -> dict[str, Any]:
        images, settings = str(tmp_path / "given.npz"), Settings(batch_size=8, neighbours=False)
        return evaluate.score_images(images, pathlib.Path("i"), tmp_path / out, settings=settings, quiet=True)

    expected = run("plenty")["inception_score"]
    monkeypatch.setattr(memory, "free", lambda device: takes[0] - 1)
    with pytest.raises(ConfigError, match=r"batch_size 8 takes .* are free: (give|choose) "):
        run("little")
    assert not list((tmp_path / "little").rglob("totals.npz"))
    monkeypatch.setattr(memory, "free", lambda device: takes[0])
    assert run("little")["inception_score"] == expected
    assert len(takes) == 3 and takes[0] > 0
