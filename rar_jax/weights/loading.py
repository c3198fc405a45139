"""Load weights from a work directory, a converted directory or a released file.

Only names and shapes are read until the weights are put on devices; each process then reads its own shards.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.config import require
from rar_jax.errors import CheckpointError, ConfigError, WeightsError
from rar_jax.models import Model, find_module, load_model, module_names
from rar_jax.parallel.mesh import find_devices
from rar_jax.parallel.rules import param_shardings
from rar_jax.runs.checkpoint import good_step, load_params
from rar_jax.runs.manifest import file_sha256, verify_manifest
from rar_jax.runs.workdir import Workdir
from rar_jax.weights.lazy import put_on_devices
from rar_jax.weights.torch_file import open_tensors


@dataclasses.dataclass(frozen=True)
class Weights:
    """A generator's or tokenizer's weights, not read yet."""

    model: Model
    path: pathlib.Path
    restore: Callable[[Any], Any]  # tree of shardings -> tree of jax.Arrays
    sha256: Callable[[], str]  # hex digest of the file, or of the checkpoint's manifest

    def place(self, mesh: Mesh | None = None) -> Any:
        """Read float32 parameters, sharded over a mesh as rules.py says, or onto the first device.

        Raises: WeightsError if the file is damaged; ConfigError if a parameter does not divide over the mesh.
        """
        shapes = self.model.param_shapes()
        if mesh is None:
            one = jax.sharding.SingleDeviceSharding(find_devices()[0])
            return self.restore(jax.tree.map(lambda _: one, shapes))
        return self.restore(param_shardings(self.model.module.axes(self.model.config), shapes, mesh))


def open_weights(
    path: str | pathlib.Path, kind: str, *, num_tokens: int | None = None, step: int | None = None
) -> Weights:
    """Open the generator or tokenizer (kind "generators", "tokenizers") of a file or directory.

    Args:
      num_tokens: of an image, if known: the weights of a convolutional tokenizer do not tell.
      step: of a directory's checkpoints; default the newest good one.

    Raises: ConfigError if there is nothing; WeightsError or CheckpointError if it is damaged or something else.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_directory(path, kind, step)
    require(step is None, f"{path} is a file and has no steps: only a work directory does")
    found, name = recognize_file(path)
    if found != kind:
        raise WeightsError(f"{path} is a {found[:-1]} ({name}), not a {kind[:-1]}: give a {kind[:-1]} here")
    known = {} if num_tokens is None else {"num_tokens": num_tokens}
    config, params = find_module("weights", name).open_params(path, **known)
    model = Model(find_module(kind, name), config)
    return Weights(model, path, functools.partial(put_on_devices, params), functools.partial(file_sha256, path))


def recognize_file(path: pathlib.Path) -> tuple[str, str]:
    """Find the kind and name of the model that a released file holds, by its keys.

    Raises: ConfigError if there is no file; WeightsError if it is damaged or of no known model.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such directory or weights file")
    state, keys = open_tensors(path), dict[str, str]()
    for kind in ("generators", "tokenizers"):
        for name in sorted(set(module_names(kind)) & set(module_names("weights"))):
            key = find_module("weights", name).FORMAT.key
            if key in state:
                return kind, name
            keys[name] = key
    expected = ", ".join(f"'{key}' ({name})" for name, key in keys.items())
    raise WeightsError(f"{path} holds no known model: it has none of {expected}")


def read_directory(path: pathlib.Path) -> dict[str, Any]:
    """Read config.json of a work directory or a converted one. Raises: ConfigError if it lacks a section."""
    config = Workdir(path).read_config()
    for section in ("data", "sampling", "tokenizer", "generator"):
        has_section = isinstance(config.get(section), dict)
        require(has_section, f"{path}/config.json is damaged: it lacks the section '{section}'. Restore it from a copy")
    return {"name": path.name, **config}


def _open_directory(path: pathlib.Path, kind: str, step: int | None) -> Weights:
    workdir, stage = Workdir(path), kind[:-1]
    config = read_directory(path)
    if step is not None:
        good = step, verify_manifest(workdir.checkpoints(stage) / str(step))
    elif (good := good_step(workdir.checkpoints(stage))) is None:
        unfinished = f" yet: finish it with `rar-jax run --config {config['name']} --workdir {path}`"
        what_next = ": convert it again" if "converted_from" in config else unfinished
        raise CheckpointError(f"{path} has no good {stage} checkpoint{what_next}")
    restore = functools.partial(load_params, workdir.checkpoints(stage), good[0])
    return Weights(load_model(config, kind), path, restore, lambda: good[1])
