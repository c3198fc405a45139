"""What the adaLN transformer of transformer.py, with its token table and head, cannot do without: arithmetic and traffic.

Counted as model FLOPs are (PaLM, arXiv 2204.02311, appendix B): a multiplication and an addition are two operations, matmuls
only, nothing recomputed; of the attention only the pairs that the causal mask leaves. A generator whose Config has these
sizes offers the functions without an underscore as its own (docs/contracts.md).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp


class Sizes(Protocol):
    """What is read of a generator's Config."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...


def train_flops(config: Sizes, *, batch_size: int) -> int:
    """Operations of one training step: the forward pass, and twice as many for the gradients of inputs and weights.

    With remat the device does more, which this does not count.
    """
    return 3 * _forward_flops(config, rows=batch_size, conditions=batch_size)


def sample_flops(config: Sizes, *, batch_size: int, guided: bool) -> int:
    """Operations of drawing a batch with a KV cache: every slot passes once, and once more for the null class if guided.

    adaLN sees a class and a step only, so that the null class's modulations are needed once for the whole batch.
    """
    return _forward_flops(config, rows=_rows(batch_size, guided), conditions=batch_size + guided)


def sample_bytes(config: Sizes, *, batch_size: int, guided: bool, dtype: Any = None) -> int:
    """Bytes that drawing a batch must move: weights, the KV cache and adaLN's outputs; other activations are small.

    The weights of the blocks and the head are read once a token. adaLN's are read as often, or, where that is less, once for
    all tokens, and its outputs written and read.

    Args:
      dtype: of the blocks' kernels and the cache, float32 by default; the head and the outputs of adaLN are float32.
    """
    c, slots, item = config, config.num_tokens + 1, jnp.dtype(dtype or "float32").itemsize
    weights = item * c.depth * _block_weights(c) + 4 * c.width * c.codebook_size
    adaln = item * c.depth * 6 * c.width**2 + 4 * 2 * c.width**2
    modulations = 4 * (batch_size + guided) * slots * (6 * c.depth + 2) * c.width
    # Keys and values: each slot is written once, and read by each later one.
    cache = item * _rows(batch_size, guided) * c.depth * 2 * c.width * _pairs(slots)
    return c.num_tokens * weights + min(c.num_tokens * adaln, adaln + 2 * modulations) + cache


def _forward_flops(config: Sizes, *, rows: int, conditions: int) -> int:
    """All slots of `rows` sequences, under so many different sequences of conditioning vectors."""
    c, slots = config, config.num_tokens + 1
    weights = rows * (c.depth * _block_weights(c) + c.width * c.codebook_size)
    weights += conditions * (6 * c.depth + 2) * c.width**2  # adaLN: the blocks' and the final one
    attention = rows * c.depth * 2 * c.width * _pairs(slots)  # queries with keys, weights with values
    return 2 * (slots * weights + attention)


def _rows(batch_size: int, guided: bool) -> int:
    return 2 * batch_size if guided else batch_size


def _block_weights(config: Sizes) -> int:
    """Of qkv, proj, fc1 and fc2."""
    return 4 * config.width**2 + 2 * config.width * config.mlp_width


def _pairs(slots: int) -> int:
    """Pairs of a slot and one that it attends to: itself and those before."""
    return slots * (slots + 1) // 2
