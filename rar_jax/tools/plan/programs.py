"""The programs that `rar-jax plan` compiles for chips that are not here, and what each is found to do."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rar_jax.evaluation.image_batches import batch_samples
from rar_jax.evaluation.program import Network, Program, Settings
from rar_jax.experiment import Experiment
from rar_jax.models import Model
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.tokens.tokenize import jit_encode
from rar_jax.tools.plan import hlo
from rar_jax.tools.plan.topology import Topology, chip_places, wire
from rar_jax.training.loop import Setup, compile_training
from rar_jax.weights.stages import model_shardings


class DoesNotFitError(RuntimeError):
    """The compiler found no room: the message is its own, in one line."""


# ---------------------------------------------------------------- programs


def setup_of(experiment: Experiment, mesh: Mesh) -> Setup:
    """The generator's training of an experiment on a mesh, which may be abstract."""
    encoder = experiment.tokenizer if experiment.data.on_the_fly else None
    return compile_training(experiment.generator.module, experiment.generator.config, experiment.train, mesh, encoder)


def lower_training(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    """The generator's step, as `train` jits it, for a batch of shapes. Raises: ConfigError where the mesh does not fit."""
    experiment.check_mesh(mesh)
    setup, rows, data = setup_of(experiment, mesh), batch_sharding(mesh), experiment.data
    size = experiment.train.batch_size
    batch = {"labels": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows)}
    frozen = None
    if data.on_the_fly:
        shape = size, data.image_size, data.image_size, data.channels
        batch["images"] = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
        frozen = shapes_of(experiment.tokenizer, mesh)
    else:
        spec = experiment.generator.module.token_spec(experiment.generator.config)
        batch["tokens"] = jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype, sharding=rows)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    step: Any = setup.step
    with sharded(mesh):
        return step.lower(setup.abstract_state, batch, key, frozen)


def lower_sampling(experiment: Experiment, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """Labels to sums of Inception features, as `evaluate` jits it, for one batch. The mesh has no fsdp. Raises: DoesNotFitError as
    `compile_lowered`."""
    models = (experiment.generator, experiment.tokenizer)
    generator = experiment.generator
    prepare = functools.partial(generator.module.prepare, generator.config)
    given = shapes_of(generator, mesh)
    prepared = jax.eval_shape(prepare, given)
    at: Any = jax.tree.map(lambda _: replicated(mesh), prepared)
    if mesh.shape["tensor"] > 1:  # where they come to lie, the compiler says
        with sharded(mesh):
            at = _compile(jax.jit(prepare).lower(given)).output_shardings
    params = {"generator": _placed(prepared, at), "tokenizer": shapes_of(experiment.tokenizer, mesh)}
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    inception = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    inception = _placed(inception, jax.tree.map(lambda _: replicated(mesh), inception))
    program = Program(Network(inception, "none"), mesh, Settings(batch_size=batch_size), None)
    return program.lower(batch_samples(models, params, experiment.guidance, num=batch_size, seed=0))


def lower_tokenizing(experiment: Experiment, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """Images to tokens, as `tokenize` jits it, for one batch."""
    data, rows = experiment.data, batch_sharding(mesh)
    shape = batch_size, data.image_size, data.image_size, data.channels
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    params = shapes_of(experiment.tokenizer, mesh)
    with sharded(mesh):
        return jit_encode(experiment.tokenizer, mesh).lower(params, images)


def sampling_mesh(experiment: Experiment, devices: Any) -> Mesh:
    """As `evaluate` has it, copies of the model; with the experiment's tensor axis for models too large for one chip."""
    return make_mesh(MeshConfig(tensor=experiment.mesh.tensor), devices)


def shapes_of(model: Model, mesh: Mesh) -> Any:
    """A model's parameters as ShapeDtypeStructs that lie as rules.py says."""
    shapes = jax.eval_shape(functools.partial(model.module.init, model.config), jax.random.key(0))
    return _placed(shapes, model_shardings(model, mesh))


def _placed(shapes: Any, at: Any) -> Any:
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, at)


# ---------------------------------------------------------------- what the compiler says


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Of one run on one chip, in bytes. arguments: what is given; peak: the most that is there at a time, arguments among it;
    temporaries: the difference. totals: what it does."""

    seconds_to_compile: float
    arguments: int
    temporaries: int
    peak: int
    totals: hlo.Totals


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles and reads what came out. Raises: DoesNotFitError if the memory of a chip is too small."""
    began = time.perf_counter()
    compiled = _compile(lowered)
    seconds = time.perf_counter() - began
    told: Any = compiled.memory_analysis()
    # Not the sum of temporaries that is told as well, which is larger than a chip for programs that the compiler lets through:
    # RAR-XXL on 4 x 4 chips of v5e has 4.3 GiB of arguments, 15.6 of temporaries and a peak of 14.7.
    arguments, peak = told.argument_size_in_bytes, told.peak_memory_in_bytes
    return Compiled(seconds, arguments, peak - arguments, peak, hlo.totals(compiled.as_text() or ""))


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(re.sub(r"^RESOURCE_EXHAUSTED: ", "", str(error).splitlines()[0])) from None


def describe(compiled: Compiled, topology: Topology, devices: Any, mesh: Mesh) -> dict[str, Any]:
    """Numbers of a program: "memory", "flops" (all chips together), "collectives", "seconds" of a run, estimated."""
    chip, totals = topology.chip, compiled.totals
    places = chip_places(topology, list(mesh.devices.flat))
    table: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys(COLUMNS, 0.0))
    exposed = overlapped = 0.0
    for collective, times in totals.collectives.items():
        sent, row = wire(topology, collective, places), table[collective.kind]
        for name, one in zip(COLUMNS, (1, collective.size, sent.bytes, sent.network_bytes, sent.seconds), strict=True):
            row[name] += times * one
        exposed += 0 if collective.asynchronous else times * sent.seconds
        overlapped += times * sent.seconds if collective.asynchronous else 0
    computing = totals.cycles / chip.clock
    matmuls = (totals.flops["default"] + 6 * totals.flops["highest"]) / chip.flops
    return {
        "compile_seconds": round(compiled.seconds_to_compile, 1),
        "memory": {
            "arguments": compiled.arguments,
            "temporaries": compiled.temporaries,
            "peak": compiled.peak,
            "available": int(chip.memory),
        },
        "flops": sum(totals.flops.values()) * mesh.size,
        "collectives": {kind: row for kind, row in sorted(table.items())},
        "seconds": {
            "matmuls_at_peak": matmuls,
            "computing": computing,
            "wire": exposed,
            "wire_overlapped": overlapped,
            "all": max(computing + exposed, overlapped),
        },
    }


COLUMNS = ("count", "bytes", "wire_bytes", "network_bytes", "seconds")


def held_bytes(experiment: Experiment, mesh: Any) -> int:
    """Bytes of parameters, moments and EMA on one device of a mesh, which may be abstract."""
    state = setup_of(experiment, mesh).abstract_state
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(state))
