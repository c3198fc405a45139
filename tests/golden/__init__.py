"""Parity with the authors' code on golden files, by system: `python -m tests.golden NAME FOLDER`.

tests/golden/NAME.py measures what the files of tests/golden/NAME say, and of any other folder of the same format. It has
FILES, the names that the folder must hold, and `measure(folder)`, which yields checks. docs/parity.md says how to add one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from rar_jax.config import nearest
from rar_jax.weights.torch_file import open_tensors

HERE = pathlib.Path(__file__).parent


class GoldenError(Exception):
    """The system or a golden file is missing."""


class Check(NamedTuple):
    """A number and the largest value it may have. A NaN misses its bound."""

    quantity: str
    bound: float
    measured: float

    @property
    def passed(self) -> bool:
        return bool(self.measured <= self.bound)


# ---------------------------------------------------------------- running


def list_systems() -> list[str]:
    """Return the names of the modules beside this file."""
    return sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith(("_", "test_")))


def measure_parity(name: str, folder: pathlib.Path) -> list[Check]:
    """Measure every quantity of a system once: the worst value where it is measured several times.

    Raises: GoldenError for an unknown system, or a missing file or array.
    """
    if name not in list_systems():
        raise GoldenError(f"there are no golden files of '{name}'.{nearest(name, list_systems())}")
    system: Any = importlib.import_module(f"{__name__}.{name}")
    for file in system.FILES:
        if not (folder / file).is_file():
            raise GoldenError(f"{folder / file} is missing: '{name}' needs {', '.join(system.FILES)}")
    worst: dict[str, Check] = {}
    for check in system.measure(folder):
        known = worst.setdefault(check.quantity, check)
        if known.bound != check.bound:
            raise ValueError(f"'{check.quantity}' has the bounds {known.bound} and {check.bound}: rename one quantity")
        worst[check.quantity] = known._replace(measured=float(np.maximum(known.measured, check.measured)))
    return list(worst.values())


# ---------------------------------------------------------------- reading


class Arrays(dict[str, np.ndarray]):
    """The arrays of an .npz by name. A missing name raises GoldenError."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(np.load(path))
        self.path = path

    def __missing__(self, name: str) -> np.ndarray:
        raise GoldenError(f"{self.path} has no array '{name}'")

    def with_prefix(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays of names that begin so, by the rest of their names: at least one."""
        found = {name.removeprefix(prefix): x for name, x in self.items() if name.startswith(prefix)}
        return found or {"": self[f"{prefix}*"]}


def to_nhwc(x: np.ndarray) -> np.ndarray:
    """Move PyTorch's channel axis to the end."""
    return np.moveaxis(x, 1, -1)


# ---------------------------------------------------------------- comparing


def max_difference(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference; inf for other shapes."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(a - b).max(initial=0.0)) if a.shape == b.shape else np.inf


def max_relative_difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference over |theirs|, element by element; inf for other shapes. 0 must be 0."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    tiny = np.finfo(np.float64).tiny
    return float((np.abs(a - b) / np.maximum(np.abs(b), tiny)).max(initial=0.0)) if a.shape == b.shape else np.inf


def count_different(ours: Any, theirs: Any) -> float:
    """Return the number of elements that differ; inf for other shapes."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return float((a != b).sum()) if a.shape == b.shape else np.inf


def count_other_dtypes(dtype: Any, *arrays: Any) -> int:
    """Return the number of arrays of another dtype."""
    return sum(x.dtype != np.dtype(dtype) for x in arrays)


# ---------------------------------------------------------------- released files


def read_released(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the tensors of a torch or .safetensors file under their released names."""
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def measure_config(config: Any, **facts: Any) -> Check:
    """Compare the Config that was read off a file with the one of these fields and the defaults."""
    expected = type(config)(**facts)
    different = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(expected, f.name)]
    return Check("released file, fields of the Config that differ from config.json", 0, len(different))


def measure_round_trip(
    weights: ModuleType, init: Callable[..., Any], path: pathlib.Path, *, used: Mapping[str, Any], **facts: Any
) -> Iterator[Check]:
    """Load a released file, save it and load it again: bitwise the same, in the tree of `init`.

    Args:
      weights: the module with `load` and `save`. facts: for `load`.
      used: by released name, the index of the entries that the model uses, where it is not all. Others are saved as 0.
    """
    config, params = weights.load(path, **facts)
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    same_tree = jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    yield Check("released file, trees that are not that of init", 0, not same_tree)
    yield Check("parameters that are not float32", 0, count_other_dtypes(np.float32, *jax.tree.leaves(params)))
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy.safetensors"
        weights.save(copy, config, params)
        yield Check("files that save leaves besides its own", 0, len(list(copy.parent.iterdir())) - 1)
        ours, theirs = read_released(copy), read_released(path)
        config_again, params_again = weights.load(copy, **facts)
    yield Check("released -> ours -> released, names that differ", 0, len(ours.keys() ^ theirs.keys()))
    for name in ours.keys() & theirs.keys():
        expected = np.zeros_like(theirs[name])
        expected[used.get(name, ...)] = theirs[name][used.get(name, ...)]
        yield Check("released -> ours -> released, numbers that differ", 0, count_different(ours[name], expected))
        other = count_other_dtypes(theirs[name].dtype, ours[name])
        yield Check("released -> ours -> released, dtypes that differ", 0, other)
    yield Check("ours -> released -> ours, Configs that differ", 0, config_again != config)
    for a, b in zip(jax.tree.leaves(params_again), jax.tree.leaves(params), strict=True):
        yield Check("ours -> released -> ours, numbers that differ", 0, count_different(a, b))
