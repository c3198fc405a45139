"""Pictures while training: samples of the same labels and noise at each evaluation, or held-out images and what the tokenizer
keeps of them. They are what `rar-jax report` shows over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.experiment import Experiment, open_source
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import batch_divisor
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.runs.grids import Grid, spread
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import sample_images, sample_keys, to_uint8
from rar_jax.weights.stages import trained_params

PAIRS = 12  # held-out images of a tokenizer's grid


class Draw(NamedTuple):
    """Grids of a stage's parameters.

    compile: of parameters, makes the program that `of` calls. of: of parameters; all processes call it and get all images.
    """

    compile: Callable[[Any], None]
    of: Callable[[Any], Grid]


def live_grid(experiment: Experiment, stage: str, workdir: Workdir, mesh: Mesh) -> Draw | None:
    """What draws the stage's grid; None for a classifier, or where config.evaluate.live_grid is 0."""
    if experiment.evaluate.live_grid == 0 or stage == "classifier":
        return None
    if stage == "tokenizer":
        return _reconstructions(experiment, mesh)
    return _samples(experiment, workdir, mesh)


def _samples(experiment: Experiment, workdir: Workdir, mesh: Mesh) -> Draw:
    """A row a class of samples.png's; image i is that of `Pipeline.sample` for these labels and the experiment's seed."""
    data, columns = experiment.data, experiment.evaluate.live_grid
    shown = spread(data.num_classes, experiment.evaluate.grid_classes)
    labels = np.repeat(shown, columns).astype(np.int32)
    tokenizer, _ = trained_params(experiment, "tokenizer", workdir, mesh)

    def draw(params: Any, labels_b: jax.Array, ids_b: jax.Array) -> jax.Array:
        models = experiment.generator, experiment.tokenizer
        keys_b = sample_keys(jnp.uint32(experiment.seed), ids_b)
        return sample_images(*models, params, labels_b, keys_b, experiment.guidance)

    program = jax.jit(draw, out_shardings=replicated(mesh))
    rows = tuple(data.class_names[label].split(",")[0] for label in shown)
    rows_b = labels, np.arange(len(labels), dtype=np.int32)

    def compile(params: Any) -> None:
        _compile(program, {"generator": params, "tokenizer": tokenizer}, rows_b, experiment, mesh)

    def grid(params: Any) -> Grid:
        images = _in_batches(program, {"generator": params, "tokenizer": tokenizer}, rows_b, experiment, mesh)
        return Grid(images.reshape(len(shown), columns, *images.shape[1:]), rows, ("",) * columns)

    return Draw(compile, grid)


def _reconstructions(experiment: Experiment, mesh: Mesh) -> Draw:
    """Two rows: held-out images, and what is left of them."""
    heldout = open_source(experiment, "heldout")
    records = heldout.gather(np.array(spread(len(heldout), PAIRS)))
    names = [experiment.data.class_names[label].split(",")[0] for label in records["labels"]]
    module, config = experiment.tokenizer.module, experiment.tokenizer.config

    def through(params: Any, images: jax.Array) -> jax.Array:
        return to_uint8(module.decode(config, params, module.encode(config, params, images)))

    program = jax.jit(through, out_shardings=replicated(mesh))

    def compile(params: Any) -> None:
        _compile(program, params, (records["images"],), experiment, mesh)

    def grid(params: Any) -> Grid:
        kept = _in_batches(program, params, (records["images"],), experiment, mesh)
        return Grid(np.stack([records["images"], kept]), ("original", "reconstruction"), tuple(names))

    return Draw(compile, grid)


def _in_batches(
    program: Any, params: Any, rows: tuple[np.ndarray, ...], experiment: Experiment, mesh: Mesh
) -> np.ndarray:
    """The jitted program's images of these rows."""
    images = []
    for batch in _batches(rows, experiment, mesh):
        with sharded(mesh):
            images.append(np.asarray(program(params, *batch)))
    return np.concatenate(images)[: len(rows[0])]


def _compile(program: Any, params: Any, rows: tuple[np.ndarray, ...], experiment: Experiment, mesh: Mesh) -> None:
    """What `_in_batches` calls; all batches have one shape."""
    with sharded(mesh):
        program.lower(params, *next(_batches(rows, experiment, mesh))).compile()


def _batches(rows: tuple[np.ndarray, ...], experiment: Experiment, mesh: Mesh) -> Iterator[tuple[jax.Array, ...]]:
    """The rows on the devices, at most config.evaluate.batch_size at a time; the last batch is filled up."""
    count, parts = len(rows[0]), batch_divisor(mesh)
    size = -(-min(experiment.evaluate.batch_size, count) // parts) * parts
    for start in range(0, count, size):
        places = np.arange(start, start + size) % count
        yield tuple(put_on_mesh([array[places] for array in rows], batch_sharding(mesh)))
