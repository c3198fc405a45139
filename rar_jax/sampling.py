"""From labels to images in one traceable function: guidance, per-sample keys, generator, tokenizer, rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.config import require
from rar_jax.errors import ConfigError
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


def sample_images(*args: Any, rounding: str = "truncate") -> jax.Array:
    """uint8 images (b, y, x, c) of the given classes; args as of `sample_pixels`; traceable."""
    return to_uint8(sample_pixels(*args), rounding)


def sample_pixels(
    generator: Model,
    tokenizer: Model,
    params: dict[str, Any],
    labels: jax.Array,
    keys: jax.Array,
    guidance: Guidance,
) -> jax.Array:
    """Images (b, y, x, c) of the given classes as the tokenizer decodes them, nominally in [0, 1]; traceable.

    Args:
      params: {"generator": of init or prepare, "tokenizer"}.
      labels: int (b,). keys: typed keys (b,), see `keys.sample_keys`.
    """
    tokens_bn = generator.module.sample(generator.config, params["generator"], labels, keys=keys, guidance=guidance)
    return tokenizer.module.decode(tokenizer.config, params["tokenizer"], tokens_bn)


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


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly sampling follows the class, and how sharp its draws are.

    Attributes:
      scale: guidance scale g. 0 or 1 is no guidance: only the class branch is computed.
      power: 0 holds g from the first step on; p > 0 rises from 1 to g along a cosine of (step / N) ** p.
      temperature: logits are divided by it before the softmax.

    A Guidance may be passed to a jitted function: the numbers are traced, so that a sweep over them compiles
    once, and only whether there is any guidance at all (whether the batch is doubled) is static.
    """

    scale: float
    power: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "power", "temperature"):
            require(abs(getattr(self, name)) < 1e30, f"{name} is {getattr(self, name)}: it must be a number of float32")
        require(self.scale >= 0, f"scale is {self.scale}: it must be 0 (no guidance) or more")
        require(self.power >= 0, f"power is {self.power}: it must be 0 (constant guidance) or more")
        require(self.temperature > 0, f"temperature is {self.temperature}: it must be above 0; for argmax use greedy")

    @property
    def enabled(self) -> bool:
        """Whether the null-class branch is needed; known while tracing."""
        known: bool | None = self.__dict__.get("_enabled")
        return self.scale not in (0, 1) if known is None else known

    def weight(self, step: jax.Array | int, num_steps: int) -> jax.Array:
        """w(s) = 1 + (g - 1) (1 - cos(pi (s / N)^p)) / 2, float32; 0^0 is 1, and w is 1 without guidance.

        Args:
          step: generation step s, 0-based, int32 of any shape.
          num_steps: number of tokens N of one sample.
        """
        share = jnp.asarray(step, jnp.float32) / num_steps
        # (1 - cos x) / 2 = sin^2 (x / 2), which does not cancel for small x.
        rise = jnp.sin(jnp.pi / 2 * share ** jnp.asarray(self.power, jnp.float32)) ** 2
        return 1.0 + (jnp.asarray(self.scale, jnp.float32) - 1.0) * rise if self.enabled else jnp.ones_like(share)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[bool]]:
        """Pytree protocol: the numbers are leaves, `enabled` is static."""
        return (self.scale, self.power, self.temperature), (self.enabled,)

    @classmethod
    def tree_unflatten(cls, aux: tuple[bool], leaves: tuple[Any, ...]) -> Guidance:
        """Pytree protocol: leaves may be tracers, so nothing is checked here."""
        guidance = object.__new__(cls)
        for name, value in zip(("scale", "power", "temperature"), leaves, strict=True):
            object.__setattr__(guidance, name, value)
        object.__setattr__(guidance, "_enabled", aux[0])
        return guidance


def parse_guidance(text: str | None) -> Guidance | None:
    """Return the Guidance of "SCALE[,POWER[,TEMPERATURE]]", None of None."""
    try:
        return Guidance(*(float(x) for x in text.split(","))) if text else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--guidance {text}: give SCALE[,POWER[,TEMPERATURE]] ({error})") from None
