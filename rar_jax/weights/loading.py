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
from rar_jax.weights.mapping import param_shapes


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
        module, config = self.model.module, self.model.config
        shapes = param_shapes(module.init, config)
        if mesh is None:
            one = jax.sharding.SingleDeviceSharding(find_devices()[0])
            return self.restore(jax.tree.map(lambda _: one, shapes))
        return self.restore(param_shardings(module.axes(config), shapes, mesh))


def open_weights(
    path: str | pathlib.Path, kind: str, *, num_tokens: int | None = None, step: int | None = None
) -> Weights:
    """Open the generator or tokenizer (kind "generators", "tokenizers") of a file or directory.

    A file is tried with each module of the kind that can read released files, in alphabetical order.

    Args:
      num_tokens: of an image, if known: the weights of a convolutional tokenizer do not tell.
      step: of a directory's checkpoints; default the newest good one.

    Raises: ConfigError if there is nothing; WeightsError or CheckpointError if it is damaged or something else.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_directory(path, kind, step)
    require(step is None, f"{path} is a file and has no steps: only a work directory does")
    if not path.is_file():
        raise ConfigError(f"{path}: no such directory or weights file")
    known = {} if num_tokens is None else {"num_tokens": num_tokens}
    refused: list[WeightsError] = []
    for name in sorted(set(module_names(kind)) & set(module_names("weights"))):
        try:
            config, params = find_module("weights", name).open_params(path, **known)
        except WeightsError as error:
            refused.append(error)
        else:
            model = Model(find_module(kind, name), config)
            return Weights(model, path, functools.partial(put_on_devices, params), functools.partial(file_sha256, path))
    raise refused[0]


def read_directory(path: pathlib.Path) -> dict[str, Any]:
    """Read config.json of a work directory or a converted one. Raises: ConfigError if it lacks a section."""
    config = Workdir(path).read_config()
    for section in ("data", "guidance", "tokenizer", "generator"):
        if not isinstance(config.get(section), dict):
            raise ConfigError(
                f"{path / 'config.json'} is damaged: it lacks the section '{section}'. Restore it from a copy"
            )
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
