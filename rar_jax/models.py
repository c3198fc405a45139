"""Models are found by name: one file of generators/ or tokenizers/ is one model."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rar_jax.config import build, nearest, require
from rar_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Model:
    """A module of generators/ or tokenizers/ with its Config."""

    module: ModuleType
    config: Any


def load_model(config: Mapping[str, Any], kind: str) -> Model:
    """Rebuild the model of a resolved experiment (config.json); kind is "generators" or "tokenizers"."""
    section = config[kind[:-1]]
    module = find_module(kind, section["name"])
    return Model(module, build(module.Config, section, where=f"config.{kind[:-1]}", ignore=("name", "weights")))


def check_pair(generator: Model, tokenizer: Model) -> None:
    """Raise ConfigError unless the tokenizer decodes the tokens that the generator makes."""
    made = generator.module.token_spec(generator.config)
    read = tokenizer.module.token_spec(tokenizer.config)
    require(
        made.shape == read.shape and made.dtype == read.dtype,
        f"the generator makes {made.dtype}{list(made.shape)} tokens, the tokenizer takes "
        f"{read.dtype}{list(read.shape)}: set generator.num_tokens to the tokenizer's grid",
    )
    codes = [getattr(model.config, "codebook_size", None) for model in (generator, tokenizer)]
    require(
        codes[0] == codes[1],
        f"codebook_size is {codes[0]} in the generator and {codes[1]} in the tokenizer: make them equal",
    )


def find_module(kind: str, name: str) -> ModuleType:
    """Import rar_jax/<kind>/<name>.py.

    Raises: ConfigError if there is no such file, naming the nearest.
    """
    known = module_names(kind)
    if name not in known:
        raise ConfigError(f"no {kind[:-1]} '{name}'.{nearest(name, known)}")
    return importlib.import_module(f"rar_jax.{kind}.{name}")


def module_names(kind: str) -> list[str]:
    """List the modules of rar_jax/<kind>/, which are its registry."""
    folder = pathlib.Path(__file__).parent / kind
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))
