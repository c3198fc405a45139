"""The device mesh: axes (data, fsdp, tensor)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from rar_jax.config import ConfigError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, "all devices that are left".

    data: copies of the model, each on its part of the batch. fsdp: parts of the batch *and* of the weights.
    tensor: parts of the heads and of the MLP.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of the given sizes over `devices` (default: all).

    Raises: ConfigError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} devices: "
            "the sizes must multiply to that number; set one of them to -1 to let it be found"
        )
    # Auto axes: RAR gathers by a permutation, which the Explicit axes that make_mesh now gives cannot type.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def own_mesh(mesh: Mesh) -> Mesh:
    """The mesh itself if it is this process's alone, else one of this process's devices, each with a copy of the model.

    For work that the processes share out among themselves and do at their own pace.
    """
    if mesh.is_multi_process:
        return make_mesh(MeshConfig(), jax.local_devices())
    return mesh


def batch_divisor(mesh: Mesh) -> int:
    """What the global batch must be divisible by: the devices along which it is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
