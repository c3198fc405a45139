"""Estimate memory and time of an experiment on TPUs that are not attached.

libtpu compiles the real programs for a slice.
"""

from __future__ import annotations

import dataclasses
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
    count_model_flops,
    count_state_bytes,
    lower_sampling,
    lower_tokenizing,
    lower_training,
    measure_program,
)
from rar_jax.tools.plan.topology import Topology, find_topology_devices

SAMPLES = 50_000  # of a FID
MAX_FSDP, MAX_TENSOR = 64, 4  # of --search: beyond these, parts of weights are too small to send efficiently
Say = Callable[[str], None]


def plan_experiment(
    experiment: Experiment,
    topology: Topology,
    *,
    sample_rows: int = 16,
    parts: tuple[str, ...] | None = None,
    remedies: bool = True,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Compile training, tokenizing, and sampling with FID for a topology.

    Args:
      sample_rows: images per chip in the sampling program. parts: what to compile, by default `list_parts(experiment)`.
      remedies: if training does not fit, try changes until it does. say: receives progress messages.

    Returns: what --json prints: {"config", "topology", "chips", "versions"} and, for each part, "fits", and "why" if it
      does not fit, else `measure_program` with rates; for training also "mesh" and "remedy".
    Raises: ConfigError without libtpu, for an unknown slice, if batch or parameters do not divide over it, or for the
      part "tokenize" of an experiment that stores no tokens.
    """
    require(sample_rows >= 1, f"--sample-rows is {sample_rows}: it must be at least 1")
    parts = list_parts(experiment) if parts is None else parts
    experiment, devices = _reduce_fsdp(experiment, topology.chips, say), find_topology_devices(topology)
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    report = {"config": experiment.name, "topology": str(topology), "chips": topology.chips, "versions": versions}
    if "train" in parts:
        report |= _plan_training(experiment, topology, devices, say)
        if not report["train"]["fits"] and remedies:
            report["remedy"] = _find_remedy(experiment, topology, devices, say)
    if "tokenize" in parts:
        report["tokenize"] = _plan_tokenizing(experiment, topology, devices, say)
    if "sample" in parts:
        report["sample"] = _plan_sampling(experiment, topology, devices, sample_rows, say)
    return report


def list_parts(experiment: Experiment) -> tuple[str, ...]:
    """The parts of an experiment; "tokenize" only if it stores tokens."""
    stores = not experiment.data.on_the_fly and not experiment.data.given_tokens("train")
    return ("train", "tokenize", "sample") if stores else ("train", "sample")


def _reduce_fsdp(experiment: Experiment, chips: int, say: Say) -> Experiment:
    """The experiment with as much of its fsdp as divides the number of chips."""
    mesh = experiment.mesh
    fixed = mesh.data != -1 or mesh.fsdp < 1 or mesh.tensor < 1 or chips % mesh.tensor
    if fixed or chips % (mesh.fsdp * mesh.tensor) == 0:
        return experiment
    fsdp = math.gcd(mesh.fsdp, chips // mesh.tensor)
    say(f"mesh.fsdp {mesh.fsdp} does not divide {chips} chips: planning with --config.mesh.fsdp={fsdp}")
    return dataclasses.replace(experiment, mesh=dataclasses.replace(mesh, fsdp=fsdp))


# ---------------------------------------------------------------- parts


def _plan_training(experiment: Experiment, topology: Topology, devices: Any, say: Say) -> dict[str, Any]:
    mesh, recipe = make_mesh(experiment.mesh, devices), experiment.train
    say(f"compiling the training step of {experiment.name} for {topology}, mesh {dict(mesh.shape)}")
    train = _measure_if_it_fits(lambda: lower_training(experiment, mesh), topology, mesh)
    if not train["fits"]:
        train["state"] = count_state_bytes(experiment, mesh)
        return {"mesh": dict(mesh.shape), "train": train}
    seconds, model_flops = train["seconds"]["all"], count_model_flops(experiment)
    hours = recipe.steps * seconds / 3600
    train |= {
        "model_flops": model_flops,
        "mfu": model_flops and model_flops / seconds / (topology.chips * topology.chip.flops),
        "images_per_second": recipe.batch_size / seconds,
        "steps": recipe.steps,
        "days": hours / 24,
        "chip_hours": hours * topology.chips,
    }
    return {"mesh": dict(mesh.shape), "train": train}


def _plan_tokenizing(experiment: Experiment, topology: Topology, devices: Any, say: Say) -> dict[str, Any]:
    """One chip's share of a batch. Chips of one tensor group encode the same images."""
    data, mesh = experiment.data, make_mesh(MeshConfig(), devices[:1])
    require(not data.on_the_fly, "data.on_the_fly is set: images are encoded in training, see --only train")
    require(not data.given_tokens("train"), "data.tokens or data.mix is set: there are no images to encode")
    copies = math.prod(mesh_sizes(experiment.mesh, topology.chips)[:2])  # data x fsdp
    rows, crops = -(-BATCH // copies), len(CROPS.get(data.crop or "", ("one",)))
    say(f"compiling the encoder of {experiment.name} for {rows} images per chip of {topology}")
    part = {"batch_size": rows * copies, "rows": rows, "images": data.train_records * crops}
    part |= _measure_if_it_fits(lambda: lower_tokenizing(experiment, mesh, rows), topology, mesh)
    return _add_duration(part)


def _plan_sampling(experiment: Experiment, topology: Topology, devices: Any, rows: int, say: Say) -> dict[str, Any]:
    """As `evaluate` samples: copies of the model, sharded along the tensor axis."""
    mesh = make_mesh(MeshConfig(tensor=experiment.mesh.tensor), devices)
    size = rows * mesh.shape["data"]
    say(f"compiling sampling and FID of {size} images for {topology}")
    part = {"mesh": dict(mesh.shape), "batch_size": size, "images": SAMPLES}
    part |= _measure_if_it_fits(lambda: lower_sampling(experiment, mesh, size), topology, mesh)
    return _add_duration(part)


def _measure_if_it_fits(lower: Callable[[], Any], topology: Topology, mesh: Mesh) -> dict[str, Any]:
    try:
        return {"fits": True, **measure_program(lower(), topology, mesh)}
    except DoesNotFitError as error:
        return {"fits": False, "why": str(error)}


def _add_duration(part: dict[str, Any]) -> dict[str, Any]:
    """With "images_per_second", and "minutes" for all images, if it fits."""
    if part["fits"]:
        part["images_per_second"] = part["batch_size"] / part["seconds"]["all"]
        part["minutes"] = part["images"] / part["images_per_second"] / 60
    return part


# ---------------------------------------------------------------- what would make it fit


def list_remedies(experiment: Experiment, chips: int) -> Iterator[tuple[list[str], Experiment]]:
    """Flags that do not change what is learned, and the experiment with them."""
    flags, changed, mesh = [], experiment, experiment.mesh
    if (rematerialized := _rematerialize(experiment)) is not None:
        flags, changed = ["--config.generator.remat=True"], rematerialized
        yield flags, changed
    meshes = [(mesh.fsdp, [])]
    meshes += [(n, [f"--config.mesh.fsdp={n}"]) for n in (4, 16) if mesh.fsdp < n <= chips]
    for parts in (2, 4, 8, 16):
        for fsdp, mesh_flag in meshes:
            accumulation = experiment.train.accumulation * parts
            rows, rest = divmod(experiment.train.batch_size, accumulation)
            if rest or rows % (chips // mesh.tensor):
                continue
            train = dataclasses.replace(experiment.train, accumulation=accumulation)
            replaced = dataclasses.replace(changed, mesh=MeshConfig(-1, fsdp, mesh.tensor), train=train)
            yield [*flags, *mesh_flag, f"--config.train.accumulation={accumulation}"], replaced


def _rematerialize(experiment: Experiment) -> Experiment | None:
    """Set the generator's `remat`. None if it is set, or there is no such option."""
    generator = experiment.generator
    if getattr(generator.config, "remat", True):
        return None
    config = dataclasses.replace(generator.config, remat=True)
    return dataclasses.replace(experiment, generator=dataclasses.replace(generator, config=config))


def _find_remedy(experiment: Experiment, topology: Topology, devices: Any, say: Say) -> dict[str, Any] | None:
    """The "flags" and the training of the first remedy that fits, or None."""
    for flags, changed in list_remedies(experiment, topology.chips):
        try:
            planned = _plan_training(changed, topology, devices, say)
        except ConfigError:  # a width that does not divide
            continue
        if planned["train"]["fits"]:
            return {"flags": flags, **planned}
    return None


# ---------------------------------------------------------------- search


def list_candidates(experiment: Experiment, topology: Topology) -> Iterator[tuple[Experiment, int]]:
    """Meshes that divide the experiment and hold its state, with its bytes per chip.

    fsdp and tensor are powers of two and lie within a slice.
    """
    for tensor in (1 << i for i in range(MAX_TENSOR.bit_length())):
        for fsdp in (1 << i for i in range(MAX_FSDP.bit_length())):
            if topology.chips // topology.slices % (fsdp * tensor):
                continue
            sizes = topology.chips // (fsdp * tensor), fsdp, tensor
            mesh: Any = AbstractMesh(sizes, AXES)
            changed = dataclasses.replace(experiment, mesh=MeshConfig(*sizes))
            try:
                changed.check_mesh(mesh)
            except ConfigError:
                continue
            if (state := count_state_bytes(changed, mesh)) < topology.chip.memory:
                yield changed, state


def search_meshes(experiment: Experiment, topology: Topology, *, say: Say = lambda text: None) -> dict[str, Any]:
    """Plan the training on every candidate mesh, without other changes.

    Returns: {"config", "topology", "chips", "versions", "meshes"}: meshes are {"mesh", "state", "train"}, the fastest
      first, those that do not fit last.
    Raises: ConfigError if no mesh of so many chips holds the experiment; what `plan_experiment` raises.
    """
    candidates = list(list_candidates(experiment, topology))
    require(
        bool(candidates),
        f"no mesh of {topology.chips} chips holds {experiment.name}: its batch or widths do not divide, or its state "
        "is larger than a chip; choose another --topology",
    )
    say(f"compiling for {len(candidates)} meshes")
    reports = [plan_experiment(x, topology, parts=("train",), remedies=False, say=say) for x, _ in candidates]
    states = [state for _, state in candidates]
    meshes = [{"mesh": r["mesh"], "state": n, "train": r["train"]} for r, n in zip(reports, states, strict=True)]
    meshes.sort(key=lambda one: one["train"]["seconds"]["all"] if one["train"]["fits"] else math.inf)
    return {**{name: reports[0][name] for name in ("config", "topology", "chips", "versions")}, "meshes": meshes}
