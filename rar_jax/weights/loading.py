"""Load weights from a work directory, a converted directory or a released file.

Only names and shapes are read until the weights are put on devices; each process then reads its own shards.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.config import parse_value, require
from rar_jax.errors import CheckpointError, ConfigError, WeightsError
from rar_jax.models import Model, check_pair, find_module, load_model, module_names
from rar_jax.parallel.mesh import find_devices
from rar_jax.parallel.rules import param_shardings
from rar_jax.runs.checkpoint import good_step, load_params
from rar_jax.runs.manifest import file_sha256, verify_manifest
from rar_jax.runs.workdir import Workdir
from rar_jax.weights.lazy import put_on_devices
from rar_jax.weights.mapping import check_facts
from rar_jax.weights.registry import find_file, find_named, list_systems, recognize_system
from rar_jax.weights.torch_file import find_shards, open_tensors


@dataclasses.dataclass(frozen=True)
class Reading:
    """How weights are found and read.

    Attributes:
      download: fetch a released file that is not cached.
      facts: fields of the Config that a file does not tell.
      models: the modules that read files, if keys do not tell.
      raw: the parameters as trained, where there is also their moving average (EMA), which is read otherwise.
    """

    download: bool = False
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    models: Sequence[str] = ()
    raw: bool = False


@dataclasses.dataclass(frozen=True)
class Weights:
    """A generator's or tokenizer's weights, not read yet."""

    model: Model
    path: pathlib.Path
    restore: Callable[[Any], Any]  # tree of shardings -> tree of jax.Arrays
    sha256: Callable[[], str]  # hex digest of the file or of the checkpoint's manifest, and of "raw" if they are raw
    raw: bool = False
    facts: tuple[str, ...] = ()  # that a file of this model does not tell

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
    path_or_name: str | pathlib.Path,
    kind: str,
    *,
    reading: Reading = Reading(),
    like: Model | None = None,
    step: int | None = None,
) -> Weights:
    """Open the generator or tokenizer (kind "generators", "tokenizers") of a file, released name or directory.

    Args:
      like: a model that tells facts, if it is of the same module.
      step: of a directory's checkpoints; default the newest good one.

    Raises: ConfigError if there is nothing, or for unknown facts; WeightsError or CheckpointError if it is damaged,
      something else, or lacks facts.
    """
    weights = _open(path_or_name, kind, step, reading, like)
    _check_use(reading, weights)
    return weights


def open_pair(
    generator: str | pathlib.Path,
    tokenizer: str | pathlib.Path,
    *,
    reading: Reading = Reading(),
    step: int | None = None,
) -> tuple[Weights, Weights]:
    """Open a generator and its tokenizer as `open_weights` does. Each takes the facts and the model that it knows.

    Raises: ConfigError too if they do not fit.
    """
    pair = _open(generator, "generators", step, reading), _open(tokenizer, "tokenizers", None, reading)
    _check_use(reading, *pair)
    try:
        check_pair(pair[0].model, pair[1].model)
    except ConfigError as error:
        hint = f", or give --fact {pair[1].facts[0]}=VALUE" if pair[1].facts else ""
        raise ConfigError(f"{error}{hint}") from None
    return pair


def _open(
    path_or_name: str | pathlib.Path,
    kind: str,
    step: int | None,
    reading: Reading,
    like: Model | None = None,
) -> Weights:
    path, facts = find_file(path_or_name, download=reading.download), reading.facts
    if path.is_dir():
        return _open_directory(path, kind, step, reading.raw)
    require(step is None, f"{path} is a file and has no steps: only a work directory does")
    found, name = recognize_file(path, path_or_name, [name for name in reading.models if name in module_names(kind)])
    if found != kind:
        raise WeightsError(f"{path} is a {found[:-1]} ({name}), not a {kind[:-1]}: give a {kind[:-1]} here")
    form = find_module("weights", name).FORMAT
    told = {fact: getattr(like.config, fact) for fact in form.facts} if like and like.module is form.module else {}
    told |= {fact: facts[fact] for fact in form.facts if fact in facts}
    config, params = form.open_params(path, ema=not reading.raw, **told)
    restore, sha256 = functools.partial(put_on_devices, params), functools.partial(hash_weights, path, raw=reading.raw)
    return Weights(Model(form.module, config), path, restore, sha256, reading.raw, tuple(form.facts))


def _check_use(reading: Reading, *opened: Weights) -> None:
    """Raise ConfigError for facts and models that nothing opened knows."""
    check_facts(reading.facts, [fact for weights in opened for fact in weights.facts])
    names, models = [weights.model.name for weights in opened], reading.models
    require(set(models) <= set(names), f"--model {', '.join(models)}: these weights are read by {', '.join(names)}")


def recognize_file(path: pathlib.Path, name: str | pathlib.Path = "", models: Sequence[str] = ()) -> tuple[str, str]:
    """Find the kind and name of the model that a file holds, by what is said of it, its released name, or its keys.

    Raises: WeightsError if it is damaged or of no known model.
    """
    systems = list_systems()
    if said := next((name for name in models if name in systems), None):
        return systems[said][0], said
    if path != pathlib.Path(name) and (named := find_named(name)) is not None:
        return systems[named[0]][0], named[0]
    if (found := recognize_system(open_tensors(path))) is not None:
        return found
    keys = ", ".join(f"'{module.KEYS[0]}' ({name})" for name, (_, module) in systems.items())
    raise WeightsError(f"{path} holds no known model: it has none of {keys}. If it is one, give --model NAME")


def parse_reading(*, download: bool, fact: Sequence[str] | None, model: Sequence[str] | None, raw: bool) -> Reading:
    """Return what --download, --fact NAME=VALUE, --model NAME and --raw say."""
    pairs = [text.partition("=") for text in fact or ()]
    for name, equals, _ in pairs:
        require(bool(name and equals), f"--fact {name}: give NAME=VALUE")
    return Reading(download, {name: parse_value(value) for name, _, value in pairs}, model or (), raw)


def hash_weights(path: pathlib.Path, *, raw: bool = False) -> str:
    """Return the sha256 of a file, or of the sha256s of an index's shards in their order."""
    shards = [file_sha256(shard) for shard in find_shards(path)]
    return _tag_raw(shards[0] if shards[1:] == [] else hashlib.sha256("".join(shards).encode()).hexdigest(), raw)


def _tag_raw(sha256: str, raw: bool) -> str:
    return hashlib.sha256(f"{sha256} raw".encode()).hexdigest() if raw else sha256


def read_directory(path: pathlib.Path) -> dict[str, Any]:
    """Read config.json of a work directory or a converted one. Raises: ConfigError if it lacks a section."""
    config = Workdir(path).read_config()
    for section in ("data", "sampling", "tokenizer", "generator"):
        has_section = isinstance(config.get(section), dict)
        require(has_section, f"{path}/config.json is damaged: it lacks the section '{section}'. Restore it from a copy")
    return {"name": path.name, **config}


def _open_directory(path: pathlib.Path, kind: str, step: int | None, raw: bool) -> Weights:
    workdir, stage = Workdir(path), kind[:-1]
    config = read_directory(path)
    if step is not None:
        good = step, verify_manifest(workdir.checkpoints(stage) / str(step))
    elif (good := good_step(workdir.checkpoints(stage))) is None:
        unfinished = f" yet: finish it with `rar-jax run --config {config['name']} --workdir {path}`"
        what_next = ": convert it again" if "converted_from" in config else unfinished
        raise CheckpointError(f"{path} has no good {stage} checkpoint{what_next}")
    restore = functools.partial(load_params, workdir.checkpoints(stage), good[0], raw=raw)
    return Weights(load_model(config, kind), path, restore, lambda: _tag_raw(good[1], raw), raw)
