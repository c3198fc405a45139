"""A flow from noise to latents (y, x, z), integrated by Euler's method. It completes images of any known places.

x(t) = (1 - t) noise + t latents; the network predicts the velocity latents - noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.models import Aux, TokenSpec
from rar_jax.objectives.classes import drop_labels
from rar_jax.sampling import SamplingSettings, guide

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Label `num_classes` is the null class."""

    grid: int = 4
    latent_width: int = 4
    num_classes: int = 10
    width: int = 32
    label_dropout: float = 0.1
    dtype: str = "float32"


TINY = Config()


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    """temperature: standard deviation of the noise that the flow starts from. num_steps: of Euler's method."""

    scale: float | None = None
    temperature: float = 1.0
    num_steps: int = 8


def token_spec(config: Config) -> TokenSpec:
    """Latents (y, x, z)."""
    return TokenSpec((config.grid, config.grid, config.latent_width), "float32")


def init(config: Config, key: jax.Array) -> Params:
    """Return float32 parameters."""
    shapes = {
        "latents": (config.latent_width, config.width),
        "mean": (config.latent_width, config.width),
        "time": (2, config.width),
        "classes": (config.num_classes + 1, config.width),
        "places": (config.grid, config.grid, config.width),
        "head": (config.width, config.latent_width),
    }
    keys = jax.random.split(key, len(shapes))
    return {name: 0.3 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def axes(config: Config) -> dict[str, Any]:
    """Logical axes."""
    tables = {"classes": (None, None), "places": (None, None, None), "time": (None, None)}
    return tables | {"latents": (None, "width"), "mean": (None, "width"), "head": ("width", None)}


def decay_mask(config: Config) -> dict[str, bool]:
    """Weight decay on the matrices."""
    return {name: name in ("latents", "mean", "head") for name in axes(config)}


def _predict_velocity(params: Params, x: jax.Array, times_b: jax.Array, labels_b: jax.Array) -> jax.Array:
    mean = jnp.mean(x, axis=(1, 2)) @ params["mean"]
    time = jnp.stack([times_b, jnp.square(times_b)], axis=-1) @ params["time"]
    whole = (mean + time + params["classes"][labels_b])[:, None, None]
    return jax.nn.gelu(x @ params["latents"] + whole + params["places"][None]) @ params["head"]


def loss(
    config: Config, params: Params, batch: Mapping[str, jax.Array], *, key: jax.Array, train: bool, **_: Any
) -> tuple[jax.Array, Aux]:
    """Return the mean squared error of the velocity; batch["times"] (b,) and batch["noise"] are drawn if not given."""
    label_key, time_key, noise_key = jax.random.split(key, 3)
    rate = config.label_dropout if train else 0.0
    labels_b, latents = drop_labels(batch, label_key, rate=rate, null=config.num_classes), batch["tokens"]
    times_b = batch["times"] if "times" in batch else jax.random.uniform(time_key, labels_b.shape)
    noise = batch["noise"] if "noise" in batch else jax.random.normal(noise_key, latents.shape)
    t = times_b[:, None, None, None]
    velocity = _predict_velocity(params, (1 - t) * noise + t * latents, times_b, labels_b)
    value = jnp.mean(jnp.square(velocity - (latents - noise)))
    return value, Aux({"loss": value})


def sample(
    config: Config, params: Params, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, given: Any = None
) -> jax.Array:
    """Draw latents (b, y, x, z). given: "noise", of their shape."""
    return _integrate(config, params, labels, keys, sampling, given, None, None)


def complete(
    config: Config, params: Params, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, tokens: Any, known: Any
) -> jax.Array:
    """Draw the latents that are not known, of `known` (b, y, x). At each time the known ones are where they must be."""
    return _integrate(config, params, labels, keys, sampling, None, jnp.asarray(tokens), jnp.asarray(known)[..., None])


def _integrate(
    config: Config, params: Params, labels: Any, keys: Any, sampling: Sampling, given: Any, tokens: Any, known: Any
) -> jax.Array:
    shape, labels_b = token_spec(config).shape, jnp.asarray(labels, jnp.int32)
    noise = given["noise"] if given else jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    noise = sampling.temperature * noise

    def keep(x: jax.Array, t: Any) -> jax.Array:
        return x if known is None else jnp.where(known, (1 - t) * noise + t * tokens, x)

    def advance(x: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        times_b = jnp.broadcast_to(step / sampling.num_steps, labels_b.shape)
        velocity = _predict_velocity(params, x, times_b, labels_b)
        if sampling.scale is not None:
            null = _predict_velocity(params, x, times_b, jnp.full_like(labels_b, config.num_classes))
            velocity = guide(velocity, null, sampling.scale)
        return keep(x + velocity / sampling.num_steps, (step + 1) / sampling.num_steps), None

    x, _ = jax.lax.scan(advance, noise, jnp.arange(sampling.num_steps))
    return x if known is None else jnp.where(known, tokens, x)
