"""Lower, compile and measure the programs of `rar-jax plan`."""

from __future__ import annotations

import collections
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.errors import TripCountError
from rar_jax.evaluation.image_batches import batch_samples
from rar_jax.evaluation.program import Network, Program, Settings
from rar_jax.experiment import Experiment
from rar_jax.models import Model, prepare_params, token_spec
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.tokens.tokenize import jit_encode
from rar_jax.tools.costs import count_costs
from rar_jax.tools.plan import hlo
from rar_jax.tools.plan.topology import Topology, estimate_traffic, list_coordinates
from rar_jax.training.step import Setup, compile_training
from rar_jax.weights.stages import model_shardings


class DoesNotFitError(RuntimeError):
    """The memory of a chip is too small; the message is the compiler's first line."""


# ---------------------------------------------------------------- programs


def set_up_training(experiment: Experiment, mesh: Any) -> Setup:
    """The generator's training on a mesh, which may be abstract."""
    generator, recipe = experiment.generator, experiment.train
    return compile_training(generator.module, generator.config, recipe, mesh, experiment.tokenizer)


def lower_training(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    """The training step for one batch. Raises: ConfigError if it does not divide."""
    experiment.check_mesh(mesh)
    batch, frozen = _shape_tokens(experiment), None
    if experiment.data.on_the_fly:
        batch = {"images": _shape_images(experiment, experiment.train.batch_size), "labels": batch["labels"]}
        frozen = shape_params(experiment.tokenizer, mesh)
    batch = _place(batch, batch_sharding(mesh))
    key = _place(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")), replicated(mesh))
    setup = set_up_training(experiment, mesh)
    step: Any = setup.step
    with sharded(mesh):
        return step.lower(setup.abstract_state, batch, key, frozen)


def lower_sampling(experiment: Experiment, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """One batch of labels to sums of Inception features, as `evaluate` jits it.

    The mesh has no fsdp.

    Raises: DoesNotFitError.
    """
    generator, tokenizer = experiment.generator, experiment.tokenizer
    prepare = functools.partial(prepare_params, generator)
    params = shape_params(generator, mesh)
    with sharded(mesh):
        prepared, at = jax.eval_shape(prepare, params), replicated(mesh)
        if mesh.shape["tensor"] > 1:  # the compiler chooses the shardings
            at = compile_lowered(jax.jit(prepare).lower(params)).output_shardings
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    inception = _place(jax.eval_shape(Inception().init, jax.random.key(0), image)["params"], replicated(mesh))
    program = Program(Network(inception, "none"), mesh, Settings(batch_size=batch_size), None)
    params = {"generator": _place(prepared, at), "tokenizer": shape_params(tokenizer, mesh)}
    samples = batch_samples((generator, tokenizer), params, experiment.sampling, num=batch_size, seed=0)
    return program.lower(samples)


def lower_tokenizing(experiment: Experiment, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """One batch of images to tokens, as `tokenize` jits it."""
    images = _place(_shape_images(experiment, batch_size), batch_sharding(mesh))
    params = shape_params(experiment.tokenizer, mesh)  # not under the mesh, whose devices cannot run anything
    with sharded(mesh):
        return jit_encode(experiment.tokenizer, mesh).lower(params, images)


def shape_params(model: Model, mesh: Any) -> Any:
    """A model's parameters as ShapeDtypeStructs, sharded as rules.py says."""
    shapes = jax.eval_shape(functools.partial(model.module.init, model.config), jax.random.key(0))
    return _place(shapes, model_shardings(model, mesh))


def _shape_tokens(experiment: Experiment) -> dict[str, Any]:
    size = experiment.train.batch_size
    tokens = token_spec(experiment.generator).with_batch(size)
    return {"tokens": tokens, "labels": jax.ShapeDtypeStruct((size,), jnp.int32)}


def _shape_images(experiment: Experiment, size: int) -> Any:
    data = experiment.data
    return jax.ShapeDtypeStruct((size, data.image_size, data.image_size, data.channels), jnp.uint8)


def _place(shapes: Any, at: Any) -> Any:
    """The shapes with one sharding for all, or with a tree of them."""
    at = at if not isinstance(at, jax.sharding.Sharding) else jax.tree.map(lambda _: at, shapes)
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, at)


# ---------------------------------------------------------------- counts


def count_model_flops(experiment: Experiment) -> float | None:
    """FLOPs of a training step without recomputation, three forward passes.

    None if a loop of the loss depends on data.
    """
    generator, key = experiment.generator, jax.random.key(0)
    loss = functools.partial(generator.module.loss, generator.config, key=key, step=0, train=True)
    params = jax.eval_shape(functools.partial(generator.module.init, generator.config), key)
    try:
        return 3 * count_costs(jax.make_jaxpr(loss)(params, _shape_tokens(experiment))).flops
    except TripCountError:
        return None


def count_state_bytes(experiment: Experiment, mesh: Any) -> int:
    """Bytes of the training state on one device of a mesh, which may be abstract."""
    state = set_up_training(experiment, mesh).abstract_state
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(state))


# ---------------------------------------------------------------- the compiler


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program. Raises: DoesNotFitError if the memory of a chip is too small."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")) from None


def measure_program(lowered: jax.stages.Lowered, topology: Topology, mesh: Mesh) -> dict[str, Any]:
    """Compile a program.

    Returns: "compile_seconds", "memory" of a chip, "collectives", and estimated "seconds" of a run.

    Computing is the compiler's own estimate in cycles. Communication is exposed unless the compiler overlaps it.
    Raises: DoesNotFitError.
    """
    began = time.perf_counter()
    compiled = compile_lowered(lowered)
    seconds = time.perf_counter() - began
    report: Any = compiled.memory_analysis()
    # Not temp_size_in_bytes, which exceeds the memory of a chip for programs that fit.
    arguments, peak = report.argument_size_in_bytes, report.peak_memory_in_bytes
    memory = {"arguments": arguments, "temporaries": peak - arguments, "peak": peak}
    totals = hlo.count_program(compiled.as_text() or "")
    coordinates = list_coordinates(topology, list(mesh.devices.flat))
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    exposed = overlapped = 0.0
    for collective, times in totals.collectives.items():
        row = {"count": 1, "bytes": collective.size, **estimate_traffic(topology, collective, coordinates)}
        table[collective.kind].update({name: times * one for name, one in row.items()})
        exposed += 0 if collective.asynchronous else times * row["seconds"]
        overlapped += times * row["seconds"] if collective.asynchronous else 0
    computing = totals.cycles / topology.chip.clock
    everything = max(computing + exposed, overlapped)
    return {
        "compile_seconds": round(seconds, 1),
        "memory": {**memory, "available": int(topology.chip.memory)},
        "collectives": {kind: dict(row) for kind, row in sorted(table.items())},
        "seconds": {"computing": computing, "exposed": exposed, "overlapped": overlapped, "all": everything},
    }
