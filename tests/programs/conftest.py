"""Stand-ins for Inception, which takes half a minute to compile."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.evaluation import sums
from rar_jax.evaluation.reference import read_reference
from rar_jax.programs import evaluate, evaluate_steps, live, reconstruct, scoring
from rar_jax.programs.scoring import Network

WIDTHS = {"pool3": ("POOL3", 12), "spatial": ("SPATIAL", 8), "logits": ("CLASSES", 10)}


def projection(params: Any, images: jax.Array, *, resize: str) -> dict[str, jax.Array]:
    """16 averages of the pixels times random numbers."""
    b, y, x, c = images.shape
    pixels = images.astype(jnp.float32).reshape(b, 4, y // 4, 4, x // 4, c).mean(axis=(2, 4, 5)).reshape(b, 16) / 255
    random = np.random.default_rng(5)
    out = {}
    for name, (_, width) in WIDTHS.items():
        weights = jnp.asarray(random.standard_normal((16, width), np.float32))
        out[name] = jnp.matmul(pixels, weights, precision=jax.lax.Precision.HIGHEST)
    return out


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Few features instead of Inception's, fewer than images: everything else is as it is. The function that makes them."""
    for constant, width in WIDTHS.values():
        monkeypatch.setattr(sums, constant, width)
    monkeypatch.setattr(scoring, "features", projection)
    network = Network({"fc": {"kernel": jnp.zeros((1, 1))}}, "0" * 64)
    for module in (evaluate, evaluate_steps, live, reconstruct):
        monkeypatch.setattr(
            module, "read_reference", lambda path: read_reference(path, feature_dims=12, spatial_dims=8)
        )
        monkeypatch.setattr(module, "load_network", lambda path, mesh, settings: network)
    return projection
