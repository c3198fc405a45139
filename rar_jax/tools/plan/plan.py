"""Rehearses an experiment on chips that are not here: TPU's compiler says what fits and what is sent, arithmetic the rest."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from rar_jax.config import require
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment
from rar_jax.parallel.mesh import AXES, MeshConfig, make_mesh, mesh_sizes
from rar_jax.tokens.tokenize import BATCH, CROPS
from rar_jax.tools.plan.programs import (
    DoesNotFitError,
    compile_lowered,
    describe,
    held_bytes,
    lower_sampling,
    lower_tokenizing,
    lower_training,
    sampling_mesh,
    shapes_of,
)
from rar_jax.tools.plan.topology import Topology, devices_of

SAMPLES = 50_000  # of a FID
GPU_SHARE = 0.4  # of the peak: what is assumed of GPUs, for which nothing is compiled
GPU_ROOM = 0.9  # of a GPU's memory: what formulas may fill, which are rough
Say = Callable[[str], None]


def plan(
    experiment: Experiment,
    topology: Topology,
    *,
    sample_rows: int = 16,
    parts: tuple[str, ...] | None = None,
    remedies: bool = True,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Compiles the steps of training, of tokenizing, and of sampling with FID for a slice, or for GPUs does arithmetic.

    Args:
      sample_rows: images a chip in the sampling step. parts: what to compile, by default `parts_of` the experiment.
      remedies: where the training does not fit, try what would make it fit, until something does.
      say: is told what is being compiled.

    Returns: what --json prints: {"config", "topology", "chips", "from", "mesh", "train", "tokenize", "sample", "versions"}; see `_train`.
    Raises: ConfigError without libtpu, for an unknown slice, where batch or parameters do not divide over it, or for tokens
      of an experiment that makes none.
    """
    require(sample_rows >= 1, f"--sample-rows is {sample_rows}: it must be at least 1")
    parts = parts_of(experiment) if parts is None else parts
    experiment = _on_fewer(experiment, topology.chips, say)
    report: dict[str, Any] = {"config": experiment.name, "topology": str(topology), "chips": topology.chips}
    report |= {"from": "arithmetic" if topology.is_gpu else "compiler", "versions": {"jax": jax.__version__}}
    devices: Any = None
    if topology.is_gpu:
        train = functools.partial(_by_arithmetic, topology=topology)
    else:
        devices = devices_of(topology)
        report["versions"]["libtpu"] = importlib.metadata.version("libtpu")
        train = functools.partial(_train, topology=topology, devices=devices, say=say)
    if "train" in parts:
        report |= train(experiment)
        if not report["train"]["fits"] and remedies:
            report["remedy"] = _remedy(experiment, topology.chips, train)
    if "tokenize" in parts:
        tokenize = functools.partial(_tokenize, devices=devices, say=say) if devices else _tokenize_by_arithmetic
        report["tokenize"] = tokenize(experiment, topology=topology)
    if "sample" in parts:
        sample = functools.partial(_sample, devices=devices, say=say) if devices else _sample_by_arithmetic
        report["sample"] = sample(experiment, topology=topology, rows=sample_rows)
    return report


def parts_of(experiment: Experiment) -> tuple[str, ...]:
    """What there is to plan: "train", "tokenize" unless the tokens are given or made in training, "sample"."""
    made = not experiment.data.on_the_fly and not experiment.data.given_tokens("train")
    return ("train", "tokenize", "sample") if made else ("train", "sample")


def _on_fewer(experiment: Experiment, chips: int, say: Say) -> Experiment:
    """The experiment with as much fsdp as divides so few chips: RAR-XXL, which has 4, on one card."""
    mesh = experiment.mesh
    if (
        mesh.data != -1
        or mesh.fsdp < 1
        or mesh.tensor < 1
        or chips % mesh.tensor
        or not chips % (mesh.fsdp * mesh.tensor)
    ):
        return experiment
    fsdp = math.gcd(mesh.fsdp, chips // mesh.tensor)
    say(f"mesh.fsdp {mesh.fsdp} does not divide {chips} chips: this is with --config.mesh.fsdp={fsdp}")
    return dataclasses.replace(experiment, mesh=dataclasses.replace(mesh, fsdp=fsdp))


def _train(experiment: Experiment, *, topology: Topology, devices: Any, say: Say) -> dict[str, Any]:
    """{"mesh", "train": {"fits", and if it does what `describe` says and `_rates`, else "why"}}."""
    mesh = make_mesh(experiment.mesh, devices)
    say(f"compiling the training step of {experiment.name} for {topology}, mesh {dict(mesh.shape)}")
    lowered = lower_training(experiment, mesh)
    try:
        compiled = compile_lowered(lowered)
    except DoesNotFitError as error:
        return {
            "mesh": dict(mesh.shape),
            "train": {"fits": False, "why": str(error), "state": held_bytes(experiment, mesh)},
        }
    told = describe(compiled, topology, devices, mesh)
    return {
        "mesh": dict(mesh.shape),
        "train": {"fits": True, **told, **_rates(experiment, topology, told["seconds"]["all"])},
    }


def _rates(experiment: Experiment, topology: Topology, seconds: float) -> dict[str, Any]:
    """Of a step that takes so long: "mfu" by model FLOPs (nothing recomputed, no masked attention), "days" of all steps."""
    recipe, model_flops = experiment.train, _model_flops(experiment)
    hours = recipe.steps * seconds / 3600
    return {
        "model_flops": model_flops,
        "mfu": model_flops and model_flops / seconds / (topology.chips * topology.chip.flops),
        "images_per_second": recipe.batch_size / seconds,
        "steps": recipe.steps,
        "days": hours / 24,
        "chip_hours": hours * topology.chips,
    }


def _model_flops(experiment: Experiment) -> int | None:
    """Of a step; None for a generator that does not offer the count."""
    count = getattr(experiment.generator.module, "train_flops", None)
    return count(experiment.generator.config, batch_size=experiment.train.batch_size) if count else None


def _tokenize(experiment: Experiment, *, topology: Topology, devices: Any, say: Say) -> dict[str, Any]:
    """What one chip does with its part of a batch, on all at once: each process encodes images of its own."""
    mesh, head = make_mesh(MeshConfig(), devices[:1]), _images_to_encode(experiment, topology)
    say(f"compiling the encoder of {experiment.name} for {head['rows']} images a chip of {topology}")
    try:
        compiled = compile_lowered(lower_tokenizing(experiment, mesh, head["rows"]))
    except DoesNotFitError as error:
        return {**head, "fits": False, "why": str(error)}
    told = describe(compiled, topology, devices, mesh)
    told["flops"] *= topology.chips
    return {**head, "fits": True, **told, **_time_to_encode(head, told["seconds"]["all"])}


def _images_to_encode(experiment: Experiment, topology: Topology) -> dict[str, int]:
    """batch_size: of all chips together. rows: of it, on a chip; chips of one tensor group do the same ones. images: to train on,
    each of their crops."""
    data = experiment.data
    require(not data.on_the_fly, "data.on_the_fly is set: images are encoded in training, see --only train")
    require(not data.given_tokens("train"), "data.tokens or data.mix is set: the tokens are there, none are made")
    copies = math.prod(mesh_sizes(experiment.mesh, topology.chips)[:2])  # data x fsdp
    rows, crops = -(-BATCH // copies), len(CROPS.get(data.crop or "", ("one",)))
    return {"batch_size": rows * copies, "rows": rows, "images": data.train_records * crops}


def _time_to_encode(head: dict[str, int], seconds: float) -> dict[str, float]:
    rate = head["batch_size"] / seconds
    return {"images_per_second": rate, "minutes": head["images"] / rate / 60}


def _sample(experiment: Experiment, *, topology: Topology, rows: int, devices: Any, say: Say) -> dict[str, Any]:
    mesh = sampling_mesh(experiment, devices)
    size = rows * mesh.shape["data"]
    say(f"compiling sampling and FID of {size} images for {topology}")
    head = {"mesh": dict(mesh.shape), "batch_size": size}
    try:
        compiled = compile_lowered(lower_sampling(experiment, mesh, size))
    except DoesNotFitError as error:
        return {**head, "fits": False, "why": str(error)}
    told = describe(compiled, topology, devices, mesh)
    rate = size / told["seconds"]["all"]
    return {**head, "fits": True, **told, "images_per_second": rate, "minutes": SAMPLES / rate / 60, "images": SAMPLES}


# ---------------------------------------------------------------- what would make it fit


def remedies_of(experiment: Experiment, chips: int) -> Iterator[tuple[list[str], Experiment]]:
    """What can be changed without changing what is learned, the cheapest first: flags, and the experiment with them."""
    config, flags = experiment.generator.config, []
    changed = experiment
    if hasattr(config, "remat") and not config.remat:
        flags = ["--config.generator.remat=True"]
        generator = dataclasses.replace(experiment.generator, config=dataclasses.replace(config, remat=True))
        changed = dataclasses.replace(experiment, generator=generator)
        yield flags, changed
    meshes = [(experiment.mesh.fsdp, [])]
    meshes += [(n, [f"--config.mesh.fsdp={n}"]) for n in (4, 16) if experiment.mesh.fsdp < n <= chips]
    for parts in (2, 4, 8, 16):
        for fsdp, mesh_flag in meshes:
            accumulation = experiment.train.accumulation * parts
            rows, left = divmod(experiment.train.batch_size, accumulation)
            if left or rows % (chips // experiment.mesh.tensor):
                continue
            yield (
                [*flags, *mesh_flag, f"--config.train.accumulation={accumulation}"],
                dataclasses.replace(
                    changed,
                    mesh=MeshConfig(-1, fsdp, experiment.mesh.tensor),
                    train=dataclasses.replace(experiment.train, accumulation=accumulation),
                ),
            )


def _remedy(experiment: Experiment, chips: int, train: Callable[[Experiment], dict[str, Any]]) -> dict[str, Any] | None:
    """The first that fits: {"flags", and what `train` says of it}; None if nothing does."""
    for flags, changed in remedies_of(experiment, chips):
        try:
            told = train(changed)
        except ConfigError:  # a width that does not divide
            continue
        if told["train"]["fits"]:
            return {"flags": flags, **told}
    return None


# ---------------------------------------------------------------- arithmetic


def _by_arithmetic(experiment: Experiment, *, topology: Topology) -> dict[str, Any]:
    """As `_train`, from formulas: state as it is cut over the mesh, the activations of the blocks, FLOPs at a share of the peak."""
    sizes = mesh_sizes(experiment.mesh, topology.chips)
    mesh: Any = AbstractMesh(tuple(sizes), AXES)
    experiment.check_mesh(mesh)
    state, kept = held_bytes(experiment, mesh), activation_bytes(experiment, mesh)
    # Gradients are there beside the state, as large as the parameters: a third of it, less where there is an EMA.
    peak = state + state // (4 if experiment.train.ema_decay else 3) + kept
    memory = {"arguments": state, "temporaries": peak - state, "peak": peak, "available": int(topology.chip.memory)}
    flops = _model_flops(experiment)
    train: dict[str, Any] = {"fits": peak < GPU_ROOM * topology.chip.memory, "memory": memory}
    if flops is not None:
        again = 4 / 3 if getattr(experiment.generator.config, "remat", False) else 1
        seconds = flops * again / (topology.chips * topology.chip.flops * GPU_SHARE)
        train |= {"seconds": {"all": seconds}, **_rates(experiment, topology, seconds)}
    return {"mesh": dict(mesh.shape), "train": train}


def _tokenize_by_arithmetic(experiment: Experiment, *, topology: Topology) -> dict[str, Any]:
    """As `_tokenize`, from the FLOPs that XLA counts, at a share of the peak. Of its memory nothing is known."""
    head = _images_to_encode(experiment, topology)
    mesh = make_mesh(MeshConfig(), jax.devices("cpu")[:1])
    flops = (lower_tokenizing(experiment, mesh, head["rows"]).cost_analysis() or {})["flops"]
    half = getattr(experiment.tokenizer.config, "dtype", "float32") == "bfloat16"
    seconds = flops / ((topology.chip.flops if half else topology.chip.float32) * GPU_SHARE)
    return {**head, "flops": flops * topology.chips, **_time_to_encode(head, seconds)}


def _sample_by_arithmetic(experiment: Experiment, *, topology: Topology, rows: int) -> dict[str, Any]:
    """As `_sample`, from formulas: of the tokens alone, in float32, as `evaluate` draws them. Memory: weights and cache."""
    chip, guided = topology.chip, experiment.guidance.enabled
    sizes = mesh_sizes(MeshConfig(tensor=experiment.mesh.tensor), topology.chips)
    mesh: Any = AbstractMesh(tuple(sizes), AXES)
    size, tensor = rows * mesh.shape["data"], mesh.shape["tensor"]
    module, c = experiment.generator.module, experiment.generator.config
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes_of(experiment.generator, mesh))) // tensor
    weights += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes_of(experiment.tokenizer, mesh)))
    cache = rows * (1 + guided) * c.depth * 2 * (c.num_tokens + 1) * c.width * 4 // tensor
    memory = {"arguments": weights, "temporaries": cache, "peak": weights + cache, "available": int(chip.memory)}
    told = {
        "mesh": dict(mesh.shape),
        "batch_size": size,
        "fits": weights + cache < GPU_ROOM * chip.memory,
        "memory": memory,
    }
    if hasattr(module, "sample_flops") and hasattr(module, "sample_bytes"):
        given = {"batch_size": rows, "guided": guided}
        flops, moved = module.sample_flops(c, **given), module.sample_bytes(c, **given)
        seconds = max(flops / (chip.float32 * GPU_SHARE), moved / chip.bandwidth) / tensor
        rate = size / seconds
        told |= {"images_per_second": rate, "minutes": SAMPLES / rate / 60, "images": SAMPLES}
    return told


def activation_bytes(experiment: Experiment, mesh: Mesh | AbstractMesh) -> int:
    """What the blocks of a transformer with adaLN keep for the backward pass on one device, roughly: 22 vectors of the width and 3
    of the MLP's a slot, and the attention's weights in float32 twice. With remat, each block's input, and twice one block."""
    c: Any = experiment.generator.config
    rows = experiment.train.batch_size // experiment.train.accumulation // (mesh.shape["data"] * mesh.shape["fsdp"])
    item, slots = (2 if c.dtype == "bfloat16" else 4), c.num_tokens + 1
    tensor = mesh.shape["tensor"]
    block = rows * (slots * item * (22 * c.width + 3 * c.mlp_width // tensor) + 8 * c.num_heads // tensor * slots**2)
    logits = rows * slots * c.codebook_size * 4 * 3
    return logits + (2 * block + c.depth * rows * slots * c.width * item if c.remat else c.depth * block)
