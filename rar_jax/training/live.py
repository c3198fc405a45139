"""Evaluation while training: validation losses, grids, and scores of a few samples, whose names carry their number."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.evaluation.fd_classifier import ClassifierScorer
from rar_jax.evaluation.image_batches import ImageBatches, batch_samples
from rar_jax.evaluation.program import Program, Settings, load_inception
from rar_jax.evaluation.reference import read_reference
from rar_jax.experiment import Experiment, open_source
from rar_jax.keys import domain_key, sample_keys
from rar_jax.metrics import frechet, inception_score, moments
from rar_jax.metrics.sums import ScoreTotals
from rar_jax.parallel.arrays import drop_metadata, local_rows, make_global_batch, put_on_mesh
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.grids import Grid, pick_evenly
from rar_jax.runs.logging import RunLogger
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import reconstruct_images, sample_images
from rar_jax.training.objective import Objective
from rar_jax.training.step import Batch, with_tokens
from rar_jax.weights.stages import trained_params

PAIRS = 12  # validation images of a tokenizer's grid
Poll = Callable[[], None]  # called before each batch; it may raise Preempted


class Evaluator(Protocol):
    """Computes metrics of a stage's parameters. `compile` compiles every program that `evaluate` calls."""

    def compile(self, params: Any) -> None: ...

    def evaluate(self, params: Any, step: int, poll: Poll) -> dict[str, float]: ...


class Validator:
    """Mean metrics over the first validation records.

    Args:
      records: rounded down to divide over the mesh.
      frozen: the tokenizer's parameters, where images are encoded while training: here once.
    """

    def __init__(self, objective: Objective, records: int, mesh: Mesh, frozen: Any = None) -> None:
        parts, records = batch_divisor(mesh), min(records, len(objective.heldout))
        self._count = math.ceil(records / 512)
        size = max(records // self._count // parts, 1) * parts
        encode = jax.jit(functools.partial(with_tokens, objective.tokenizer), out_shardings=batch_sharding(mesh))
        root = domain_key(0, "validation")
        make_key = jax.jit(lambda i: jax.random.fold_in(root, i), out_shardings=replicated(mesh))
        self._batches: list[tuple[str, Batch, jax.Array]] = []
        for i in range(self._count):
            rows = (i * size + local_rows(mesh, size)) % len(objective.heldout)
            batch = make_global_batch(drop_metadata(objective.heldout.gather(rows)), mesh)
            if objective.tokenizer is not None:
                with sharded(mesh):
                    batch = encode(frozen, batch)
            key = make_key(np.uint32(i))
            for name, added in objective.variants(size, key).items():
                variant = {**batch, **put_on_mesh(jax.device_get(added), batch_sharding(mesh))}
                self._batches.append((name and f"{name}_", variant, key))
        loss = functools.partial(objective.model.loss, objective.config, train=False)
        self._loss = jax.jit(
            lambda params, batch, key, step: loss(params, batch, key=key, step=step)[1].metrics,
            out_shardings=replicated(mesh),
        )

    def compile(self, params: Any) -> None:
        shapes = {str(jax.tree.map(jnp.shape, batch)): (batch, key) for _, batch, key in self._batches}
        for batch, key in shapes.values():
            self._loss.lower(params, batch, key, np.int32(0)).compile()

    def evaluate(self, params: Any, step: int, poll: Poll) -> dict[str, float]:
        totals: dict[str, float] = {}
        for prefix, batch, key in self._batches:
            poll()
            for name, value in jax.device_get(self._loss(params, batch, key, np.int32(step))).items():
                metric = f"validation/{prefix}{name}"
                totals[metric] = totals.get(metric, 0.0) + float(value) / self._count
        return totals


class ClassifierEvaluator:
    """Frechet distance on the features of the run's classifier."""

    def __init__(self, experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
        self._scorer = ClassifierScorer(experiment, workdir, mesh)

    def compile(self, params: Any) -> None:
        self._scorer.compile_live(params)

    def evaluate(self, params: Any, step: int, poll: Poll) -> dict[str, float]:
        return self._scorer.score_live(params, poll)


class InceptionEvaluator:
    """inception_score_n..., and fid_n... if there is a reference, on float32 sums of each batch.

    The FID of few samples is far above that of 50,000, and noisy: a curve, not a result.

    Raises: what reading Inception's weights and the reference raises, before anything is trained.
    """

    def __init__(self, experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
        config = experiment.evaluate
        assert config.inception is not None
        self._samples, parts = config.live_samples, batch_divisor(mesh)
        self._size = -(-min(config.batch_size, self._samples) // parts) * parts
        settings = Settings(seed=experiment.seed, batch_size=self._size, chunk=1, split_size=self._samples)
        self._reference = read_reference(config.reference) if config.reference else None
        network = load_inception(pathlib.Path(config.inception), mesh, settings)
        self._program = Program(network, mesh, settings, self._reference)
        self._experiment = experiment
        self._tokenizer, _ = trained_params(experiment, "tokenizer", workdir, mesh)
        self._distance = jax.jit(frechet.frechet_distance_of_moments)

    def compile(self, params: Any) -> None:
        self._program.lower(self._batch_samples(params)).compile()
        if (reference := self._reference) is not None:
            zero = moments.init_moments(len(reference.mean))
            self._distance.lower(jnp.asarray(reference.cov, jnp.float32), zero).compile()

    def evaluate(self, params: Any, step: int, poll: Poll) -> dict[str, float]:
        n, totals, samples = self._samples, ScoreTotals(self._samples), self._batch_samples(params)
        for start in range(0, n, self._size):
            poll()
            count = min(self._size, n - start)
            totals.add(self._program.score(samples, start, count).sums, count)
        if totals.nonfinite:
            return {f"nonfinite_images_n{n}": float(totals.nonfinite)}
        metrics = {f"inception_score_n{n}": inception_score.score_splits(totals.splits)}
        if self._reference is not None:
            given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (self._reference.cov, totals.pool3))
            metrics[f"fid_n{n}"] = float(self._distance(*given))
        return metrics

    def _batch_samples(self, params: Any) -> ImageBatches:
        experiment, params = self._experiment, {"generator": params, "tokenizer": self._tokenizer}
        models = experiment.generator, experiment.tokenizer
        return batch_samples(models, params, experiment.sampling, num=self._samples, seed=experiment.seed)


@dataclasses.dataclass
class GridEvaluator:
    """Logs a grid of images, which `rar-jax report` shows over time.

    function: (params, frozen, *rows of a batch) -> images. make_grid: of all images.
    """

    name: str
    function: Callable[..., jax.Array]
    frozen: Any
    rows: tuple[np.ndarray, ...]
    make_grid: Callable[[np.ndarray], Grid]
    batch_size: int
    reporter: RunLogger
    mesh: Mesh

    def __post_init__(self) -> None:
        self._program = jax.jit(self.function, out_shardings=replicated(self.mesh))

    def compile(self, params: Any) -> None:
        with sharded(self.mesh):
            self._program.lower(params, self.frozen, *next(self._batches())).compile()

    def evaluate(self, params: Any, step: int, poll: Poll) -> dict[str, float]:
        images = []
        for batch in self._batches():
            poll()
            with sharded(self.mesh):
                images.append(np.asarray(self._program(params, self.frozen, *batch)))
        self.reporter.write_grid(step, self.name, self.make_grid(np.concatenate(images)[: len(self.rows[0])]))
        return {}

    def _batches(self) -> Iterator[tuple[jax.Array, ...]]:
        """The rows on the devices; the last batch is filled up."""
        count, parts = len(self.rows[0]), batch_divisor(self.mesh)
        size = -(-min(self.batch_size, count) // parts) * parts
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count
            yield tuple(put_on_mesh([array[rows] for array in self.rows], batch_sharding(self.mesh)))


def make_sample_grid(experiment: Experiment, workdir: Workdir, mesh: Mesh, reporter: RunLogger) -> GridEvaluator:
    """One row per class. Image i is that of `Pipeline.sample` for these labels and the experiment's seed."""
    data, columns, size = experiment.data, experiment.evaluate.live_grid, experiment.evaluate.batch_size
    classes = pick_evenly(data.num_classes, experiment.evaluate.grid_classes)
    labels = np.repeat(classes, columns).astype(np.int32)
    names = tuple(data.class_names[label].split(",")[0] for label in classes)
    tokenizer, _ = trained_params(experiment, "tokenizer", workdir, mesh)

    def sample(params: Any, tokenizer: Any, labels_b: jax.Array, ids_b: jax.Array) -> jax.Array:
        params, models = {"generator": params, "tokenizer": tokenizer}, (experiment.generator, experiment.tokenizer)
        keys_b = sample_keys(jnp.uint32(experiment.seed), ids_b)
        return sample_images(*models, params, labels_b, keys_b, experiment.sampling)

    def make_grid(images: np.ndarray) -> Grid:
        return Grid(images.reshape(len(classes), columns, *images.shape[1:]), names, ("",) * columns)

    rows = labels, np.arange(len(labels), dtype=np.int32)
    return GridEvaluator("samples", sample, tokenizer, rows, make_grid, size, reporter, mesh)


def make_reconstruction_grid(experiment: Experiment, mesh: Mesh, reporter: RunLogger) -> GridEvaluator:
    """Two rows: validation images, and their reconstructions."""
    heldout, size = open_source(experiment, "heldout"), experiment.evaluate.batch_size
    records = heldout.gather(np.array(pick_evenly(len(heldout), PAIRS)))
    originals = records["images"]
    names = tuple(experiment.data.class_names[label].split(",")[0] for label in records["labels"])

    def reconstruct(params: Any, _: None, images: jax.Array) -> jax.Array:
        return reconstruct_images(experiment.tokenizer, params, images)[0]

    def make_grid(images: np.ndarray) -> Grid:
        return Grid(np.stack([originals, images]), ("original", "reconstruction"), names)

    return GridEvaluator("reconstructions", reconstruct, None, (originals,), make_grid, size, reporter, mesh)


def make_live_evaluators(
    experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh, reporter: RunLogger
) -> list[Evaluator]:
    """Make the evaluators of a stage's samples or reconstructions that config.evaluate requests."""
    config = experiment.evaluate
    if stage == "tokenizer" and config.live_grid:
        return [make_reconstruction_grid(experiment, mesh, reporter)]
    evaluators: list[Evaluator] = []
    if stage == "generator" and config.live_samples and experiment.classifier:
        evaluators.append(ClassifierEvaluator(experiment, workdir, mesh))
    if stage == "generator" and config.live_samples and config.inception:
        evaluators.append(InceptionEvaluator(experiment, workdir, mesh))
    if stage == "generator" and config.live_grid:
        evaluators.append(make_sample_grid(experiment, workdir, mesh, reporter))
    return evaluators


def select_score(metrics: dict[str, float]) -> tuple[str, float] | None:
    """Select the metric of the best checkpoint: live distance, else validation loss."""
    for prefix, suffix in (("fid_n", ""), ("fd_classifier_n", ""), ("validation/", "loss")):
        for name, value in metrics.items():
            if name.startswith(prefix) and name.endswith(suffix):
                return name, value
    return None
