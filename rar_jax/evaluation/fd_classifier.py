"""Scores a generator: labels -> tokens -> pixels -> uint8 -> features -> moments in one jitted program over the mesh.

Only sums leave the devices. The features are those of the small classifier that was trained on the same training images, so
the distance is called fd_classifier; it is not a FID.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.data.sources import ImageSource
from rar_jax.experiment import Experiment, open_source
from rar_jax.metrics import frechet, moments
from rar_jax.metrics.moments import Moments
from rar_jax.networks import classifier
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, param_shardings, replicated, sharded
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import Guidance, sample_images, sample_keys
from rar_jax.weights.stages import trained_params


class Score(NamedTuple):
    """Sums over images: feature moments, how many the classifier gives the asked class, and the distance of each to
    its nearest training image (root mean square over pixels in [0, 1]), summed."""

    moments: Moments
    asked: Any
    nearest: Any

    def add(self, other: Score) -> Score:
        """The sums of both, in float64 on the host."""
        merged = moments.merge(self.moments, other.moments)
        return Score(merged, *(np.float64(a) + np.float64(b) for a, b in zip(self[1:], other[1:], strict=True)))


class Scorer:
    """Holds what scoring needs: tokenizer, classifier, training images and their feature statistics."""

    def __init__(self, experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
        self.experiment: Experiment = experiment
        self.mesh: Mesh = mesh
        self.judge: classifier.Config = experiment.model("classifier").config
        self.tokenizer_params: Any = trained_params(experiment, "tokenizer", workdir, mesh)[0]
        self.classifier_params: Any = trained_params(experiment, "classifier", workdir, mesh)[0]
        self.train: ImageSource = open_source(experiment, "train")
        self.heldout: ImageSource = open_source(experiment, "heldout")
        self._train_images = put_on_mesh(_all_images(self.train), replicated(mesh))
        features = jax.jit(
            lambda p, x: classifier.features(self.judge, p, x)["features"], out_shardings=replicated(mesh)
        )
        train_nf = np.concatenate(
            [
                np.asarray(features(self.classifier_params, self._train_images[i : i + 1000]))
                for i in range(0, len(self.train), 1000)
            ]
        ).astype(np.float64)
        self.mean: np.ndarray = train_nf.mean(axis=0)
        self.cov: np.ndarray = np.cov(train_nf, rowvar=False)
        self._shift = jnp.asarray(self.mean, jnp.float32)
        self._root = jax.jit(frechet.distance_of_sums)
        self._score_samples = jax.jit(self._scan_samples, out_shardings=replicated(mesh))
        self._score_images = jax.jit(self._scan_images, out_shardings=replicated(mesh))

    # ---- in graph

    def _score_batch(self, params: Any, images: jax.Array, labels_b: jax.Array, weights_b: jax.Array) -> Score:
        out = classifier.features(self.judge, params["classifier"], images)
        sums = moments.update(moments.zero(len(self.mean)), out["features"], weights_b, params["shift"])
        asked_b = (out["logits"].argmax(axis=-1) == labels_b) * weights_b
        flat_bp = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255
        train_tp = params["train"].reshape(params["train"].shape[0], -1).astype(jnp.float32) / 255
        squared_bt = (
            jnp.sum(flat_bp**2, axis=1)[:, None]
            + jnp.sum(train_tp**2, axis=1)[None, :]
            - 2 * jnp.matmul(flat_bp, train_tp.T, precision=jax.lax.Precision.HIGHEST)
        )
        nearest_b = jnp.sqrt(jnp.maximum(squared_bt.min(axis=1), 0) / flat_bp.shape[1]) * weights_b
        return Score(sums, asked_b.sum(), nearest_b.sum())

    def _scan_samples(
        self, params: Any, labels_sb: Any, ids_sb: Any, weights_sb: Any, seed: Any, guidance: Guidance
    ) -> Score:
        def one(total: Score, batch: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Score, None]:
            labels_b, ids_b, weights_b = batch
            experiment = self.experiment
            images = sample_images(
                experiment.generator, experiment.tokenizer, params, labels_b, sample_keys(seed, ids_b), guidance
            )
            return jax.tree.map(jnp.add, total, self._score_batch(params, images, labels_b, weights_b)), None

        zero = Score(moments.zero(len(self.mean)), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(one, zero, (labels_sb, ids_sb, weights_sb))[0]

    def _scan_images(self, params: Any, images_sbyxc: Any, labels_sb: Any, weights_sb: Any) -> Score:
        def one(total: Score, batch: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Score, None]:
            return jax.tree.map(jnp.add, total, self._score_batch(params, *batch)), None

        zero = Score(moments.zero(len(self.mean)), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(one, zero, (images_sbyxc, labels_sb, weights_sb))[0]

    # ---- from the host

    def _params(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer_params,
            "classifier": self.classifier_params,
            "shift": self._shift,
            "train": self._train_images,
        }

    def samples(
        self,
        generator_params: Any,
        ids: range,
        *,
        seed: int = 0,
        guidance: Guidance | None = None,
        chunk: int = 5,
        poll: Callable[[], None] = lambda: None,
    ) -> Score:
        """Sums over the samples with these ids; sample i has class i modulo the classes, so classes are interleaved. `poll` is
        called before each chunk of so many batches."""
        size = self.batch_size(len(ids))
        total: Score | None = None
        for start in range(ids.start, ids.stop, size * chunk):
            poll()
            shape = min(chunk, -(-(ids.stop - start) // size)), size
            with sharded(self.mesh):
                score = self._score_samples(*self._to_sample(generator_params, start, shape, ids.stop, seed, guidance))
            total = score if total is None else total.add(score)
        assert total is not None
        return total

    def _to_sample(
        self, generator_params: Any, start: int, shape: tuple[int, int], stop: int, seed: int, guidance: Guidance | None
    ) -> tuple[Any, ...]:
        """Arguments of `_score_samples` for ids from `start` on, (batches, size); those from `stop` on do not count."""
        ids_sb = np.arange(start, start + math.prod(shape), dtype=np.int32).reshape(shape)
        classes = self.experiment.data.num_classes
        batch = self._place(((ids_sb % classes).astype(np.int32), ids_sb, (ids_sb < stop).astype(np.float32)))
        params = {"generator": generator_params, **self._params()}
        return params, *batch, np.uint32(seed), guidance or self.experiment.guidance

    def images(self, source: ImageSource, n: int) -> Score:
        """Sums over the first n real images, each against its own label."""
        size = self.batch_size(n)
        total: Score | None = None
        for start in range(0, n, size):
            places = np.arange(start, start + size)
            rows = source.gather(np.minimum(places, n - 1))
            weights = (places < n).astype(np.float32)
            with sharded(self.mesh):
                batch = self._place((rows["images"][None], rows["labels"][None], weights[None]))
                score = self._score_images(self._params(), *batch)
            total = score if total is None else total.add(score)
        assert total is not None
        return total

    def distance(self, score: Score) -> float:
        """fd_classifier to the training images, float64."""
        return frechet.distance(self.mean, self.cov, *moments.finalize(score.moments, self.mean))

    def compile_live(self, generator_params: Any) -> None:
        """Compiles what `live` runs, without running it."""
        n = self.experiment.evaluate.live_samples
        with sharded(self.mesh):
            given = self._to_sample(generator_params, 0, (1, self.batch_size(n)), n, 0, None)
            self._score_samples.lower(*given).compile()
        self._root.lower(jnp.asarray(self.cov, jnp.float32), moments.zero(len(self.mean))).compile()

    def live(self, generator_params: Any, poll: Callable[[], None]) -> dict[str, float]:
        """The distance while training, on few samples; its name carries how many. float32, in graph to the end."""
        n = self.experiment.evaluate.live_samples
        score = self.samples(generator_params, range(n), chunk=1, poll=poll)
        return {f"fd_classifier_n{n}": self.distance_in_graph(score), "asked_class_share": float(score.asked) / n}

    def distance_in_graph(self, score: Score) -> float:
        """As `distance`, by the float32 program that live curves use."""
        return float(self._root(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (self.cov, score.moments))))

    def batch_size(self, wanted: int) -> int:
        """Images at a time when `wanted` are to be scored: the config's, rounded up to divide over the mesh."""
        parts = batch_divisor(self.mesh)
        return -(-min(self.experiment.evaluate.batch_size, wanted) // parts) * parts

    def _place(self, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
        at = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(None, *batch_sharding(self.mesh).spec))
        return put_on_mesh(arrays, at)


def _all_images(source: ImageSource) -> np.ndarray:
    return source.gather(np.arange(len(source)))["images"]


# ---------------------------------------------------------------- the report of a finished run


def evaluate(experiment: Experiment, workdir: Workdir, mesh: Mesh, *, quiet: bool = False) -> dict[str, Any]:
    """Scores the trained generator beside the held-out images and an untrained generator, at equal n.

    Returns: the metrics of result.json.
    """
    scorer, n = Scorer(experiment, workdir, mesh), experiment.evaluate.samples
    n_few = min(n, len(scorer.heldout))
    trained, _ = trained_params(experiment, "generator", workdir, mesh)
    module, config = experiment.generator.module, experiment.generator.config
    at = param_shardings(module.axes(config), trained, mesh)
    untrained = jax.jit(functools.partial(module.init, config), out_shardings=at)(jax.random.key(experiment.seed))

    def score(params: Any, name: str) -> tuple[Score, Score]:
        """Sums of the first n_few samples, and of all n."""
        size = 5 * scorer.batch_size(n)
        edges = [*range(0, n_few, size), *range(n_few, n, size), n]
        few: Score | None = None
        total: Score | None = None
        spans = list(itertools.pairwise(edges))
        for start, stop in track_progress(spans, description=f"evaluate {name}", unit="chunks", quiet=quiet):
            part = scorer.samples(params, range(start, stop), seed=experiment.seed)
            total = part if total is None else total.add(part)
            if stop == n_few:
                few = total
        assert few is not None and total is not None
        return few, total

    heldout = scorer.images(scorer.heldout, n_few)
    everything_heldout = scorer.images(scorer.heldout, len(scorer.heldout))
    few, many = score(trained, "samples")
    few_untrained, many_untrained = score(untrained, "untrained")
    reference = f"the {len(scorer.train)} training images"
    return {
        "fd_classifier": {
            "reference": reference,
            f"samples_n{n}": scorer.distance(many),
            f"samples_n{n}_in_graph_float32": scorer.distance_in_graph(many),
            f"untrained_n{n}": scorer.distance(many_untrained),
            f"samples_n{n_few}": scorer.distance(few),
            f"heldout_n{n_few}": scorer.distance(heldout),
            f"untrained_n{n_few}": scorer.distance(few_untrained),
        },
        f"asked_class_share_n{n}": float(many.asked) / n,
        f"classifier_accuracy_heldout_n{len(scorer.heldout)}": float(everything_heldout.asked) / len(scorer.heldout),
        "nearest_training_image_rms": {
            "note": "mean over images of the pixel RMS distance (0..1) to the nearest training image; "
            "samples far below held-out images would be memorisation",
            f"samples_n{n}": float(many.nearest) / n,
            f"heldout_n{len(scorer.heldout)}": float(everything_heldout.nearest) / len(scorer.heldout),
        },
    }
