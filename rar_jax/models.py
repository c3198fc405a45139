"""The contract of models, and how they are found: one file of generators/ or tokenizers/ is one model."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from rar_jax.config import build, nearest, require
from rar_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """What stands for one image: ids of codes, or continuous latents.

    shape: (256,) ids; (256, 2) factorised ids, two codes per position; (16, 16, 16) latents.
    dtype: "int32" or "float32"; what a store keeps may also be "uint8", "uint16", "uint32" or "float16".
    vocab: number of codes, of each sub-code; None: continuous.
    """

    shape: tuple[int, ...]
    dtype: str
    vocab: int | None = None

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{sizes} {self.dtype}" if self.vocab is None else f"{sizes} ids of {self.vocab} codes"

    def with_batch(self, size: int) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype of the tokens of a batch, (b, *shape)."""
        return jax.ShapeDtypeStruct((size, *self.shape), self.dtype)


class Aux(NamedTuple):
    """What a loss returns beside its value.

    metrics: float32 scalars, "loss" among them. outputs: what the rest of the step needs: reconstructions, tokens.
    """

    metrics: dict[str, jax.Array]
    outputs: Any = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A module of generators/ or tokenizers/ with its Config."""

    module: ModuleType
    config: Any

    @property
    def name(self) -> str:
        """The name in a config, for `find_module`."""
        package, _, name = self.module.__name__.rpartition(".")
        return name if package in ("rar_jax.generators", "rar_jax.tokenizers") else self.module.__name__

    def param_shapes(self) -> Any:
        """Return the tree of the parameters' shapes and dtypes, without making them."""
        return jax.eval_shape(functools.partial(self.module.init, self.config), jax.random.key(0))


def load_model(config: Mapping[str, Any], kind: str) -> Model:
    """Make the generator or tokenizer (kind "generators", "tokenizers") of a config.json."""
    section = config[kind[:-1]]
    module = find_module(kind, section["name"])
    return Model(module, build(module.Config, section, where=f"config.{kind[:-1]}", ignore=("name", "weights")))


def token_spec(model: Model) -> TokenSpec:
    """Return what a generator draws, or a tokenizer decodes."""
    return model.module.token_spec(model.config)


def check_pair(generator: Model, tokenizer: Model) -> None:
    """Raise ConfigError unless the generator draws the tokens that the tokenizer decodes."""
    drawn, decoded = token_spec(generator), token_spec(tokenizer)
    require(
        drawn == decoded,
        f"the generator draws {drawn}, the tokenizer decodes {decoded}: make config.generator fit config.tokenizer",
    )


def store_spec(tokenizer: Model) -> TokenSpec:
    """Return what `encode` makes and a token store keeps of an image.

    By default the tokens themselves, ids in the fewest bytes.
    """
    if hasattr(tokenizer.module, "store_spec"):
        return tokenizer.module.store_spec(tokenizer.config)
    spec = token_spec(tokenizer)
    if spec.vocab is None:
        return spec
    return dataclasses.replace(spec, dtype="uint16" if spec.vocab <= 2**16 else "uint32")


def draw_tokens(tokenizer: Model, stored: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Return the tokens (b, ...) of what a store keeps, by the tokenizer's `draw` if it has one. Traceable.

    key: None draws nothing: the tokenizer's deterministic choice.
    """
    if hasattr(tokenizer.module, "draw"):
        return tokenizer.module.draw(tokenizer.config, stored, key=key)
    return stored.astype(token_spec(tokenizer).dtype)


def encode_tokens(tokenizer: Model, params: Any, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Return the tokens (b, ...) of images (b, y, x, c), exactly as through a token store. Traceable."""
    stored = tokenizer.module.encode(tokenizer.config, params, images).astype(store_spec(tokenizer).dtype)
    return draw_tokens(tokenizer, stored, key=key)


def find_known_tokens(generator: Model, tokenizer: Model, mask: np.ndarray) -> np.ndarray:
    """Return the places, bool, of an image's tokens of which no pixel of a mask, bool (y, x), is to be drawn.

    Raises: ConfigError if the pair cannot complete images.
    """
    require(hasattr(generator.module, "complete"), f"generator '{generator.name}' cannot complete images")
    has_places = hasattr(tokenizer.module, "known_tokens")
    require(has_places, f"tokenizer '{tokenizer.name}' has no tokens that belong to pixels: it cannot complete images")
    return np.asarray(tokenizer.module.known_tokens(tokenizer.config, ~mask))


def prepare_params(generator: Model, params: Any, *, dtype: Any = None) -> Any:
    """Return parameters for decoding in `dtype`, by the generator's `prepare` if it has one. Traceable."""
    prepare = getattr(generator.module, "prepare", None)
    return prepare(generator.config, params, dtype=dtype) if prepare else params


def find_module(kind: str, name: str) -> ModuleType:
    """Import rar_jax/<kind>/<name>.py, or the module of a name with dots: "my_package.my_generator".

    Raises: ConfigError, with the nearest name, if there is no such file.
    """
    if isinstance(name, str) and "." in name:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{kind[:-1]} '{name}': {error}. Is its folder in PYTHONPATH?") from None
    known = module_names(kind)
    if name not in known:
        raise ConfigError(f"no {kind[:-1]} '{name}'.{nearest(name, known)}")
    return importlib.import_module(f"rar_jax.{kind}.{name}")


def module_names(kind: str) -> list[str]:
    """Return the names of all files in rar_jax/<kind>/."""
    folder = pathlib.Path(__file__).parent / kind
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))
