"""Map logical axes of parameters and activations to mesh axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rar_jax.config import nearest
from rar_jax.errors import ConfigError

# None: replicated. "modulation" sharded along tensor would gather the outputs of adaLN in every block. Tables that are
# indexed by per-sample ids or orders (tokens, classes, positions) have axis None: sharded, they cost rematerialisation
# and permutes.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("codes", "tensor"),
    ("conv_out", "fsdp"),
    ("modulation", None),
    ("kernel_y", None),
    ("kernel_x", None),
    ("conv_in", None),
    ("classifier_in", None),
)


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Return a PartitionSpec of logical axes. Raises: ConfigError if unknown."""
    rules = dict(RULES)
    if unknown := [name for name in names if name is not None and name not in rules]:
        raise ConfigError(f"unknown logical axis '{unknown[0]}'.{nearest(unknown[0], rules)} Add new names to RULES")
    return PartitionSpec(*(None if name is None else rules[name] for name in names))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of each array of a parameter tree.

    Args:
      axes: nested dict whose leaves are tuples of logical names, one per dimension.
      shapes: the same tree of arrays or ShapeDtypeStructs.

    Raises: ConfigError for an unknown name, or a dimension that its mesh axis does not divide.
    """

    def sharding(path: Any, names: tuple[str | None, ...], shape: Any) -> NamedSharding:
        spec = partition_spec(names)
        for size, axis in zip(shape.shape, spec, strict=True):
            parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
            if size % parts:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ConfigError(
                    f"{name} has a dimension of {size}, which {parts} devices of mesh axis '{axis}' do not divide: "
                    "choose another size of that axis"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first dimension is the global batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


@contextlib.contextmanager
def sharded(mesh: Mesh) -> Iterator[None]:
    """Context in which the logical constraints of networks apply to this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def is_sharded() -> bool:
    """Return whether code is traced inside `sharded` on several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def target_platform() -> str:
    """Return the platform that code is traced for: of the mesh inside `sharded`, else the default: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def batch_per_device(batch: int) -> int:
    """Return the number of samples per device inside `sharded`; all of them outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return -(-batch // math.prod(mesh.shape.get(axis, 1) for axis in dict(RULES)["batch"] or ()))
