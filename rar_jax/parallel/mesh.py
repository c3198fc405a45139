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
    """All devices of all processes. Raises: ConfigError if the kind that JAX_PLATFORMS asks for is not here or not free."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where no plugin knows the platform
        reason = "".join(str(error).splitlines()[:1]).rstrip(". ")[:300] or "no plugin of that name is installed"
        raise ConfigError(
            f"JAX finds no device of JAX_PLATFORMS='{os.environ.get('JAX_PLATFORMS', '')}' ({reason}): install "
            "'.[cuda12]' or '.[tpu]' of rar_jax's checkout where the accelerator is, see that no other program holds it, or set "
            "JAX_PLATFORMS=cpu"
        ) from error


def has_bfloat16(device: Any) -> bool:
    """Whether a device multiplies in bfloat16. GPUs do since Ampere, compute capability 8.0; XLA makes float32 of it on those
    before, which is slower than float32 at once."""
    capability = str(getattr(device, "compute_capability", ""))  # AMD's, which all have it, are names
    return device.platform != "gpu" or not capability.replace(".", "").isdigit() or float(capability) >= 8.0


def matmul_dtype(dtype: str, device: Any = None) -> str:
    """The dtype to multiply in on a device (default: the first): `dtype`, or float32, with a warning, where it has no bfloat16."""
    device = find_devices()[0] if device is None else device
    if dtype != "bfloat16" or has_bfloat16(device):
        return dtype
    logging.getLogger(__name__).warning(
        "%s has no bfloat16 (compute capability %s): float32 instead", device.device_kind, device.compute_capability
    )
    return "float32"


def on_device(config: Any, device: Any = None) -> Any:
    """A model's Config with the `matmul_dtype` of its dtype; one without a dtype as it is."""
    if not hasattr(config, "dtype"):
        return config
    return dataclasses.replace(config, dtype=matmul_dtype(config.dtype, device))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, "all devices that are left".

    data: copies of the model, each on its part of the batch. fsdp: parts of the batch *and* of the weights.
    tensor: parts of the heads and of the MLP.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def mesh_sizes(config: MeshConfig, devices: int) -> list[int]:
    """Sizes of (data, fsdp, tensor) on so many devices. Raises: ConfigError if they do not multiply to that number."""
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit {devices} devices: "
            "the sizes must multiply to that number; set one of them to -1 to let it be found"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of the given sizes over `devices` (default: all).

    On several TPU slices the data axis reaches over them and the others lie within one: weights are gathered at every layer,
    gradients summed once a step, and what joins slices is the slowest wire.

    Raises: ConfigError if the sizes do not multiply to the number of devices, or a slice would be shared by copies of the model.
    """
    devices = find_devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # Auto axes: RAR gathers by a permutation, which Explicit axes cannot type.
    auto = (AxisType.Auto,) * 3
    # GPUs know slices, too, of hosts: there XLA finds its own way over them.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # Splitting: 16 x 4 on 8 x 8 chips, where no axis of the torus is one of the mesh.
    if slices == 1:
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(laid, AXES, axis_types=auto)
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not lie on {slices} slices: data must be a multiple of {slices}, "
            f"so that fsdp x tensor fits the {len(devices) // slices} devices of one"
        )
    within = (sizes[0] // slices, *sizes[1:])
    laid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=auto)


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
