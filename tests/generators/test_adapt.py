"""Weights made to fit other classes and another grid, against an interpolation written out in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import ConfigError
from rar_jax.generators import rar

OTHER = dataclasses.replace(rar.TINY, num_tokens=16, num_classes=10)


def random_params(config: rar.Config, seed: int) -> rar.Params:
    params = rar.init(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): cubic interpolation between pixel centres, widened where it shrinks, weights summing to 1."""
    scale = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = keys_cubic((centres[:, None] - np.arange(old)[None, :]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("tokens", [9, 25, 36, 64])
def test_another_grid(tokens: int) -> None:
    config = dataclasses.replace(OTHER, num_tokens=tokens)
    other = random_params(OTHER, 1)
    out = rar.adapt(config, rar.init(config, jax.random.key(2)), other_config=OTHER, other_params=other)
    shapes = jax.eval_shape(lambda: rar.init(config, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(lambda x: x.shape, shapes)
    matrix = resize_matrix(4, int(tokens**0.5))
    for name in ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings"):
        old = np.asarray(other[name], np.float64)
        grid = np.einsum("iy,jx,yxd->ijd", matrix, matrix, old[2:].reshape(4, 4, -1))
        np.testing.assert_allclose(out[name][2:], grid.reshape(tokens, -1), atol=2e-6)
        np.testing.assert_array_equal(out[name][:2], other[name][:2])
    for name in ("transformer", "lm_head", "final_adaln", "embeddings", "cls_token"):
        assert jax.tree.all(jax.tree.map(np.array_equal, out[name], other[name]))


@pytest.mark.parametrize("classes", [3, 12])
def test_other_classes(classes: int) -> None:
    config = dataclasses.replace(OTHER, num_classes=classes)
    other, fresh = random_params(OTHER, 1), random_params(config, 2)
    out = rar.adapt(config, fresh, other_config=OTHER, other_params=other)
    table, codes = out["embeddings"], OTHER.codebook_size + 1
    assert table.shape == (codes + classes + 1, OTHER.width)
    np.testing.assert_array_equal(table[:codes], other["embeddings"][:codes])
    np.testing.assert_array_equal(table[codes:-1], fresh["embeddings"][codes:-1])
    np.testing.assert_array_equal(table[-1], other["embeddings"][-1])
    # The null class is taken over: what it predicts without a class has not changed.
    tokens = jax.random.randint(jax.random.key(3), (2, 16), 0, 32)
    orders = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    before = rar.logits(OTHER, other, tokens, jnp.full(2, 10), orders)
    after = rar.logits(config, out, tokens, jnp.full(2, classes), orders)
    np.testing.assert_array_equal(before, after)


def test_the_same_sizes_are_the_same_weights() -> None:
    other = random_params(OTHER, 1)
    out = rar.adapt(OTHER, random_params(OTHER, 2), other_config=OTHER, other_params=other)
    assert jax.tree.all(jax.tree.map(np.array_equal, out, other))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 64}, r"init_from has width 32, config\.generator\.width is 64: make them equal"),
        ({"depth": 3}, "init_from has depth 2"),
        ({"num_heads": 2}, "init_from has num_heads 4"),
        ({"codebook_size": 64}, "init_from has codebook_size 32"),
        ({"num_tokens": 12}, "init_from has 16 tokens, not 12: both must be squares"),
    ],
)
def test_what_cannot_fit(change: dict[str, int], says: str) -> None:
    config = dataclasses.replace(OTHER, **change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=says):
        rar.adapt(config, rar.init(config, jax.random.key(0)), other_config=OTHER, other_params=random_params(OTHER, 1))
