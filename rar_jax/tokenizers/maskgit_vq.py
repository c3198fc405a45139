"""The MaskGIT-VQGAN tokenizer: a convolutional autoencoder around a table of codes.

Source: MaskGIT (arXiv 2202.04200), VQ-VAE (arXiv 1711.00937) for the losses and the straight-through gradient, Jukebox
(arXiv 2005.00341) for the restart of dead codes. The released ImageNet file is `Config(image_size=256)`.

Shape suffixes: b batch, n tokens, m all latents of a batch, v codes, z latent width, y height, x width, c channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.config import Steps, require, require_at_least
from rar_jax.models import Aux, TokenSpec
from rar_jax.networks import vqgan
from rar_jax.networks.boxes import logical_axes

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture and loss weights.

    Attributes:
      image_size: side in pixels.
      width_multipliers: one entry per level of `blocks_per_level` residual blocks with base_width * entry channels.
        Each level after the first halves the resolution.
      codebook_size, latent_width: number and width of the codes.
      l1_weight, l2_weight: of the pixel errors.
      codebook_weight, commitment_weight: of the two sides of the quantization error.
      restart_every: replace codes that a batch does not use by its latents every so many steps (0: never), until step
        `restart_until`.
      dtype: of the convolutions; parameters are float32.
    """

    image_size: int
    channels: int = 3
    base_width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    latent_width: int = 256
    codebook_size: int = 1024
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    restart_every: Steps = 0
    restart_until: Steps = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "image_size", "base_width", "blocks_per_level", "latent_width", "codebook_size")
        require_at_least(self, 0, "l1_weight", "l2_weight", "codebook_weight", "commitment_weight")
        require_at_least(self, 0, "restart_every", "restart_until")
        require(self.channels in (1, 3), f"channels is {self.channels}: it must be 1 (grey) or 3 (colour)")
        multipliers = self.width_multipliers
        levels = f"width_multipliers is {multipliers}: give one positive number for each of 1 to 10 levels"
        require(1 <= len(multipliers) <= 10 and min(multipliers) > 0, levels)
        sizes = f"image_size is {self.image_size}: {len(multipliers)} levels need a multiple of {self.downsampling}"
        require(self.image_size % self.downsampling == 0, sizes)
        for width in (self.base_width, *(self.base_width * m for m in multipliers)):
            wide = f"base_width {self.base_width} makes a level {width} wide"
            require(width < 32 or width % 32 == 0, f"{wide}: a width over 32 must be a multiple of 32")
        require(self.dtype in ("float32", "bfloat16"), f"dtype is '{self.dtype}': it must be 'float32' or 'bfloat16'")

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a token."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.image_size // self.downsampling


TINY = Config(
    image_size=8, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8, codebook_size=16,
    restart_every=2, restart_until=10,
)  # fmt: skip


def token_spec(config: Config) -> TokenSpec:
    """One image's tokens: ids (n,) in raster order."""
    return TokenSpec((config.grid**2,), "int32", config.codebook_size)


def image_spec(config: Config) -> jax.ShapeDtypeStruct:
    """Shape and dtype of one image: float32 (H, W, C)."""
    return jax.ShapeDtypeStruct((config.image_size, config.image_size, config.channels), jnp.float32)


# ---------------------------------------------------------------- parameters


def init(config: Config, key: jax.Array) -> Params:
    """Return float32 parameters {"encoder", "decoder", "codebook" (V, Z)}: a nested dict of plain arrays."""
    return nn.meta.unbox(_init_boxed(config, key))


def axes(config: Config) -> Params:
    """Return a tuple of logical axis names (None: not sharded) for each array of `init`."""
    return logical_axes(functools.partial(_init_boxed, config))


def decay_mask(config: Config) -> Params:
    """Return True where weight decay applies: on the kernels of the convolutions."""
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", shapes)


def _encoder(c: Config) -> vqgan.Encoder:
    return vqgan.Encoder(c.base_width, c.width_multipliers, c.blocks_per_level, c.latent_width, jnp.dtype(c.dtype))


def _decoder(c: Config) -> vqgan.Decoder:
    return vqgan.Decoder(c.base_width, c.width_multipliers, c.blocks_per_level, c.channels, jnp.dtype(c.dtype))


def _init_boxed(config: Config, key: jax.Array) -> Params:
    encoder_key, decoder_key, codebook_key = jax.random.split(key, 3)
    # The networks are convolutional: the smallest image has the same parameters as the real one.
    image = jnp.zeros((1, config.downsampling, config.downsampling, config.channels))
    latent = jnp.zeros((1, 1, 1, config.latent_width))
    codebook_init = nn.initializers.variance_scaling(1.0, "fan_out", "uniform")
    return {
        "encoder": _encoder(config).init(encoder_key, image)["params"],
        "decoder": _decoder(config).init(decoder_key, latent)["params"],
        "codebook": codebook_init(codebook_key, (config.codebook_size, config.latent_width)),
    }


# ---------------------------------------------------------------- images and tokens


def latents(config: Config, params: Params, images: jax.Array) -> jax.Array:
    """Return the encoder's output (B, h, w, Z) float32 of images (B, H, W, C), float in [0, 1] or uint8."""
    return jnp.asarray(_encoder(config).apply({"params": params["encoder"]}, _unit(images)), jnp.float32)


def encode(config: Config, params: Params, images: jax.Array) -> jax.Array:
    """Return tokens (B, N) int32, row by row, of images (B, H, W, C), float in [0, 1] or uint8."""
    return vqgan.nearest_codes(params["codebook"], _flat(latents(config, params, images)))


def decode(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """Return images (B, H, W, C) float32 in [0, 1] of tokens (B, N) int32. A token outside the codebook gives NaN."""
    return jnp.clip(decode_unclipped(config, params, tokens), 0.0, 1.0)


def known_tokens(config: Config, pixel_mask: np.ndarray) -> np.ndarray:
    """Return the tokens, bool (N,), of which every pixel of a mask, bool (H, W), is known."""
    side = config.downsampling
    return pixel_mask.reshape(config.grid, side, config.grid, side).all(axis=(1, 3)).reshape(-1)


def decode_unclipped(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """Return the decoder's output (B, H, W, C) float32 as it is; see `decode`."""
    return _reconstruct(config, params, _codes(params["codebook"], tokens))


def _unit(images: jax.Array) -> jax.Array:
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def _flat(latents_byxz: jax.Array) -> jax.Array:
    return latents_byxz.reshape(latents_byxz.shape[0], -1, latents_byxz.shape[-1])


def _codes(codebook_vz: jax.Array, tokens_bn: jax.Array) -> jax.Array:
    # A wrong token must be seen: "fill" makes NaN of it, where plain indexing would clamp it silently.
    return jnp.take(codebook_vz, tokens_bn, axis=0, mode="fill")


def _reconstruct(config: Config, params: Params, codes_bnz: jax.Array) -> jax.Array:
    latents_byxz = codes_bnz.reshape(codes_bnz.shape[0], config.grid, config.grid, config.latent_width)
    return jnp.asarray(_decoder(config).apply({"params": params["decoder"]}, latents_byxz), jnp.float32)


# ---------------------------------------------------------------- training


def loss(
    config: Config,
    params: Params,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array,
    step: jax.Array | int,
    train: bool,
    **_: Any,
) -> tuple[jax.Array, Aux]:
    """Return the training loss of batch["images"] (B, H, W, C), float in [0, 1] or uint8, and metrics.

    Metrics: loss, l1, l2, codebook, psnr (dB, mean over the clipped images), codebook_usage (share of the codes that
    the batch uses), perplexity (of their distribution). Nothing is random.
    """
    del key, step, train
    images = _unit(batch["images"])
    latents_bnz = _flat(latents(config, params, images))
    tokens_bn = vqgan.nearest_codes(params["codebook"], latents_bnz)
    codes_bnz = _codes(params["codebook"], tokens_bn)
    # Straight through: the decoder sees the codes, the encoder gets the gradient of what the decoder saw.
    outputs = _reconstruct(config, params, latents_bnz + jax.lax.stop_gradient(codes_bnz - latents_bnz))

    l1, l2 = jnp.mean(jnp.abs(outputs - images)), jnp.mean(jnp.square(outputs - images))
    codebook = jnp.mean(jnp.square(codes_bnz - jax.lax.stop_gradient(latents_bnz)))
    commitment = jnp.mean(jnp.square(latents_bnz - jax.lax.stop_gradient(codes_bnz)))
    total = config.l1_weight * l1 + config.l2_weight * l2
    total = total + config.codebook_weight * codebook + config.commitment_weight * commitment

    errors_b = jnp.mean(jnp.square(jnp.clip(outputs, 0.0, 1.0) - images), axis=(1, 2, 3))
    counts_v = _counts(config, tokens_bn)
    shares_v = counts_v / tokens_bn.size
    metrics = {
        "loss": total,
        "l1": l1,
        "l2": l2,
        "codebook": codebook,
        "psnr": jnp.mean(-10.0 * jnp.log10(jnp.maximum(errors_b, 1e-10))),
        "codebook_usage": jnp.mean((counts_v > 0).astype(jnp.float32)),
        "perplexity": jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares_v, shares_v))),
    }
    return total, Aux(metrics)


def after_step(
    config: Config,
    params: Params,
    extra: Any,
    batch: Mapping[str, jax.Array],
    *,
    outputs: Any,
    adversary_outputs: Any,
    key: jax.Array,
    step: jax.Array | int,
) -> tuple[Params, Any]:
    """Replace codes that no latent of the batch uses by random latents, every `restart_every` steps.

    Step 0 is one of them, so that the codebook starts where the data is.
    """
    del outputs, adversary_outputs
    if config.restart_every == 0:
        return params, extra

    def restart(codebook_vz: jax.Array) -> jax.Array:
        latents_bnz = _flat(latents(config, params, batch["images"]))
        used_v = _counts(config, vqgan.nearest_codes(codebook_vz, latents_bnz)) > 0
        latents_mz = latents_bnz.reshape(-1, config.latent_width)
        # Without replacement where there are enough latents: of two equal codes one is dead at once.
        few = latents_mz.shape[0] < config.codebook_size
        chosen_v = jax.random.choice(key, latents_mz.shape[0], (config.codebook_size,), replace=few)
        return jnp.where(used_v[:, None], codebook_vz, latents_mz[chosen_v])

    step = jnp.asarray(step)
    due = (step % config.restart_every == 0) & (step < config.restart_until)
    codebook_vz = jax.lax.cond(due, restart, lambda codebook: codebook, jnp.asarray(params["codebook"]))
    return {**params, "codebook": codebook_vz}, extra


def _counts(config: Config, tokens_bn: jax.Array) -> jax.Array:
    """How often each code is used: float32 (V,)."""
    return jnp.zeros((config.codebook_size,), jnp.float32).at[tokens_bn.reshape(-1)].add(1.0)
