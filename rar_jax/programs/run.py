"""Run all stages of an experiment: tokenizer, classifier, tokens, generator, evaluation."""

from __future__ import annotations

import time

from rar_jax.config import require
from rar_jax.evaluation.final import describe_result, score_run
from rar_jax.experiment import Experiment, fill_defaults
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.processes import is_main
from rar_jax.runs.session import open_session
from rar_jax.runs.workdir import Workdir
from rar_jax.tokens.tokenize import tokenize
from rar_jax.training.loop import train
from rar_jax.weights.stages import check_start, finished


def run_experiment(experiment: Experiment, workdir: Workdir, *, quiet: bool = False) -> None:
    """Run or resume all stages in a work directory. Finished stages are skipped.

    Raises: ConfigError if the directory belongs to another experiment; LockError if another run writes to it; what
      a stage raises.
    """
    data, began = experiment.data, time.monotonic()
    can_crop = data.crop != "random" or data.on_the_fly or bool(data.given_tokens("train"))
    require(can_crop, "data.crop is 'random', but tokens are stored: set data.on_the_fly=True, or another crop")
    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    check_start(experiment, workdir)

    def say(text: str) -> None:
        if not quiet and is_main():
            print(text, flush=True)

    def train_stage(stage: str) -> None:
        if finished(experiment, stage, workdir):
            say(f"{stage}: up to date, skipped")
            return
        start = time.monotonic()
        train(experiment, stage, workdir, mesh, quiet=quiet, session=around)
        how = "trained" if experiment.recipe(stage) else f"copied from {experiment.tokenizer_weights}"
        say(f"{stage}: {how} in {time.monotonic() - start:.0f} s")

    with open_session(workdir, "run", lambda: workdir.claim(experiment.resolved(), fill_defaults)) as around:
        say(experiment.describe(workdir.path, mesh))
        for stage in experiment.stages[:-1]:
            train_stage(stage)
        if data.on_the_fly:
            say("tokens: encoded on the fly, none are stored")
        for split in () if data.on_the_fly else ("train", "heldout"):
            tokenize(experiment, workdir, mesh, split, quiet=quiet)
            around.ledger.lap("tokenizing")
            around.ledger.row("tokenized", split=split)
        train_stage("generator")
        result = score_run(experiment, workdir, mesh, quiet=quiet)
        around.ledger.lap("evaluating")
        say(describe_result(experiment, workdir, result, time.monotonic() - began))
