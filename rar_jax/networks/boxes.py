"""Logical axis names of Flax's boxed parameters; `nn.meta.unbox` gives the plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax.core import meta


def logical_axes(boxed_init: Callable[[jax.Array], Any]) -> Any:
    """Return a tuple of axis names per array of `boxed_init(key)`; None is not sharded. Computes nothing."""

    def names(leaf: Any) -> tuple[str | None, ...]:
        return tuple(leaf.names) if isinstance(leaf, meta.Partitioned) else (None,) * leaf.ndim

    boxed = jax.eval_shape(boxed_init, jax.random.key(0))
    return jax.tree.map(names, boxed, is_leaf=lambda leaf: isinstance(leaf, meta.Partitioned))
