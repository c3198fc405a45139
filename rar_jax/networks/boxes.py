"""Flax boxes parameters together with their logical axes. The boxes stay in the file that makes them: what leaves it is
a tree of plain arrays, and beside it a tree of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax.core import meta


def unbox(boxed: Any) -> Any:
    """The tree of arrays."""
    return meta.unbox(boxed)


def logical_axes(boxed_init: Callable[[jax.Array], Any]) -> Any:
    """The tree of names, a tuple for each array (None: not sharded), of what `boxed_init(key)` makes; computes nothing."""

    def names(leaf: Any) -> tuple[str | None, ...]:
        return tuple(leaf.names) if isinstance(leaf, meta.Partitioned) else (None,) * leaf.ndim

    boxed = jax.eval_shape(boxed_init, jax.random.key(0))
    return jax.tree.map(names, boxed, is_leaf=lambda leaf: isinstance(leaf, meta.Partitioned))
