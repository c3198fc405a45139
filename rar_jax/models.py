"""Models are found by name: one file of generators/ or tokenizers/ is one model."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from rar_jax.config import build, nearest, require
from rar_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Model:
    """A module of generators/ or tokenizers/ with its Config."""

    module: ModuleType
    config: Any

    def param_shapes(self) -> Any:
        """Return the tree of the parameters' shapes and dtypes, without making them."""
        return jax.eval_shape(functools.partial(self.module.init, self.config), jax.random.key(0))


def load_model(config: Mapping[str, Any], kind: str) -> Model:
    """Make the generator or tokenizer (kind "generators", "tokenizers") of a config.json."""
    section = config[kind[:-1]]
    module = find_module(kind, section["name"])
    return Model(module, build(module.Config, section, where=f"config.{kind[:-1]}", ignore=("name", "weights")))


def check_pair(generator: Model, tokenizer: Model) -> None:
    """Raise ConfigError unless the generator makes the tokens that the tokenizer decodes."""
    made, read = (model.module.token_spec(model.config) for model in (generator, tokenizer))
    a, b = (f"{spec.dtype}{list(spec.shape)}" for spec in (made, read))
    makes = f"the generator makes {a} tokens, the tokenizer takes {b}: set generator.num_tokens to the tokenizer's grid"
    require(a == b, makes)
    a, b = (getattr(model.config, "codebook_size", None) for model in (generator, tokenizer))
    require(a == b, f"codebook_size is {a} in the generator and {b} in the tokenizer: make them equal")


def find_module(kind: str, name: str) -> ModuleType:
    """Import rar_jax/<kind>/<name>.py. Raises: ConfigError with the nearest name if there is no such file."""
    known = module_names(kind)
    if name not in known:
        raise ConfigError(f"no {kind[:-1]} '{name}'.{nearest(name, known)}")
    return importlib.import_module(f"rar_jax.{kind}.{name}")


def module_names(kind: str) -> list[str]:
    """Return the names of all files in rar_jax/<kind>/, which are its registry."""
    folder = pathlib.Path(__file__).parent / kind
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))
