"""rar_jax: train and sample autoregressive image generators in JAX.

    pipeline = rar_jax.load("runs/digits")
    images = pipeline.sample([3, 1, 4, 1, 5], seed=0)
"""

from rar_jax.guidance import Guidance
from rar_jax.pipeline import Pipeline, load

__all__ = ["Guidance", "Pipeline", "load"]
__version__ = "0.1.0"
