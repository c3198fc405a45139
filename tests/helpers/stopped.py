"""The tiny classifier, which compiles fastest, trained in this process and stopped where a test says."""

from __future__ import annotations

import pathlib
from typing import Any

from commands import TINY

from rar_jax.config import load_experiment
from rar_jax.errors import Preempted
from rar_jax.experiment import Experiment, resolve
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.session import Session
from rar_jax.runs.workdir import Workdir
from rar_jax.training.loop import train

RECIPE = {
    "steps": 20,
    "log_every": 1,
    "eval_every": 10,
    "checkpoint_every": 4,
    "max_consecutive_skips": 3,
    "keep_checkpoints": 9,
}


class StopAt(Session):
    """A session that is preempted at its k-th poll."""

    def __init__(self, workdir: pathlib.Path, poll: int) -> None:
        super().__init__(Ledger(workdir))
        self.left = poll

    def poll(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Preempted


def tiny(**recipe: Any) -> Experiment:
    overrides = [f"classifier.train.{name}={value}" for name, value in {**RECIPE, **recipe}.items()]
    return resolve(load_experiment(str(TINY), overrides), "tiny")


def stage(workdir: pathlib.Path, session: Session | None = None, **recipe: Any) -> None:
    """Trains it, from where it was stopped."""
    experiment, session = tiny(**recipe), session or Session(Ledger(workdir))
    train(experiment, "classifier", Workdir(workdir), make_mesh(experiment.mesh), quiet=True, session=session)


def told(workdir: pathlib.Path) -> list[Any]:
    """The rows of metrics without their times."""
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir, "classifier")]
