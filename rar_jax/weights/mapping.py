"""Read and write released files by a table: released name -> our parameter and the order of its axes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import pathlib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from rar_jax.config import convert_value, nearest, parse_value
from rar_jax.errors import ConfigError, WeightsError
from rar_jax.weights.lazy import LazyArray, check_finite
from rar_jax.weights.registry import check_system, list_released
from rar_jax.weights.torch_file import StoredTensor, open_tensors, read_metadata

State = Mapping[str, StoredTensor]


class Mapped(NamedTuple):
    """Our parameter for a released tensor. "{}" in the released name is a layer: ours are stacked along the first axis.

    Attributes:
      path: names in our tree, joined by "/".
      axes: "OURS -> RELEASED", one letter per axis: "io -> o i" transposes, "ihk -> hk i" also merges two axes, and
        "nd -> 1 n d" adds one of size 1. "" means the same axes.
      unused: entries at the end of each released axis that the model does not use: dropped on reading, written as 0.
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
    """Shapes of the parameters that `init(config, key)` makes."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def flatten_params(params: Any) -> dict[str, Any]:
    """Leaves by path, with "/" between the names."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@dataclasses.dataclass(frozen=True)
class Format:
    """The released files of one model: read and written without torch.

    Attributes:
      module: of generators/ or tokenizers/.
      read_config: `read_config(state, **facts)` makes the Config. Its keyword arguments are the facts: fields that
        names and shapes do not tell.
      make_table: makes the table for a tree of shapes.
      make_buffers: makes, of the Config, tensors of the file that are not our parameters: `load` drops them.
    """

    module: ModuleType
    read_config: Callable[..., Any]
    make_table: Callable[[Any], Table]
    make_buffers: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}

    @property
    def facts(self) -> dict[str, bool]:
        """Names of the facts, and whether a file cannot be read without."""
        keywords = list(inspect.signature(self.read_config).parameters.values())[1:]
        return {keyword.name: keyword.default is inspect.Parameter.empty for keyword in keywords}

    def load(self, path: str | pathlib.Path, *, ema: bool = True, **facts: Any) -> tuple[Any, dict[str, Any]]:
        """Read a torch or .safetensors file: the Config, and float32 NumPy arrays in the tree of `init`.

        Args:
          ema: where the file has raw weights and their moving average, read the average.
          facts: fields of the Config that names and shapes do not tell. A file of `save` tells them, and a published
            one is recognized by its shapes.

        Raises: ConfigError for an unknown fact; WeightsError for missing facts, a damaged file, missing or surplus
          keys, wrong shapes, or values that are not finite.
        """
        config, lazy = self.open_params(path, ema=ema, **facts)
        return config, jax.tree.map(lambda leaf: leaf[...], lazy)

    def open_params(self, path: str | pathlib.Path, *, ema: bool = True, **facts: Any) -> tuple[Any, dict[str, Any]]:
        """Like `load`, but the leaves are LazyArrays: only names and shapes are read and checked."""
        check_facts(facts, self.facts)
        state = open_tensors(path, ema=ema)
        try:
            check_system(state, *self.module.__name__.split(".")[1:])
            config = self.read_config(state, **self._find_facts(path, state, facts))
            shapes = param_shapes(self.module.init, config)
            check_shapes(state, self.released_shapes(config))
            return config, _open_mapped(path, state, self.make_table(shapes), shapes)
        except (ConfigError, WeightsError) as error:
            raise WeightsError(f"{path}: {error}") from error

    def _find_facts(self, path: str | pathlib.Path, state: State, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the facts that the file's header or a published file of the same shapes tells."""
        written = read_metadata(path)
        found = {name: parse_value(written[name]) for name in self.facts if name in written} | dict(facts)
        if not found.keys() >= {name for name, needed in self.facts.items() if needed}:
            found = self._recognize_size(state) | found
        if missing := [name for name, needed in self.facts.items() if needed and name not in found]:
            raise WeightsError(f"the file does not tell {', '.join(missing)}: give --fact {missing[0]}=VALUE")
        types = typing.get_type_hints(self.module.Config, include_extras=True)
        return {name: convert_value(value, types[name], f"--fact {name}") for name, value in found.items()}

    def _recognize_size(self, state: State) -> dict[str, Any]:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        for _, file in list_released().values():
            if isinstance(file.config, self.module.Config) and self.released_shapes(file.config) == shapes:
                return {name: getattr(file.config, name) for name in self.facts}
        return {}

    def released_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the tensors that `save` writes."""
        shapes = param_shapes(self.module.init, config)
        buffers = {name: value.shape for name, value in self.make_buffers(config).items()}
        return released_shapes(self.make_table(shapes), shapes) | buffers

    def count_parameters(self, config: Any) -> int:
        """Return the number of parameters of the released file, also those that we do not use."""
        buffers = self.make_buffers(config)
        return sum(math.prod(shape) for name, shape in self.released_shapes(config).items() if name not in buffers)

    def save(self, path: str | pathlib.Path, config: Any, params: Any) -> None:
        """Write .safetensors with the released names, shapes and buffers, parameters in float32, unused rows as zeros.

        The facts are recorded in the header, so that `load` finds them.
        Raises: WeightsError for another suffix, parameters of other shapes, or a file that cannot be written.
        """
        shapes = param_shapes(self.module.init, config)
        ours, expected = ({k: leaf.shape for k, leaf in flatten_params(tree).items()} for tree in (params, shapes))
        for name in sorted(ours.keys() | expected.keys()):
            if ours.get(name) != expected.get(name):
                raise WeightsError(f"{path}: '{name}' has shape {ours.get(name)}, expected {expected.get(name)}")
        state = {name: x.astype(np.float32) for name, x in to_released(self.make_table(shapes), params).items()}
        facts = {name: str(getattr(config, name)) for name in self.facts}
        write_safetensors(path, state | dict(self.make_buffers(config)), facts)


def check_facts(facts: Collection[str], known: Collection[str]) -> None:
    """Raise ConfigError unless all facts are known."""
    if unknown := [name for name in facts if name not in known]:
        takes = f"they are {', '.join(known)}" if known else "these files tell everything"
        raise ConfigError(f"unknown fact '{unknown[0]}': {takes}")


def get_tensor(state: State, name: str, ndim: int) -> StoredTensor:
    """Return a tensor of `ndim` dimensions, none of size 0. Raises: WeightsError."""
    if name not in state:
        raise WeightsError(f"'{name}' is missing.{nearest(name, list(state)[:1000])}")
    shape = state[name].shape
    if len(shape) != ndim or 0 in shape:
        raise WeightsError(f"'{name}' has shape {shape}, not {ndim} dimensions")
    return state[name]


def check_shapes(state: State, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError unless a file holds exactly the tensors of these names and shapes."""
    if surplus := sorted(state.keys() - expected.keys()):
        name, count = surplus[0], len(surplus)
        raise WeightsError(f"unexpected tensor '{name}' ({count} in all).{nearest(name, expected)}")
    if missing := sorted(expected.keys() - state.keys()):
        raise WeightsError(f"'{missing[0]}' is missing ({len(missing)} in all)")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise WeightsError(f"'{name}' has shape {state[name].shape}, expected {shape}")


def released_shapes(table: Table, shapes: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file, for the shapes of our parameters."""
    return {entry.name: entry.released for entry in _entries(table, shapes)}


def to_released(table: Table, params: Any) -> dict[str, np.ndarray]:
    """Any tree of the parameters' structure (parameters, gradients) under the released names and shapes."""
    leaves, state = flatten_params(jax.tree.map(np.asarray, params)), dict[str, np.ndarray]()
    for entry in _entries(table, params):
        leaf = leaves[entry.path]
        value = (leaf if entry.layer is None else leaf[entry.layer]).transpose(entry.order).reshape(entry.used)
        state[entry.name] = np.pad(value, [(0, n - used) for n, used in zip(entry.released, entry.used, strict=True)])
    return state


def write_safetensors(
    path: str | pathlib.Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name, and texts into the header. The file is complete or absent.

    Raises: WeightsError for a suffix other than .safetensors, or a file that cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written as .safetensors (docs/released_weights.md makes .bin of it)")
    partial = path.with_name(f".{path.name}.rar_jax_partial")
    try:
        arrays = {name: np.ascontiguousarray(x) for name, x in state.items()}
        safetensors.numpy.save_file(arrays, partial, {"format": "pt", **(metadata or {})})
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{path} cannot be written ({error}): choose another folder") from error


def _open_mapped(path: str | pathlib.Path, state: State, table: Table, shapes: Any) -> dict[str, Any]:
    leaves, parts = flatten_params(shapes), dict[str, list[Any]]()

    def read(entry: _Entry) -> np.ndarray:
        value = check_finite(path, entry.name, state[entry.name].read())
        used = value[tuple(map(slice, entry.used))]
        return used.reshape([entry.shape[axis] for axis in entry.order]).transpose(np.argsort(entry.order))

    for entry in _entries(table, shapes):
        parts.setdefault(entry.path, []).append(functools.partial(read, entry))
    stacked = {mapped.path for name, mapped in table.items() if "{}" in name}
    lazy = {name: LazyArray(leaves[name].shape, parts[name], stacked=name in stacked) for name in parts}
    return unflatten_dict(lazy, sep="/")


class _Entry(NamedTuple):
    """A tensor of a released file, and the parameter, or layer of a parameter, that it holds."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]  # of our parameter or its layer
    order: list[int]  # our axes as they are merged into the released axes
    used: tuple[int, ...]  # released shape without unused entries
    released: tuple[int, ...]


def _entries(table: Table, shapes: Any) -> Iterator[_Entry]:
    leaves = flatten_params(shapes)
    for name, mapped in table.items():
        shape = leaves[mapped.path].shape
        layers: Any = range(shape[0]) if "{}" in name else [None]
        shape = shape[1:] if "{}" in name else shape
        ours, _, released = mapped.axes.partition(" -> ")
        groups = [[ours.index(letter) for letter in group.strip("1")] for group in released.split(" ")]
        groups = groups if mapped.axes else [[axis] for axis in range(len(shape))]
        used = tuple(math.prod(shape[axis] for axis in group) for group in groups)
        unused = mapped.unused or (0,) * len(used)
        whole = tuple(a + b for a, b in zip(used, unused, strict=True))
        for layer in layers:
            order = [axis for group in groups for axis in group]
            yield _Entry(name.format(layer), mapped.path, layer, shape, order, used, whole)
