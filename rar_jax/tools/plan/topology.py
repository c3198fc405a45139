"""TPU slices: data sheets of chips, devices to compile for, time of a collective."""

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
from rar_jax.tools.plan.hlo import Collective

GIB = 2**30
# libtpu 0.0.42 crashes with its default thread stacks of 64 kB when it compiles matmuls for v6e.
COMPILER_STACK = "--fibers_default_thread_stack_size=1048576"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet of a chip.

    flops: peak per second, bfloat16. memory: bytes that a program can have. link: bytes/s of one link to a neighbour,
    one way. network: bytes/s per chip between slices. clock: Hz of the matmul units. wraps: an axis of so many chips is
    a ring (on v5p, of a multiple). dimensions: of the torus.
    """

    flops: float
    memory: float
    link: float
    network: float
    clock: float
    wraps: int
    dimensions: int


# cloud.google.com/tpu/docs/v5e, v5p, v6e: interconnect of 1600, 4800 and 3200 Gbit/s per chip over 4, 6 and 4 links.
# Between slices: the network of a pod over its chips; on v5p the network card of a host over 4.
# Memory: as the compiler reports it. The clock is the peak over the FLOPs per cycle of all matmul units.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 50e9, 3.125e9, 197e12 / (4 * 128**2 * 2), 16, 2),
    "v5p": Chip(459e12, 95.74 * GIB, 100e9, 6.25e9, 459e12 / (8 * 128**2 * 2), 4, 3),
    "v6e": Chip(918e12, 31.25 * GIB, 100e9, 12.5e9, 918e12 / (4 * 256**2 * 2), 16, 2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape, such as (4, 4, 4), joined by the data centre's network."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """Of one slice, as libtpu has it: "v5p:4x4x4"."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse "v5p:4x4x4", "v5e:4x4" or "v6e:8x8", or raise ConfigError."""
    require(slices >= 1, f"--slices is {slices}: it must be at least 1")
    kind, _, sizes = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes):
        raise ConfigError(f"--topology {text}: write v5e:4x4, v6e:8x8 or v5p:4x4x4.{nearest(kind, CHIPS)}")
    shape = tuple(int(x) for x in sizes.split("x"))
    dimensions = CHIPS[kind].dimensions
    require(len(shape) == dimensions, f"--topology {text}: {kind} is a torus of {dimensions} dimensions")
    return Topology(kind, shape, slices)


def find_topology_devices(topology: Topology) -> Sequence[Any]:
    """Devices to make meshes of and to compile for; nothing can run on them.

    Raises: ConfigError without libtpu, or for a slice that libtpu does not know.
    """
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "plan compiles with libtpu, which is not installed: pip install -e '.[tpu]' in the checkout of rar_jax"
        ) from None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask Google's metadata server about this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used: several plans may run at a time
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "thread_stack_size" not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {COMPILER_STACK}".strip()
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if min(topology.shape[:2]) == 1:  # fewer chips than the 2 x 2 that a host has by default
        options["chips_per_host_bounds"] = [*(min(2, size) for size in topology.shape[:2]), 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"libtpu has no {topology.name}: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------- interconnect


def estimate_traffic(topology: Topology, collective: Collective, coordinates: np.ndarray) -> dict[str, float]:
    """Estimate what one chip sends in a collective, using all links of its group.

    Args:
      coordinates: int (chips, 1 + dimensions), slice and position of the chips in mesh order, see `list_coordinates`.

    Returns: {"sent_bytes" within a slice, "network_bytes" between slices, "seconds" for both}.
    """
    chip, size = topology.chip, collective.size
    if collective.slices > 1:
        outside = count_sent_bytes(collective.kind, size, collective.slices)
        return {"sent_bytes": 0.0, "network_bytes": outside, "seconds": outside / chip.network}
    if collective.groups is None:  # a permute: each chip sends to a neighbour
        spans, slices, within = [2], 1, 2
    else:
        members = coordinates[np.asarray(collective.groups[0])] if collective.groups else coordinates
        slices, *spans = (len(np.unique(column)) for column in members.T)
        within = len(members) // slices
    inside = count_sent_bytes(collective.kind, size, within) if within > 1 else 0.0
    # Each slice reduces first, so that a chip sends only its share to the other slices.
    outside = count_sent_bytes(collective.kind, size / within, slices) if slices > 1 else 0.0
    links = sum((2 if _is_ring(chip, span) else 1) for span in spans if span > 1)
    seconds = inside / (chip.link * max(links, 1)) + outside / chip.network
    return {"sent_bytes": inside, "network_bytes": outside, "seconds": seconds}


def count_sent_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that one device sends in a collective, by a ring algorithm.

    Args:
      size: bytes of the whole array on one device: the result of an all-gather, the operand of a reduce-scatter.
    """
    share = (devices - 1) / devices
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _is_ring(chip: Chip, span: int) -> bool:
    return span % chip.wraps == 0 if chip.dimensions == 3 else span == chip.wraps


def list_coordinates(topology: Topology, devices: Sequence[Any]) -> np.ndarray:
    """Slice and torus coordinates of devices, int (devices, 1 + dimensions)."""
    dimensions = topology.chip.dimensions
    return np.array([(getattr(d, "slice_index", None) or 0, *itertools.islice(d.coords, dimensions)) for d in devices])
