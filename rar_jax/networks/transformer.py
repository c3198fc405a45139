"""Causal transformer whose every slot is modulated by its own conditioning vector (adaLN), with an optional KV cache.

Source: RAR (arXiv 2411.00776), section 3; adaLN from DiT (arXiv 2212.09748). Shape suffixes as in layers.py, and
l layers, m cached slots.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from rar_jax.networks.layers import Attention, Dense, Mlp, layer_norm, modulate

Cache = tuple[jax.Array, jax.Array]  # keys and values, each (l, b, m, h, k)


class Block(nn.Module):
    """x += gate_a Attn(modulate(LN1 x)); x += gate_m MLP(modulate(LN2 x)); modulation = Linear_6D(SiLU(c))."""

    num_heads: int
    mlp_width: int
    dropout: float
    attention_dropout: float
    deterministic: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_bnd: jax.Array, c_bnd: jax.Array, cache: Cache | None, start: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        width, dtype = x_bnd.shape[-1], self.dtype
        modulation_bn6d = Dense((6, width), ("width", None, "modulation"), dtype, zero=True, name="adaln")(c_bnd)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.unstack(modulation_bn6d, axis=2)
        attention = Attention(
            self.num_heads, self.attention_dropout, self.dropout, self.deterministic, dtype, name="attn"
        )
        h_bnd, new = attention(modulate(layer_norm(dtype, "norm1")(x_bnd), shift_a, scale_a), cache, start)
        x_bnd = x_bnd + gate_a * h_bnd
        mlp = Mlp(self.mlp_width, self.dropout, self.deterministic, dtype, name="mlp")
        h_bnd = mlp(modulate(layer_norm(dtype, "norm2")(x_bnd), shift_m, scale_m))
        x_bnd = x_bnd + gate_m * h_bnd
        return with_logical_constraint(x_bnd, ("batch", None, None)), new


class Transformer(nn.Module):
    """A stack of blocks as one scan over stacked parameters (first dimension: layer), so that compiling one is
    compiling all."""

    depth: int
    num_heads: int
    mlp_width: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    deterministic: bool = True
    remat: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self, x_bnd: jax.Array, c_bnd: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Runs n slots through all blocks.

        Args:
          x_bnd: inputs, compute dtype. c_bnd: conditioning after its SiLU, one vector a slot.
          cache: keys and values of earlier slots with room for these; None means x is the whole sequence.
          start: place of the first slot of x in the cache.

        Returns: outputs (b, n, d), and the cache with the new slots written (None if none was given).
        """
        block = nn.remat(Block, prevent_cse=False) if self.remat and not self.deterministic else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast if cache is None else 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: None},
        )
        blocks = stack(
            self.num_heads,
            self.mlp_width,
            self.dropout,
            self.attention_dropout,
            self.deterministic,
            self.dtype,
            name="blocks",
        )
        x_bnd, new = blocks(x_bnd, c_bnd, cache, start)
        if cache is not None:
            # Only the new slots leave the scan: were the whole cache its output, every step would copy it.
            cache = jax.tree.map(lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part, start, 2), cache, new)
        return x_bnd, cache
