"""Causal transformer in which each position has its own conditioning vector (adaLN), over whole sequences.

`decoding.py` computes the same one position at a time.

Source: RAR (arXiv 2411.00776), section 3; adaLN from DiT (arXiv 2212.09748). Shape suffixes as in layers.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from rar_jax.networks.layers import Attention, Dense, Mlp, layer_norm, modulate


class Block(nn.Module):
    """x += gate_a Attn(modulate(LN1 x)); x += gate_m MLP(modulate(LN2 x)); modulation = Linear_6D(SiLU(c))."""

    num_heads: int
    mlp_width: int
    dropout: float
    attention_dropout: float
    deterministic: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bnd: jax.Array, c_bnd: jax.Array) -> tuple[jax.Array, None]:
        width, dtype = x_bnd.shape[-1], self.dtype
        modulation_bn6d = Dense((6, width), ("width", None, "modulation"), dtype, zero=True, name="adaln")(c_bnd)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.unstack(modulation_bn6d, axis=2)
        drops = self.dropout, self.deterministic, dtype
        attention = Attention(self.num_heads, self.attention_dropout, *drops, name="attn")
        x_bnd = x_bnd + gate_a * attention(modulate(layer_norm(dtype, "norm1")(x_bnd), shift_a, scale_a))
        mlp = Mlp(self.mlp_width, *drops, name="mlp")
        x_bnd = x_bnd + gate_m * mlp(modulate(layer_norm(dtype, "norm2")(x_bnd), shift_m, scale_m))
        return with_logical_constraint(x_bnd, ("batch", None, None)), None


class Transformer(nn.Module):
    """A stack of blocks: one scan over stacked parameters, whose first dimension is the layer.

    With `unroll` > 1 that many blocks are compiled separately in each iteration of the scan.
    """

    depth: int
    num_heads: int
    mlp_width: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    deterministic: bool = True
    remat: bool = False
    unroll: int = 1
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x_bnd: jax.Array, c_bnd: jax.Array) -> jax.Array:
        """Apply all blocks to whole sequences x_bnd, given the conditioning c_bnd of each position after its SiLU."""
        block = nn.remat(Block, prevent_cse=False) if self.remat and not self.deterministic else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},  # the second: what Flax captures when it is asked to
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.depth,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: None},
        )
        sizes = self.num_heads, self.mlp_width, self.dropout, self.attention_dropout
        return stack(*sizes, self.deterministic, self.dtype, name="blocks")(x_bnd, c_bnd)[0]
