"""Score a generator by the classifier of its experiment, without Inception.

The Frechet distance on features of this small network is called fd_classifier; it is not a FID.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.data.sources import ImageSource
from rar_jax.evaluation.image_batches import (
    ImageBatches,
    batch_samples,
    batch_source,
    require_finite_images,
    row_sharding,
)
from rar_jax.experiment import Experiment, open_source
from rar_jax.keys import domain_key
from rar_jax.metrics.frechet import frechet_distance, frechet_distance_of_moments
from rar_jax.metrics.moments import Moments, add_in_float64, finalize_moments, init_moments, update_moments
from rar_jax.networks import classifier
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.weights.stages import model_shardings, trained_params

TRAIN_BLOCK = 1000  # training images on the devices at a time


class ClassifierSums(NamedTuple):
    """Sums over images: moments of features, and numbers of correct classes and of images with non-finite pixels."""

    moments: Moments
    correct: Any
    nonfinite: Any


class ClassifierScorer:
    """The classifier, and statistics of its features of the training images."""

    def __init__(self, experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
        self.experiment: Experiment = experiment
        self.mesh: Mesh = mesh
        self.train: ImageSource = open_source(experiment, "train")
        self.heldout: ImageSource = open_source(experiment, "heldout")
        self._config: classifier.Config = experiment.model("classifier").config
        self._tokenizer_params: Any = trained_params(experiment, "tokenizer", workdir, mesh)[0]
        self._params: Any = trained_params(experiment, "classifier", workdir, mesh)[0]
        self._jitted = jax.jit(self._scan, static_argnames=("make", "keep"), out_shardings=replicated(mesh))
        self._jitted_distance = jax.jit(frechet_distance_of_moments)
        self.mean: np.ndarray = np.zeros(self._config.features)
        _, kept = self.score(batch_source(self.train), range(len(self.train)), keep=("features",))
        train_nf = np.concatenate(kept["features"]).astype(np.float64)
        self.mean = train_nf.mean(axis=0)
        self.cov: np.ndarray = np.cov(train_nf, rowvar=False)

    def _scan(self, params: Any, rows: Any, weights_sb: Any, *, make: Any, keep: tuple[str, ...]) -> Any:
        def add_batch(total: ClassifierSums, batch: Any) -> tuple[ClassifierSums, Any]:
            rows, weights_b = batch
            drawn = make(params["images"], rows)
            images = drawn["images"]
            out = classifier.features(self._config, params["classifier"], images)
            moments = update_moments(total.moments, out["features"], weights_b, params["shift"])
            correct_b = (out["logits"].argmax(axis=-1) == rows["labels"]) * weights_b
            made = {"images": images, "features": out["features"]}
            bad = total.nonfinite + jnp.sum(drawn.get("nonfinite", 0) * weights_b)
            return ClassifierSums(moments, total.correct + correct_b.sum(), bad), {name: made[name] for name in keep}

        start = ClassifierSums(init_moments(len(self.mean)), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(add_batch, start, (rows, weights_sb))

    def draw(self, generator_params: Any, num: int, *, seed: int) -> ImageBatches:
        """Draw `num` samples of a generator with these parameters."""
        experiment, params = self.experiment, {"generator": generator_params, "tokenizer": self._tokenizer_params}
        models = experiment.generator, experiment.tokenizer
        return batch_samples(models, params, experiment.sampling, num=num, seed=seed)

    def score(
        self,
        batches: ImageBatches,
        ids: range,
        *,
        keep: tuple[str, ...] = (),
        chunk: int = 5,
        show: Callable[[range], Iterable[int]] = iter,
        poll: Callable[[], None] = lambda: None,
    ) -> tuple[ClassifierSums, dict[str, list[np.ndarray]]]:
        """Sum over the images with these ids, and return arrays of each chunk.

        chunk: batches in one run of the program. show: wraps the first ids of the chunks. poll: called before each.
        """
        size = chunk * min(self.experiment.evaluate.batch_size, batches.num)
        total = ClassifierSums(Moments(0.0, 0.0, 0.0), 0.0, 0.0)
        kept: dict[str, list[np.ndarray]] = {name: [] for name in keep}
        for start in show(range(ids.start, ids.stop, size)):
            poll()
            count = min(size, ids.stop - start)
            with sharded(self.mesh):
                arguments = self._arguments(batches, start, count)
                sums, made = jax.device_get(self._jitted(*arguments, make=batches.make, keep=keep))
            total = add_in_float64(total, sums)
            for name, array in made.items():
                kept[name].append(array.reshape(-1, *array.shape[2:])[:count])
        return total, kept

    def _arguments(self, batches: ImageBatches, start: int, count: int) -> tuple[Any, ...]:
        rows = batches.read_rows(start, count, self.experiment.evaluate.batch_size, self.mesh)
        params = {"images": batches.params, "classifier": self._params, "shift": jnp.asarray(self.mean, jnp.float32)}
        return params, *put_on_mesh(rows, row_sharding(self.mesh))

    def compute_distance(self, sums: ClassifierSums) -> float:
        """Compute fd_classifier to the training images in float64."""
        return frechet_distance(self.mean, self.cov, *finalize_moments(sums.moments, self.mean))

    def compute_distance_in_graph(self, sums: ClassifierSums) -> float:
        """Compute fd_classifier with the float32 program of live curves."""
        arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (self.cov, sums.moments))
        return float(self._jitted_distance(*arguments))

    def measure_nearest(self, images: np.ndarray) -> float:
        """Return the mean pixel RMS (0..1) of images to their nearest training image.

        The images are on the devices; the training images pass through them block by block.
        """
        n, size = len(images), self.experiment.evaluate.batch_size * self.mesh.size
        spans = [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]
        parts = [put_on_mesh(images[ids], batch_sharding(self.mesh)) for ids in spans]
        nearest = [np.full(size, np.inf, np.float32) for _ in parts]
        squared = jax.jit(_square_distances_to_nearest, out_shardings=replicated(self.mesh))
        for start in range(0, len(self.train), TRAIN_BLOCK):
            ids = np.minimum(np.arange(start, start + TRAIN_BLOCK), len(self.train) - 1)
            block = put_on_mesh(self.train.gather(ids)["images"], replicated(self.mesh))
            nearest = [np.minimum(best, squared(part, block)) for best, part in zip(nearest, parts, strict=True)]
        return float(np.sqrt(np.concatenate(nearest)[:n]).mean(dtype=np.float64))

    def compile_live(self, generator_params: Any) -> None:
        """Compile what `score_live` runs, without running it."""
        batches = self.draw(generator_params, self.experiment.evaluate.live_samples, seed=0)
        with sharded(self.mesh):
            self._jitted.lower(*self._arguments(batches, 0, 1), make=batches.make, keep=()).compile()
        moments = init_moments(len(self.mean))
        self._jitted_distance.lower(jnp.asarray(self.cov, jnp.float32), moments).compile()

    def score_live(self, generator_params: Any, poll: Callable[[], None]) -> dict[str, float]:
        """Score few samples while training, in float32; the name carries their number."""
        batches = self.draw(generator_params, self.experiment.evaluate.live_samples, seed=0)
        n = batches.num
        sums, _ = self.score(batches, range(n), chunk=1, poll=poll)
        if sums.nonfinite:
            return {f"nonfinite_images_n{n}": float(sums.nonfinite)}
        distance = self.compute_distance_in_graph(sums)
        return {f"fd_classifier_n{n}": distance, "asked_class_share": float(sums.correct) / n}


def _square_distances_to_nearest(images: jax.Array, train: jax.Array) -> jax.Array:
    images_bp = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255
    train_tp = train.reshape(train.shape[0], -1).astype(jnp.float32) / 255
    squared_bt = (
        jnp.sum(images_bp**2, axis=1)[:, None]
        + jnp.sum(train_tp**2, axis=1)[None, :]
        - 2 * jnp.matmul(images_bp, train_tp.T, precision=jax.lax.Precision.HIGHEST)
    )
    return jnp.maximum(squared_bt.min(axis=1), 0) / images_bp.shape[1]


def score_with_classifier(
    experiment: Experiment, workdir: Workdir, mesh: Mesh, *, quiet: bool = False
) -> dict[str, Any]:
    """Score the generator beside held-out images and an untrained generator.

    Returns: the metrics of result.json.
    """
    scorer, n = ClassifierScorer(experiment, workdir, mesh), experiment.evaluate.samples
    n_heldout = len(scorer.heldout)
    n_few = min(n, n_heldout)
    trained, _ = trained_params(experiment, "generator", workdir, mesh)
    init = functools.partial(experiment.generator.module.init, experiment.generator.config)
    at = model_shardings(experiment.generator, mesh)
    untrained = jax.jit(init, out_shardings=at)(domain_key(experiment.seed, "untrained"))

    def score(batches: ImageBatches, description: str) -> tuple[ClassifierSums, ClassifierSums, np.ndarray]:
        """Return the sums of the first n_few images and of all, and all images."""
        show = functools.partial(track_progress, description=f"evaluate {description}", unit="chunks", quiet=quiet)
        few, first = scorer.score(batches, range(n_few), keep=("images",), show=show)
        rest, others = scorer.score(batches, range(n_few, batches.num), keep=("images",), show=show)
        require_finite_images(few.nonfinite + rest.nonfinite, batches.num)
        return few, add_in_float64(few, rest), np.concatenate([*first["images"], *others["images"]])

    real_few, real, real_images = score(batch_source(scorer.heldout), "held-out images")
    few, many, images = score(scorer.draw(trained, n, seed=experiment.seed), "samples")
    untrained_few, untrained_many, _ = score(scorer.draw(untrained, n, seed=experiment.seed), "untrained")
    return {
        "fd_classifier": {
            "reference": f"the {len(scorer.train)} training images",
            f"samples_n{n}": scorer.compute_distance(many),
            f"samples_n{n}_in_graph_float32": scorer.compute_distance_in_graph(many),
            f"untrained_n{n}": scorer.compute_distance(untrained_many),
            f"samples_n{n_few}": scorer.compute_distance(few),
            f"heldout_n{n_few}": scorer.compute_distance(real_few),
            f"untrained_n{n_few}": scorer.compute_distance(untrained_few),
        },
        f"asked_class_share_n{n}": float(many.correct) / n,
        f"classifier_accuracy_heldout_n{n_heldout}": float(real.correct) / n_heldout,
        "nearest_training_image_rms": {
            "note": "mean over images of the pixel RMS distance (0..1) to the nearest training image; "
            "samples far below held-out images would be memorisation",
            f"samples_n{n}": scorer.measure_nearest(images),
            f"heldout_n{n_heldout}": scorer.measure_nearest(real_images),
        },
    }
