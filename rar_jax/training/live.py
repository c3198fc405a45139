"""Numbers of an evaluation while training. Scores are on few samples, in graph to the last root, named with their number."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rar_jax.evaluation.fd_classifier import ClassifierScorer
from rar_jax.evaluation.image_batches import ImageBatches, batch_samples
from rar_jax.evaluation.program import Program, Settings, load_inception
from rar_jax.evaluation.reference import read_reference
from rar_jax.experiment import Experiment
from rar_jax.metrics import frechet, inception_score, moments
from rar_jax.metrics.sums import ScoreTotals
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.runs.workdir import Workdir
from rar_jax.weights.stages import trained_params


class Numbers(NamedTuple):
    """Numbers of a stage's parameters.

    compile: of parameters, makes the programs that `of` calls. of: of parameters, and of what it calls before each part of the work,
    which may raise Preempted.
    """

    compile: Callable[[Any], None]
    of: Callable[[Any, Callable[[], None]], dict[str, float]]


def live_scorers(experiment: Experiment, workdir: Workdir, mesh: Mesh) -> list[Numbers]:
    """What config.evaluate asks for: the distance on classifier features, and on Inception's.

    Raises: what reading Inception's weights and the reference raises, before anything is trained.
    """
    scorers: list[Numbers] = []
    if experiment.evaluate.live_samples and experiment.classifier:
        scorer = ClassifierScorer(experiment, workdir, mesh)
        scorers.append(Numbers(scorer.compile_live, scorer.score_live))
    if experiment.evaluate.live_samples and experiment.evaluate.inception:
        scorers.append(_inception(experiment, workdir, mesh))
    return scorers


def best_by(told: dict[str, float]) -> tuple[str, float] | None:
    """By what a checkpoint is the best: a live distance, or else the first held-out loss; lower is better."""
    for wanted in (
        lambda name: name.startswith("fid_n"),
        lambda name: name.startswith("fd_classifier_n"),
        lambda name: name.startswith("validation/") and name.endswith("loss"),
    ):
        if name := next(filter(wanted, told), None):
            return name, told[name]
    return None


def _inception(experiment: Experiment, workdir: Workdir, mesh: Mesh) -> Numbers:
    """fid_n..., where there is a reference, and inception_score_n..., on float32 sums of each batch.

    Of few images a FID is far above that of 50,000, and the noisier the fewer: a curve, not a result.
    """
    config = experiment.evaluate
    assert config.inception is not None
    n, parts = config.live_samples, batch_divisor(mesh)
    size = -(-min(config.batch_size, n) // parts) * parts
    settings = Settings(seed=experiment.seed, batch_size=size, chunk=1, split_size=n)
    reference = read_reference(config.reference) if config.reference else None
    program = Program(load_inception(pathlib.Path(config.inception), mesh, settings), mesh, settings, reference)
    tokenizer, _ = trained_params(experiment, "tokenizer", workdir, mesh)
    distance = jax.jit(frechet.frechet_distance_of_moments)

    def draw(generator_params: Any) -> ImageBatches:
        models = experiment.generator, experiment.tokenizer
        params = {"generator": generator_params, "tokenizer": tokenizer}
        return batch_samples(models, params, experiment.guidance, num=n, seed=experiment.seed)

    def compile(generator_params: Any) -> None:
        program.lower(draw(generator_params)).compile()
        if reference is not None:
            distance.lower(jnp.asarray(reference.cov, jnp.float32), moments.init_moments(len(reference.mean))).compile()

    def score(generator_params: Any, poll: Callable[[], None]) -> dict[str, float]:
        samples, totals = draw(generator_params), ScoreTotals(n)
        for start in range(0, n, size):
            poll()
            count = min(size, n - start)
            totals.add(program.score(samples, start, count).sums, count)
        told = {f"inception_score_n{n}": inception_score.score_splits(totals.splits)}
        if reference is not None:
            told[f"fid_n{n}"] = float(
                distance(
                    jnp.asarray(reference.cov, jnp.float32),
                    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), totals.pool3),
                )
            )
        return told

    return Numbers(compile, score)
