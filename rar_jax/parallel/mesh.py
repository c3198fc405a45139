"""The device mesh: axes (data, fsdp, tensor)."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rar_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def find_devices() -> list[Any]:
    """Return all devices of all processes.

    Raises: ConfigError if the platform of JAX_PLATFORMS is missing or busy, or threefry numbers would differ.
    """
    # JAX's default: random numbers depend on neither mesh nor sharding. Without it all draws are different.
    if not jax.config.values["jax_threefry_partitionable"]:
        raise ConfigError("JAX_THREEFRY_PARTITIONABLE is off, which changes all random numbers: unset it")
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a message, if no plugin knows the platform
        reason = "".join(str(error).splitlines()[:1]).rstrip(". ")[:300] or "no plugin of that name is installed"
        raise ConfigError(
            f"JAX finds no device of JAX_PLATFORMS='{os.environ.get('JAX_PLATFORMS', '')}' ({reason}). "
            "Install '.[cuda12]' or '.[tpu]' of rar_jax, stop other programs on the device, or set JAX_PLATFORMS=cpu"
        ) from error


def matmul_dtype(dtype: str, device: Any = None) -> str:
    """Return `dtype`, or float32 with a warning if the device has no bfloat16.

    GPUs have it since Ampere (compute capability 8.0); before, XLA emulates it more slowly than float32.
    """
    device = find_devices()[0] if device is None else device
    capability = str(getattr(device, "compute_capability", ""))  # AMD's are names, and all of them have it
    old = device.platform == "gpu" and capability.replace(".", "").isdigit() and float(capability) < 8.0
    if dtype != "bfloat16" or not old:
        return dtype
    logging.getLogger(__name__).warning(
        "%s has no bfloat16 (compute capability %s): float32 instead", device.device_kind, capability
    )
    return "float32"


def with_device_dtype(config: Any, device: Any = None) -> Any:
    """Return a model's Config with the `matmul_dtype` of its dtype, if it has one."""
    if not hasattr(config, "dtype"):
        return config
    return dataclasses.replace(config, dtype=matmul_dtype(config.dtype, device))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, the rest of the devices.

    data: copies of the model, each on its part of the batch. fsdp: parts of the batch *and* of the weights.
    tensor: parts of the heads and of the MLP.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def mesh_sizes(config: MeshConfig, devices: int) -> list[int]:
    """Return the sizes of (data, fsdp, tensor). Raises: ConfigError."""
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"mesh {_describe(sizes)}: sizes are positive, and at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ConfigError(f"mesh {_describe(sizes)} does not multiply to {devices} devices: set one size to -1")
    return sizes


def _describe(sizes: Sequence[int]) -> dict[str, int]:
    return dict(zip(AXES, sizes, strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of the given sizes over `devices` (default: all).

    On several TPU slices only the data axis spans slices: weights are gathered in every layer, gradients are summed
    once per step, and the network between slices is the slowest.

    Raises: ConfigError if the sizes do not multiply to the number of devices, or fsdp x tensor spans slices.
    """
    devices = find_devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # Auto axes: RAR gathers by a permutation, which Explicit axes cannot type.
    auto = (AxisType.Auto,) * 3
    # GPUs have slice indices too (hosts); there XLA chooses the order itself.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # Splitting: 16 x 4 on 8 x 8 chips, where no axis of the torus is one of the mesh.
    if slices == 1:
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(laid, AXES, axis_types=auto)
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh {_describe(sizes)} does not fit {slices} slices of {len(devices) // slices} devices: data must be a "
            f"multiple of {slices}"
        )
    within = (sizes[0] // slices, *sizes[1:])
    laid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=auto)


def own_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh, or one of this process's devices if it spans several.

    For work that processes divide among themselves and do at their own pace.
    """
    return make_mesh(MeshConfig(), jax.local_devices()) if mesh.is_multi_process else mesh


def batch_divisor(mesh: Mesh) -> int:
    """Return the number of devices over which a batch is sharded."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
