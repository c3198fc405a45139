"""rar_jax: train and sample autoregressive image generators in JAX.

pipeline = rar_jax.load("runs/digits")
images = pipeline.sample([3, 1, 4, 1, 5], seed=0)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rar_jax.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]
__version__ = "0.2.0"

_HOMES = {"Pipeline": "rar_jax.pipeline", "load": "rar_jax.pipeline"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `rar-jax --help` need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rar_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
