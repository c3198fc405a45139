"""Image grids while training, which `rar-jax report` shows over time.

Of a generator: samples of the same labels and keys at each evaluation. Of a tokenizer: validation images and their reconstructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.experiment import Experiment, open_source
from rar_jax.parallel.arrays import place
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.grids import Grid, spread
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import sample_images, sample_keys, to_uint8
from rar_jax.weights.stages import trained_params

PAIRS = 12  # validation images of a tokenizer's grid


class ImageGrid(Protocol):
    """Draws a grid with a stage's parameters; every process gets all images. `compile` compiles the program of `draw`."""

    def compile(self, params: Any) -> None: ...

    def draw(self, params: Any) -> Grid: ...


def make_live_grid(experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh) -> ImageGrid | None:
    """Make the grid of a stage; None for a classifier, or where config.evaluate.live_grid is 0."""
    if experiment.evaluate.live_grid == 0 or stage == "classifier":
        return None
    return ReconstructionGrid(experiment, mesh) if stage == "tokenizer" else SampleGrid(experiment, workdir, mesh)


class SampleGrid:
    """One row per class. Image i is that of `Pipeline.sample` for these labels and the experiment's seed."""

    def __init__(self, experiment: Experiment, workdir: Workdir, mesh: Mesh) -> None:
        data, self._columns = experiment.data, experiment.evaluate.live_grid
        self._classes = spread(data.num_classes, experiment.evaluate.grid_classes)
        self._names = tuple(data.class_names[label].split(",")[0] for label in self._classes)
        labels = np.repeat(self._classes, self._columns).astype(np.int32)
        self._tokenizer, _ = trained_params(experiment, "tokenizer", workdir, mesh)

        def sample(params: Any, labels_b: jax.Array, ids_b: jax.Array) -> jax.Array:
            keys_b = sample_keys(jnp.uint32(experiment.seed), ids_b)
            models = experiment.generator, experiment.tokenizer
            return sample_images(*models, params, labels_b, keys_b, experiment.guidance)

        rows = labels, np.arange(len(labels), dtype=np.int32)
        self._program = _BatchedProgram(sample, rows, experiment.evaluate.batch_size, mesh)

    def compile(self, params: Any) -> None:
        self._program.compile({"generator": params, "tokenizer": self._tokenizer})

    def draw(self, params: Any) -> Grid:
        images = self._program.run({"generator": params, "tokenizer": self._tokenizer})
        images = images.reshape(len(self._classes), self._columns, *images.shape[1:])
        return Grid(images, self._names, ("",) * self._columns)


class ReconstructionGrid:
    """Two rows: validation images, and their reconstructions."""

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        heldout = open_source(experiment, "heldout")
        records = heldout.gather(np.array(spread(len(heldout), PAIRS)))
        self._images = records["images"]
        self._names = tuple(experiment.data.class_names[label].split(",")[0] for label in records["labels"])
        module, config = experiment.tokenizer.module, experiment.tokenizer.config

        def reconstruct(params: Any, images: jax.Array) -> jax.Array:
            return to_uint8(module.decode(config, params, module.encode(config, params, images)))

        self._program = _BatchedProgram(reconstruct, (self._images,), experiment.evaluate.batch_size, mesh)
        self.compile = self._program.compile

    def draw(self, params: Any) -> Grid:
        images = np.stack([self._images, self._program.run(params)])
        return Grid(images, ("original", "reconstruction"), self._names)


class _BatchedProgram:
    """A function (params, *rows of a batch) -> images, compiled for one batch size and run on all rows."""

    def __init__(self, function: Any, rows: tuple[np.ndarray, ...], batch_size: int, mesh: Mesh) -> None:
        self._jitted = jax.jit(function, out_shardings=replicated(mesh))
        self._rows, self._mesh = rows, mesh
        parts = batch_divisor(mesh)
        self._size = -(-min(batch_size, len(rows[0])) // parts) * parts

    def compile(self, params: Any) -> None:
        with sharded(self._mesh):
            self._jitted.lower(params, *next(self._batches())).compile()

    def run(self, params: Any) -> np.ndarray:
        with sharded(self._mesh):
            images = [np.asarray(self._jitted(params, *batch)) for batch in self._batches()]
        return np.concatenate(images)[: len(self._rows[0])]

    def _batches(self) -> Iterator[tuple[jax.Array, ...]]:
        """The rows on the devices; the last batch is filled up."""
        for start in range(0, len(self._rows[0]), self._size):
            places = np.arange(start, start + self._size) % len(self._rows[0])
            yield tuple(place([array[places] for array in self._rows], batch_sharding(self._mesh)))
