"""Slices of accelerators that need not be here: what their chips can do, and their devices as libtpu's compiler knows them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rar_jax.config import nearest, require
from rar_jax.errors import ConfigError
from rar_jax.tools.plan.collectives import Collective, wire_bytes

GIB = 2**30
# Of the compiler's threads: with the 64 kB that they have by themselves it dies of SIGSEGV on matmuls for v6e (libtpu 0.0.42).
COMPILER_STACK = "--fibers_default_thread_stack_size=1048576"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip. flops: bfloat16, a second. memory: bytes that a program can have. bandwidth: of that memory, bytes/s.
    link: bytes/s that one link to a neighbour carries one way. network: bytes/s a chip between slices (or hosts of GPUs).
    clock: Hz of the matmul units, by which the compiler's cycles are seconds: flops / (their multiply-adds a cycle x 2).
    wraps: an axis of so many chips is a ring (of a multiple, on v5p); dimensions: of the torus, 0 where all reach all.
    float32: operations a second outside of the matmul units, asked of GPUs only."""

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    clock: float = 0.0
    wraps: int = 0
    dimensions: int = 0
    float32: float = 0.0


# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e (ICI: 1600, 4800 and 3200 Gbit/s a chip over 4, 6 and 4 links; the data centre's
# network a pod over its chips, for v5p a host's NIC over 4); memory: what the compiler says is available. GPUs: data sheets,
# dense bfloat16, and float32; a link is NVLink in one direction, the network an InfiniBand port of 400 Gbit/s.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, 197e12 / (4 * 128**2 * 2), 16, 2),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, 459e12 / (8 * 128**2 * 2), 4, 3),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 100e9, 12.5e9, 918e12 / (4 * 256**2 * 2), 16, 2),
}
GPUS = {
    "H100": Chip(989e12, 79 * GIB, 3350e9, 450e9, 50e9, float32=67e12),
    "A100": Chip(312e12, 79 * GIB, 2039e9, 300e9, 25e9, float32=19.5e12),
    # A card for one's desk, such as an RTX 4090: without NVLink.
    "24GB": Chip(165e12, 23.5 * GIB, 1008e9, 16e9, 1e9, float32=82.6e12),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind. shape: of one slice, (4, 4, 4); slices: joined by the data centre's network."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def chip(self) -> Chip:
        return (GPUS if self.is_gpu else CHIPS)[self.kind]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        one = f"gpu:{self.shape[0]}x{self.kind}" if self.is_gpu else f"{self.kind}:{'x'.join(map(str, self.shape))}"
        several = f"{self.slices} {'hosts' if self.is_gpu else 'slices'} of {one}"
        return one if self.slices == 1 else several


def parse_topology(text: str, slices: int = 1) -> Topology:
    """ "v5p:4x4x4", "v5e:4x4", "v6e:8x8", "gpu:8xH100". Raises: ConfigError for what is none."""
    require(slices >= 1, f"--slices is {slices}: it must be at least 1")
    if gpu := re.fullmatch(r"gpu:(\d+)x(\w+)", text):
        require(gpu[2] in GPUS, f"--topology {text}: known GPUs are {', '.join(GPUS)}")
        require(int(gpu[1]) >= 1, f"--topology {text}: give at least one GPU, such as gpu:1x{gpu[2]}")
        return Topology(gpu[2], (int(gpu[1]),), slices)
    kind, _, sizes = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes):
        raise ConfigError(
            f"--topology {text}: write v5e:4x4, v6e:8x8, v5p:4x4x4 or gpu:8xH100.{nearest(kind, [*CHIPS, 'gpu'])}"
        )
    shape = tuple(int(x) for x in sizes.split("x"))
    dimensions = CHIPS[kind].dimensions
    require(len(shape) == dimensions, f"--topology {text}: {kind} is a torus of {dimensions} dimensions")
    return Topology(kind, shape, slices)


def devices_of(topology: Topology) -> Sequence[Any]:
    """The slice's devices, for meshes and for compiling; nothing can run on them.

    Raises: ConfigError without libtpu, or for a slice that it does not know.
    """
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "plan compiles with TPU's own compiler, which is not here: pip install -e '.[tpu]' in the checkout of rar_jax"
        ) from None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks Google's metadata server what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken: two plans at a time do no harm
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "thread_stack_size" not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {COMPILER_STACK}".strip()
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if min(topology.shape[:2]) == 1:  # a host has 2 x 2 chips unless it is told; this one has a part of them
        options["chips_per_host_bounds"] = [*(min(2, size) for size in topology.shape[:2]), 1]
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"libtpu has no {name}: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------- the wire


@dataclasses.dataclass(frozen=True)
class Wire:
    """What one chip sends in a collective. bytes: within a slice; network_bytes: between slices; seconds: of both."""

    bytes: float
    network_bytes: float
    seconds: float


def wire(topology: Topology, collective: Collective, places: np.ndarray) -> Wire:
    """By the bandwidth alone, every link of the axes that a group lies along busy: rings where the axis is one, else lines.

    Args:
      places: int (chips, 1 + dimensions): slice and coordinates of the chips in the order of the mesh, see `chip_places`.
    """
    chip = topology.chip
    if collective.slices > 1:
        outside = wire_bytes(collective.kind, collective.size, collective.slices)
        return Wire(0.0, outside, outside / chip.network)
    group = collective.groups and np.asarray(collective.groups[0])
    members = places if group is None or not len(group) else places[group]
    spans = [len(np.unique(members[:, axis])) for axis in range(1, places.shape[1])]
    slices = len(np.unique(members[:, 0]))
    within = len(members) // slices
    if group is None:  # a permute: each to a neighbour
        spans, slices, within = [2], 1, 2
    size = collective.size
    inside = wire_bytes(collective.kind, size, within) if within > 1 else 0.0
    # Summed within each slice first, a chip has its share of the rest to send.
    outside = wire_bytes(collective.kind, size / within, slices) if slices > 1 else 0.0
    links = sum((2 if _is_ring(topology, span) else 1) for span in spans if span > 1)
    speed = chip.link * max(links, 1)
    return Wire(inside, outside, inside / speed + outside / chip.network)


def _is_ring(topology: Topology, span: int) -> bool:
    wraps = topology.chip.wraps
    return bool(wraps) and (span % wraps == 0 if topology.chip.dimensions == 3 else span == wraps)


def chip_places(topology: Topology, devices: Sequence[Any]) -> np.ndarray:
    """Slice and coordinates of devices, int (devices, 1 + dimensions); GPUs of a host are slices of one dimension."""
    if topology.is_gpu:
        return np.array([[i // topology.shape[0], i % topology.shape[0]] for i in range(len(devices))])
    rows = [
        (getattr(d, "slice_index", None) or 0, *itertools.islice(d.coords, topology.chip.dimensions)) for d in devices
    ]
    return np.array(rows)
