"""The one place where logical axes of parameters and activations meet the axes of the mesh."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rar_jax.errors import ConfigError

# Everything that is not named here is replicated. "modulation" is left out on purpose: cut over tensor, the outputs of adaLN
# have to be gathered again in every block (measured: 21 permutes and 5 gathers in a tiny forward pass, against 1). Tables that are indexed by per-sample ids or orders (tokens,
# classes, positions) are replicated on purpose: sharded, they cost full rematerialisation and permutes.
RULES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("codes", "tensor"),
    ("conv_out", "fsdp"),
)


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names."""
    rules = dict(RULES)
    return PartitionSpec(*(rules.get(name) if name is not None else None for name in names))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """NamedSharding for each array of a parameter tree.

    Args:
      axes: nested dict whose leaves are tuples of logical names, one a dimension.
      shapes: the same tree of arrays or ShapeDtypeStructs.

    Raises: ConfigError if a dimension is not divisible by the mesh axis it is split over.
    """

    def sharding(path: Any, names: tuple[str | None, ...], shape: Any) -> NamedSharding:
        spec = partition_spec(names)
        for size, axis in zip(shape.shape, spec, strict=True):
            parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
            if size % parts:
                raise ConfigError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')} has a dimension of {size}, which does not "
                    f"divide over {parts} devices of mesh axis '{axis}': choose a mesh axis size that divides it"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first dimension is the global batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


@contextlib.contextmanager
def sharded(mesh: Mesh) -> Iterator[None]:
    """Context in which the logical constraints inside the networks take effect on this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def is_sharded() -> bool:
    """Whether code is traced in the context of `sharded` on a mesh of more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def on_one_device(batch: int) -> int:
    """How many samples of a batch each device has, in the context of `sharded`; all of them outside of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return -(-batch // math.prod(mesh.shape.get(axis, 1) for axis in dict(RULES)["batch"]))
