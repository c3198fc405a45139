"""Memory of a long training stays flat."""

from __future__ import annotations

import pathlib

import pytest

from rar_jax.config import load_experiment
from rar_jax.experiment import resolve
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.session import Session
from rar_jax.runs.workdir import Workdir
from rar_jax.training.loop import train

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"


class Weighed(Session):
    """Notes the process's memory, in bytes, at every poll."""

    def __init__(self, workdir: pathlib.Path) -> None:
        super().__init__(Ledger(workdir))
        self.bytes: list[int] = []

    def poll(self) -> None:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        self.bytes.append(4096 * pages)


@pytest.mark.slow
def test_memory_is_flat(tmp_path: pathlib.Path) -> None:
    recipe = {"steps": 2000, "eval_every": 100, "checkpoint_every": 50, "log_every": 1}
    experiment = resolve(load_experiment(str(TINY), [f"classifier.train.{k}={v}" for k, v in recipe.items()]), "tiny")
    session = Weighed(tmp_path)
    train(experiment, "classifier", Workdir(tmp_path), make_mesh(experiment.mesh), quiet=True, session=session)
    quarter = len(session.bytes) // 4
    second, last = max(session.bytes[quarter : 2 * quarter]), max(session.bytes[3 * quarter :])
    assert len(session.bytes) >= 2000 and last <= second + max(0.05 * second, 20e6), (second, last)
