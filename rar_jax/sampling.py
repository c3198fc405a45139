"""From labels to images in one traceable function, and what samplers share: settings, guidance, draws.

Shape suffixes: b batch, v codes.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.config import build, require, to_dict
from rar_jax.models import Model, encode_tokens

ROUNDINGS = ("truncate", "round")


def to_uint8(images_byxc: jax.Array, rounding: str = "truncate") -> jax.Array:
    """Round images of nominal range [0, 1] to uint8, by truncation as RAR's evaluation does, or to the nearest.

    What is outside the range is clipped; NaN becomes 0: see `has_nonfinite`.
    """
    scaled_byxc = jnp.nan_to_num(jnp.clip(images_byxc, 0.0, 1.0)) * 255.0
    return (jnp.round(scaled_byxc) if rounding == "round" else scaled_byxc).astype(jnp.uint8)


def has_nonfinite(images_byxc: jax.Array) -> jax.Array:
    """Return bool (b,): whether an image has a pixel that is not finite, before `to_uint8`."""
    return ~jnp.isfinite(images_byxc).all(axis=(1, 2, 3))


def sample_images(
    generator: Model,
    tokenizer: Model,
    params: dict[str, Any],
    labels: jax.Array,
    keys: jax.Array,
    sampling: SamplingSettings,
) -> jax.Array:
    """uint8 images (b, y, x, c) of the given classes, see `sample_pixels`; traceable."""
    return to_uint8(sample_pixels(generator, tokenizer, params, labels, keys, sampling))


def sample_pixels(
    generator: Model,
    tokenizer: Model,
    params: dict[str, Any],
    labels: jax.Array,
    keys: jax.Array,
    sampling: SamplingSettings,
) -> jax.Array:
    """Images (b, y, x, c) of the given classes as the tokenizer decodes them, nominally in [0, 1]; traceable.

    Args:
      params: {"generator": of init or prepare, "tokenizer"}.
      labels: int (b,). keys: typed keys (b,), see `keys.sample_keys`.
    """
    tokens = generator.module.sample(generator.config, params["generator"], labels, keys=keys, sampling=sampling)
    return tokenizer.module.decode(tokenizer.config, params["tokenizer"], tokens)


def complete_images(
    generator: Model,
    tokenizer: Model,
    params: dict[str, Any],
    labels: jax.Array,
    keys: jax.Array,
    sampling: SamplingSettings,
    image: jax.Array,
    known: np.ndarray,
) -> jax.Array:
    """uint8 images (b, y, x, c) of the given classes that share the known tokens of an image (y, x, c); traceable.

    known: NumPy bool, of the places of an image's tokens: the first axes of their shape.
    """
    rows = labels.shape[0]
    tokens = encode_tokens(tokenizer, params["tokenizer"], image[None])
    tokens = generator.module.complete(
        generator.config, params["generator"], labels, keys=keys, sampling=sampling,
        tokens=jnp.broadcast_to(tokens, (rows, *tokens.shape[1:])), known=np.broadcast_to(known, (rows, *known.shape)),
    )  # fmt: skip
    return to_uint8(tokenizer.module.decode(tokenizer.config, params["tokenizer"], tokens))


def reconstruct_images(
    tokenizer: Model, params: Any, images: jax.Array, *, rounding: str = "truncate"
) -> tuple[jax.Array, jax.Array]:
    """Return images (b, y, x, c) after encoding and decoding, uint8, and their tokens. Nothing is drawn. Traceable."""
    pixels, tokens = reconstruct_pixels(tokenizer, params, images)
    return to_uint8(pixels, rounding), tokens


def reconstruct_pixels(tokenizer: Model, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `reconstruct_images`, images as the tokenizer decodes them."""
    tokens = encode_tokens(tokenizer, params, images)
    return tokenizer.module.decode(tokenizer.config, params, tokens), tokens


# ---------------------------------------------------------------- settings


# What settings of these names must be, in every system.
_RULES = (
    ("scale", lambda x: x >= 0, "0 or more, or None for no guidance"),
    ("power", lambda x: x >= 0, "0 (constant guidance) or more"),
    ("temperature", lambda x: x > 0, "above 0; for argmax use greedy"),
    ("top_p", lambda x: 0 < x <= 1, "in (0, 1], or None to keep all"),
)


class SamplingSettings:
    """Base of each generator's `Sampling`, a frozen dataclass of its settings and their defaults.

    It may be passed to a jitted function. Fields annotated `float` or `float | None` are traced: another number does
    not recompile, None in place of a number does. All other fields are static.
    """

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))

    def __post_init__(self) -> None:
        settings = {name: getattr(self, name) for name in _traced_fields(type(self))}
        for name, value in settings.items():
            require(value is None or abs(value) < 1e30, f"{name} is {value}: it must be a number of float32")
        for name, valid, rule in _RULES:
            value = settings.get(name)
            require(value is None or valid(value), f"{name} is {value}: it must be {rule}")


@functools.cache
def _traced_fields(cls: type) -> tuple[str, ...]:
    return tuple(name for name, hint in typing.get_type_hints(cls).items() if hint in (float, float | None))


def _flatten(settings: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    traced, names = _traced_fields(type(settings)), [f.name for f in dataclasses.fields(settings)]
    static = tuple(getattr(settings, name) for name in names if name not in traced)
    return tuple(getattr(settings, name) for name in traced), static


def _unflatten(cls: type, static: tuple[Any, ...], traced: tuple[Any, ...]) -> Any:
    settings, values, others = object.__new__(cls), iter(traced), iter(static)  # tracers cannot be checked
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        value = next(values if field.name in _traced_fields(cls) else others)
        object.__setattr__(settings, field.name, value)
    return settings


def make_sampling(generator: Model, changes: Mapping[str, Any], base: Any = None, *, where: str = "sampling") -> Any:
    """Make a generator's Sampling: the defaults, or `base`, with some settings changed.

    Raises: ConfigError for a setting that the generator does not have (with the nearest), or a value that it cannot be.
    """
    settings = {**to_dict(base or {}), **changes}
    return build(generator.module.Sampling, settings, where=f"{where} of generator '{generator.name}'")


# ---------------------------------------------------------------- guidance

Schedule = Literal["constant", "linear", "cosine", "power-cosine"]


def weigh_guidance(
    scale: jax.Array | float,
    share: jax.Array | float,
    *,
    schedule: Schedule = "constant",
    power: jax.Array | float = 1.0,
    start: float = 1.0,
    interval: tuple[float, float] | None = None,
) -> jax.Array:
    """Return the weight of guidance in the course of sampling, float32 of the shape of `share`.

    It rises from `start` (the weight that is no guidance) to `scale` with x = share, in [0, 1], of the steps or tokens
    that are done, as each system counts them:
    constant 1; linear x; cosine sin(pi/2 x); power-cosine (1 - cos(pi x^power)) / 2, where 0^0 is 1.

    interval: (low, high); the weight is `start` unless low < share <= high.
    """
    x = jnp.asarray(share, jnp.float32)
    if schedule == "constant":
        rise = jnp.ones_like(x)
    elif schedule == "linear":
        rise = x
    elif schedule == "cosine":
        rise = jnp.sin(jnp.pi / 2 * x)
    else:  # (1 - cos y) / 2 = sin^2 (y / 2), which does not cancel for small y
        rise = jnp.sin(jnp.pi / 2 * x ** jnp.asarray(power, jnp.float32)) ** 2
    weight = start + (jnp.asarray(scale, jnp.float32) - start) * rise
    return weight if interval is None else jnp.where((interval[0] < x) & (x <= interval[1]), weight, start)


def guide(
    conditional: jax.Array,
    unconditional: jax.Array,
    weight: jax.Array | float,
    *,
    origin: Literal["null", "class"] = "null",
) -> jax.Array:
    """Combine the predictions c for the class and u for the null class: u + w (c - u), or c + w (c - u)."""
    return (unconditional if origin == "null" else conditional) + weight * (conditional - unconditional)


# ---------------------------------------------------------------- draws


def keep_top_k(logits: jax.Array, k: int | None) -> jax.Array:
    """Set logits (..., v) below the k-th largest to -inf. Equal ones stay. None keeps all."""
    if k is None or k >= logits.shape[-1]:
        return logits
    return jnp.where(logits < jax.lax.top_k(logits, k)[0][..., -1:], -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: jax.Array | float | None) -> jax.Array:
    """Keep the most likely logits (..., v), until their probabilities exceed p in sum; -inf for the others.

    The most likely one always stays. None keeps all.
    """
    if p is None:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
    before = jnp.cumsum(probs, axis=-1) - probs
    dropped = jnp.take_along_axis(before > p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(dropped, -jnp.inf, logits)


def draw_ids(logits_bv: jax.Array, keys: jax.Array, uniforms_b: jax.Array | None = None) -> jax.Array:
    """Draw an id from each row of logits, int32 (b,), with its own key.

    uniforms_b: in place of keys: the first id whose cumulative probability exceeds it.
    """
    if uniforms_b is None:
        return jax.vmap(jax.random.categorical)(keys, logits_bv).astype(jnp.int32)
    cumulative_bv = jnp.cumsum(jax.nn.softmax(logits_bv), axis=-1)
    above_bv = cumulative_bv > uniforms_b[:, None] * cumulative_bv[:, -1:]
    return jnp.argmax(above_bv, axis=-1).astype(jnp.int32)
