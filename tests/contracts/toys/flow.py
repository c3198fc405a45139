"""A flow over float tokens (y, x, c): velocity matching, and Euler steps from noise (t = 0) to tokens (t = 1).

Shape suffixes: b batch, f all floats of an image, d width, m wider.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.models import Aux, TokenSpec
from rar_jax.objectives.classes import drop_labels
from rar_jax.sampling import SamplingSettings, guide, weigh_guidance


@dataclasses.dataclass(frozen=True)
class Config:
    num_classes: int = 10
    shape: tuple[int, ...] = (4, 4, 2)
    width: int = 32
    label_dropout: float = 0.1
    dtype: str = "float32"


TINY = Config()


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    scale: float | None = None
    num_steps: int = 4
    temperature: float = 1.0


def token_spec(config: Config) -> TokenSpec:
    return TokenSpec(config.shape, "float32")


def init(config: Config, key: jax.Array) -> dict[str, jax.Array]:
    f, d = math.prod(config.shape), config.width
    sizes = {"tokens": (f, d), "classes": (config.num_classes + 1, d), "time": (2, d), "wide": (d, 2 * d)}
    sizes["velocity"] = (2 * d, f)
    keys = dict(zip(sizes, jax.random.split(key, len(sizes)), strict=True))
    return {name: jax.random.normal(keys[name], size) / size[0] ** 0.5 for name, size in sizes.items()}


def axes(config: Config) -> dict[str, Any]:
    wide: dict[str, Any] = {"wide": ("width", "mlp"), "velocity": ("mlp", None)}
    return {"tokens": (None, "width"), "classes": (None, "width"), "time": (None, "width")} | wide


def decay_mask(config: Config) -> dict[str, bool]:
    return {name: name in ("tokens", "wide", "velocity") for name in axes(config)}


def velocity(config: Config, params: Any, tokens: jax.Array, times_b: jax.Array, labels_b: jax.Array) -> jax.Array:
    """Predict the velocity (b, *shape) of tokens (b, *shape) at times in [0, 1]."""
    clock_b2 = jnp.stack([jnp.sin(math.pi / 2 * times_b), jnp.cos(math.pi / 2 * times_b)], axis=1)
    x_bd = tokens.reshape(len(tokens), -1) @ params["tokens"] + clock_b2 @ params["time"] + params["classes"][labels_b]
    x_bm = jax.nn.gelu(x_bd) @ params["wide"]
    return (jax.nn.gelu(x_bm) @ params["velocity"]).reshape(tokens.shape)


def loss(config: Config, params: Any, batch: Any, *, key: jax.Array, train: bool, **_: Any) -> tuple[jax.Array, Aux]:
    """Mean squared error of the velocity. batch: optionally "times" (b,), "noise" (b, *shape), "drop" (b,)."""
    key_time, key_noise, key_drop = jax.random.split(key, 3)
    tokens, times_b, noise = batch["tokens"], batch.get("times"), batch.get("noise")
    times_b = jax.random.uniform(key_time, tokens.shape[:1]) if times_b is None else times_b
    noise = jax.random.normal(key_noise, tokens.shape) if noise is None else noise
    labels_b = drop_labels(batch, key_drop, rate=config.label_dropout if train else 0.0, null=config.num_classes)
    predicted = velocity(config, params, _mix(noise, tokens, times_b), times_b, labels_b)
    value = jnp.mean((predicted - (tokens - noise)) ** 2)
    return value, Aux({"loss": value})


def _mix(noise: jax.Array, tokens: jax.Array, times_b: jax.Array) -> jax.Array:
    times = times_b.reshape(-1, *(1,) * (tokens.ndim - 1))
    return (1.0 - times) * noise + times * tokens


def sample(
    config: Config, params: Any, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, given: Any = None
) -> jax.Array:
    """Integrate from noise to tokens float32 (b, *shape). given: optionally "noise" (b, *shape)."""
    shape = (len(labels), *config.shape)
    nothing_known = np.zeros((*shape[:-1], 1), bool)
    return _integrate(config, params, labels, keys, sampling, jnp.zeros(shape), nothing_known, given)


def complete(
    config: Config, params: Any, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, tokens: Any, known: Any
) -> jax.Array:
    """Draw the tokens that are not known. known: NumPy bool (b, y, x), any positions."""
    return _integrate(config, params, labels, keys, sampling, tokens, known[..., None], None)


def _integrate(
    config: Config, params: Any, labels: Any, keys: Any, sampling: Sampling, tokens: Any, known: np.ndarray, given: Any
) -> jax.Array:
    labels_b = jnp.asarray(labels, jnp.int32)
    noise = given["noise"] if given else jax.vmap(lambda key: jax.random.normal(key, config.shape))(keys)
    noise = noise * sampling.temperature

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        times_b = jnp.full(labels_b.shape, i / sampling.num_steps)
        x = jnp.where(known, _mix(noise, tokens, times_b), x)
        v = velocity(config, params, x, times_b, labels_b)
        if sampling.scale is not None:
            null = velocity(config, params, x, times_b, jnp.full_like(labels_b, config.num_classes))
            v = guide(v, null, weigh_guidance(sampling.scale, i / sampling.num_steps))
        return x + v / sampling.num_steps

    return jnp.where(known, tokens, jax.lax.fori_loop(0, sampling.num_steps, step, noise))
