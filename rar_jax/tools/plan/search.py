"""`rar-jax plan --search`: which mesh suits an experiment on a topology, by compiling its training step for each that could."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax.sharding import AbstractMesh

from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment
from rar_jax.parallel.mesh import AXES, MeshConfig
from rar_jax.tools.plan.plan import plan
from rar_jax.tools.plan.programs import held_bytes
from rar_jax.tools.plan.text import gib, mesh_text
from rar_jax.tools.plan.topology import Topology

MOST_FSDP, MOST_TENSOR = 64, 4  # beyond these weights are sent in parts too small for the wire


def candidates(experiment: Experiment, topology: Topology) -> Iterator[tuple[Experiment, int]]:
    """The experiment on each mesh over which its batch and parameters divide, and the bytes of state on a chip; those whose
    state alone is larger than a chip are left out. fsdp and tensor are powers of two and lie within a slice."""
    for tensor in _powers(MOST_TENSOR):
        for fsdp in _powers(MOST_FSDP):
            if topology.chips // topology.slices % (fsdp * tensor):
                continue
            sizes = topology.chips // (fsdp * tensor), fsdp, tensor
            mesh: Any = AbstractMesh(sizes, AXES)
            changed = dataclasses.replace(experiment, mesh=MeshConfig(*sizes))
            try:
                changed.check_mesh(mesh)
            except ConfigError:
                continue
            if (state := held_bytes(changed, mesh)) < topology.chip.memory:
                yield changed, state


def search(
    experiment: Experiment, topology: Topology, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Plans the training on every candidate, as the experiment is: neither remat nor accumulation is changed.

    Returns: {"config", "topology", "chips", "from", "meshes"}: meshes are {"mesh", "state", "train"} (see `plan`), those that
      fit first, the fastest of them first.
    Raises: ConfigError if the experiment divides over no mesh of so many chips; what `plan` raises.
    """
    tried = list(candidates(experiment, topology))
    if not tried:
        raise ConfigError(
            f"no mesh of {topology.chips} chips holds {experiment.name}: its batch or widths do not divide, or its state is "
            "larger than a chip on each; take another --topology"
        )
    say(f"{len(tried)} meshes, each compiled for itself")
    reports = [plan(changed, topology, parts=("train",), remedies=False, say=say) for changed, _ in tried]
    meshes = [
        {"mesh": report["mesh"], "state": state, "train": report["train"]}
        for report, (_, state) in zip(reports, tried, strict=True)
    ]
    meshes.sort(key=lambda one: _seconds(one["train"]))
    head = ("config", "topology", "chips", "from", "versions")
    return {**{name: reports[0][name] for name in head}, "meshes": meshes}


def _seconds(train: Mapping[str, Any]) -> float:
    return train["seconds"]["all"] if train["fits"] and "seconds" in train else float("inf")


def _powers(most: int) -> Iterator[int]:
    return (1 << i for i in range(most.bit_length()))


def search_text(report: Mapping[str, Any]) -> str:
    """A row a mesh, the best first."""
    lines = [
        f"{report['config']} on {report['topology']}: {report['chips']} chips, training step, by the "
        + ("compiler's estimate" if report["from"] == "compiler" else "arithmetic of plan"),
        f"{'mesh':32} {'peak a chip':>22} {'s a step':>9} {'wire':>7} {'MFU':>6} {'images/s':>9} {'days':>6}",
    ]
    for one in report["meshes"]:
        train, name = one["train"], mesh_text(one["mesh"])
        memory, seconds = train.get("memory"), train.get("seconds")
        held = f"{gib(memory['peak'])} of {gib(memory['available'])}" if memory else f"state {gib(one['state'])}"
        if not train["fits"] or seconds is None:
            lines.append(f"{name:32} {held:>22}  does not fit")
            continue
        mfu = f"{train['mfu']:.1%}" if train["mfu"] else "-"
        wire = f"{seconds['wire']:.3f}" if "wire" in seconds else "-"
        lines.append(
            f"{name:32} {held:>22} {seconds['all']:9.3f} {wire:>7} {mfu:>6} {train['images_per_second']:9.0f} {train['days']:6.1f}"
        )
    return "\n".join(lines)
