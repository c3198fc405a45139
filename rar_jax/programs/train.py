"""Train one stage of an experiment, or resume it."""

from __future__ import annotations

from rar_jax.config import nearest, require
from rar_jax.experiment import STAGES, Experiment, fill_defaults
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import is_main
from rar_jax.runs.session import open_session
from rar_jax.runs.workdir import Workdir
from rar_jax.training.loop import train
from rar_jax.weights.stages import check_start


def train_stage(experiment: Experiment, workdir: Workdir, *, stage: str, quiet: bool) -> None:
    """Train a stage to its recipe's last step, in a work directory."""
    require(stage in STAGES, f"no stage '{stage}'.{nearest(stage, STAGES)}")
    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    check_start(experiment, workdir)
    with open_session(workdir, "train", lambda: workdir.claim(experiment.resolved(), fill_defaults)) as around:
        if is_main() and not quiet:
            print(experiment.describe(workdir.root, mesh), flush=True)
        train(experiment, stage, workdir, mesh, quiet=quiet, session=around)
