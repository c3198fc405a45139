"""Read and write released files by a table: released name -> our parameter and the order of its axes."""

from __future__ import annotations

import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from rar_jax.config import nearest
from rar_jax.errors import WeightsError
from rar_jax.weights.lazy import LazyArray, check_finite
from rar_jax.weights.torch_file import StoredTensor


class Mapped(NamedTuple):
    """Our parameter for a released tensor. "{}" in the released name is a layer: our layers are stacked along the first axis.

    Attributes:
      path: names in our tree, joined by "/".
      axes: "OURS -> RELEASED", one letter per axis: "io -> o i" transposes, "ihk -> hk i" also merges two axes, and
        "nd -> 1 n d" adds one of size 1. "" means the same axes.
      unused: trailing entries along each released axis that the model does not use: dropped by `open_mapped`, zeros
        in `to_released`.
    """

    path: str
    axes: str = ""
    unused: tuple[int, ...] = ()


Table = Mapping[str, Mapped]


def map_linear(released: str, path: str, *, kernel: str = "io -> o i", bias: str = "") -> dict[str, Mapped]:
    """Table of a torch Linear."""
    return {f"{released}.weight": Mapped(f"{path}/kernel", kernel), f"{released}.bias": Mapped(f"{path}/bias", bias)}


def map_norm(released: str, path: str) -> dict[str, Mapped]:
    """Table of a torch LayerNorm."""
    return {f"{released}.weight": Mapped(f"{path}/scale"), f"{released}.bias": Mapped(f"{path}/bias")}


def param_shapes(init: Any, config: Any) -> dict[str, Any]:
    """Shapes of the parameters that `init(config, key)` makes, without making them."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def flatten_params(params: Any) -> dict[str, Any]:
    """Leaves by path, with "/" between the names."""
    return dict(flatten_dict(params, sep="/"))


def released_shapes(table: Table, shapes: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file, for the shapes of our parameters."""
    leaves = flatten_params(shapes)
    found: dict[str, tuple[int, ...]] = {}
    for name, mapped in table.items():
        shape, names = _layers(name, leaves[mapped.path].shape)
        found |= dict.fromkeys(names, _released_shape(mapped, shape))
    return found


def get_tensor(path: str | pathlib.Path, state: Mapping[str, StoredTensor], name: str, ndim: int) -> StoredTensor:
    """Return a tensor of `ndim` dimensions, none of them empty. Raises: WeightsError."""
    if name not in state:
        raise WeightsError(f"{path}: '{name}' is missing.{nearest(name, list(state)[:1000])}")
    shape = state[name].shape
    if len(shape) != ndim or 0 in shape:
        raise WeightsError(f"{path}: '{name}' has shape {shape}, not {ndim} dimensions")
    return state[name]


def check_shapes(
    path: str | pathlib.Path, state: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WeightsError unless a file holds exactly the tensors of these names and shapes."""
    if surplus := sorted(state.keys() - expected.keys()):
        name, count = surplus[0], len(surplus)
        raise WeightsError(f"{path}: unexpected tensor '{name}' ({count} in all).{nearest(name, expected)}")
    if missing := sorted(expected.keys() - state.keys()):
        raise WeightsError(f"{path}: '{missing[0]}' is missing ({len(missing)} in all)")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise WeightsError(f"{path}: '{name}' has shape {state[name].shape}, expected {shape}")


def open_mapped(
    path: str | pathlib.Path, state: Mapping[str, StoredTensor], table: Table, shapes: Any
) -> dict[str, Any]:
    """Check names and shapes of a file, and return our tree of LazyArrays.

    Raises: WeightsError for a missing or unexpected tensor, or another shape.
    """
    check_shapes(path, state, released_shapes(table, shapes))
    leaves = flatten_params(shapes)
    lazy: dict[str, LazyArray] = {}
    for name, mapped in table.items():
        whole = leaves[mapped.path].shape
        shape, names = _layers(name, whole)

        def read(name: str, mapped: Mapped = mapped, shape: tuple[int, ...] = shape) -> np.ndarray:
            return _to_ours(mapped, shape, check_finite(path, name, state[name].read()))

        parts = [functools.partial(read, name) for name in names]
        lazy[mapped.path] = LazyArray(whole, parts, stacked=shape != whole)
    return unflatten_dict(lazy, sep="/")


def to_released(table: Table, params: Any) -> dict[str, np.ndarray]:
    """Any tree of the parameters' structure (parameters, gradients) under the released names and shapes."""
    leaves = flatten_params(params)
    state: dict[str, np.ndarray] = {}
    for name, mapped in table.items():
        array = np.asarray(leaves[mapped.path])
        shape, names = _layers(name, array.shape)
        for name, layer in zip(names, array if shape != array.shape else [array], strict=True):
            order = [axis for group in _groups(mapped, layer.ndim) for axis in group]
            merged = layer.transpose(order).reshape(_merged_shape(mapped, shape))
            state[name] = np.pad(merged, [(0, unused) for unused in mapped.unused]) if mapped.unused else merged
    return state


def save_mapped(path: str | pathlib.Path, table: Table, shapes: Any, params: Any) -> None:
    """Write parameters as .safetensors under the released names and shapes, float32.

    Raises: WeightsError for another suffix, parameters of other shapes, or a file that cannot be written.
    """
    ours, theirs = ({name: leaf.shape for name, leaf in flatten_params(tree).items()} for tree in (shapes, params))
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise WeightsError(
            f"{path}: '{wrong[0]}' has shape {theirs.get(wrong[0])}, the configuration says {ours.get(wrong[0])}"
        )
    write_safetensors(path, {name: np.asarray(x, np.float32) for name, x in to_released(table, params).items()})


def write_safetensors(path: str | pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Write tensors by name. The file is complete or absent.

    Raises: WeightsError for a suffix other than .safetensors, or a file that cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path}: weights are written as .safetensors. docs/released_weights.md shows how to make a torch file of it"
        )
    partial = path.with_name(f".{path.name}.rar_jax_partial")
    try:
        safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, partial)
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{path} cannot be written ({error}): choose another folder") from error


# ---------------------------------------------------------------- axes


def _layers(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[str]]:
    """Our shape of one layer, and the released name of each layer."""
    return (shape[1:], [name.format(i) for i in range(shape[0])]) if "{}" in name else (shape, [name])


def _groups(mapped: Mapped, ndim: int) -> list[list[int]]:
    """Our axes that make up each released axis."""
    if not mapped.axes:
        return [[axis] for axis in range(ndim)]
    ours, released = mapped.axes.split(" -> ")
    return [[ours.index(letter) for letter in group.strip("1")] for group in released.split(" ")]


def _merged_shape(mapped: Mapped, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis] for axis in group) for group in _groups(mapped, len(shape)))


def _released_shape(mapped: Mapped, shape: tuple[int, ...]) -> tuple[int, ...]:
    merged = _merged_shape(mapped, shape)
    return tuple(size + unused for size, unused in zip(merged, mapped.unused or (0,) * len(merged), strict=True))


def _to_ours(mapped: Mapped, shape: tuple[int, ...], value: np.ndarray) -> np.ndarray:
    order = [axis for group in _groups(mapped, len(shape)) for axis in group]
    used = value[tuple(slice(size) for size in _merged_shape(mapped, shape))]
    return used.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
