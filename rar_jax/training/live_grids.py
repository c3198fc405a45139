"""Image grids while training, which `rar-jax report` shows over time.

Of a generator: samples of the same labels and keys at each evaluation. Of a tokenizer: validation images and their reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.experiment import Experiment, open_source
from rar_jax.parallel.arrays import place
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.grids import Grid, spread
from rar_jax.runs.logging import Reporter
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import sample_images, sample_keys, to_uint8
from rar_jax.weights.stages import trained_params

PAIRS = 12  # validation images of a tokenizer's grid


class GridEvaluator:
    """Logs a grid of images that one program makes of a stage's parameters; an Evaluator without metrics.

    Args:
      function: (params, frozen, *rows of a batch) -> images. make_grid: of all images.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., jax.Array],
        frozen: Any,
        rows: tuple[np.ndarray, ...],
        make_grid: Callable[[np.ndarray], Grid],
        *,
        reporter: Reporter,
        batch_size: int,
        mesh: Mesh,
    ) -> None:
        self._name, self._frozen, self._rows, self._mesh = name, frozen, rows, mesh
        self._program = jax.jit(function, out_shardings=replicated(mesh))
        self._make_grid, self._reporter = make_grid, reporter
        parts = batch_divisor(mesh)
        self._size = -(-min(batch_size, len(rows[0])) // parts) * parts

    def compile(self, params: Any) -> None:
        with sharded(self._mesh):
            self._program.lower(params, self._frozen, *next(self._batches())).compile()

    def evaluate(self, params: Any, step: int, poll: Callable[[], None]) -> dict[str, float]:
        images = []
        for batch in self._batches():
            poll()
            with sharded(self._mesh):
                images.append(np.asarray(self._program(params, self._frozen, *batch)))
        self._reporter.grid(self._name, self._make_grid(np.concatenate(images)[: len(self._rows[0])]), step)
        return {}

    def _batches(self) -> Iterator[tuple[jax.Array, ...]]:
        """The rows on the devices; the last batch is filled up."""
        for start in range(0, len(self._rows[0]), self._size):
            places = np.arange(start, start + self._size) % len(self._rows[0])
            yield tuple(place([array[places] for array in self._rows], batch_sharding(self._mesh)))


def make_sample_grid(experiment: Experiment, workdir: Workdir, mesh: Mesh, reporter: Reporter) -> GridEvaluator:
    """One row per class. Image i is that of `Pipeline.sample` for these labels and the experiment's seed."""
    data, columns, size = experiment.data, experiment.evaluate.live_grid, experiment.evaluate.batch_size
    classes = spread(data.num_classes, experiment.evaluate.grid_classes)
    labels = np.repeat(classes, columns).astype(np.int32)
    names = tuple(data.class_names[label].split(",")[0] for label in classes)
    tokenizer, _ = trained_params(experiment, "tokenizer", workdir, mesh)

    def sample(params: Any, tokenizer: Any, labels_b: jax.Array, ids_b: jax.Array) -> jax.Array:
        params, models = {"generator": params, "tokenizer": tokenizer}, (experiment.generator, experiment.tokenizer)
        keys_b = sample_keys(jnp.uint32(experiment.seed), ids_b)
        return sample_images(*models, params, labels_b, keys_b, experiment.guidance)

    def make_grid(images: np.ndarray) -> Grid:
        return Grid(images.reshape(len(classes), columns, *images.shape[1:]), names, ("",) * columns)

    rows, where = (labels, np.arange(len(labels), dtype=np.int32)), {"batch_size": size, "mesh": mesh}
    return GridEvaluator("samples", sample, tokenizer, rows, make_grid, reporter=reporter, **where)


def make_reconstruction_grid(experiment: Experiment, mesh: Mesh, reporter: Reporter) -> GridEvaluator:
    """Two rows: validation images, and their reconstructions."""
    heldout, size = open_source(experiment, "heldout"), experiment.evaluate.batch_size
    records = heldout.gather(np.array(spread(len(heldout), PAIRS)))
    originals = records["images"]
    names = tuple(experiment.data.class_names[label].split(",")[0] for label in records["labels"])
    module, config = experiment.tokenizer.module, experiment.tokenizer.config

    def reconstruct(params: Any, _: None, images: jax.Array) -> jax.Array:
        return to_uint8(module.decode(config, params, module.encode(config, params, images)))

    def make_grid(images: np.ndarray) -> Grid:
        return Grid(np.stack([originals, images]), ("original", "reconstruction"), names)

    where = {"batch_size": size, "mesh": mesh}
    return GridEvaluator("reconstructions", reconstruct, None, (originals,), make_grid, reporter=reporter, **where)
