"""A tokenizer that is random: what a store keeps is drawn from in the step, as it is when images are encoded there."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.models import Model, TokenSpec, store_spec
from rar_jax.sampling import reconstruct_images
from rar_jax.training.step import with_tokens


def _encode(config: Any, params: Any, images: jax.Array) -> jax.Array:
    mean = images.reshape(images.shape[0], 4) / 255.0 * params["scale"]
    return jnp.concatenate([mean, 0.1 * jnp.ones_like(mean)], axis=1)


def _draw(config: Any, stored: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    mean, std = jnp.split(stored.astype(jnp.float32), 2, axis=1)
    return mean if key is None else mean + std * jax.random.normal(key, mean.shape)


POSTERIOR = types.SimpleNamespace(
    token_spec=lambda config: TokenSpec((4,), "float32"),
    store_spec=lambda config: TokenSpec((8,), "float16"),
    encode=_encode,
    draw=_draw,
    decode=lambda config, params, tokens: (tokens / params["scale"]).reshape(-1, 2, 2, 1),
)
TOKENIZER = Model(POSTERIOR, None)  # pyright: ignore[reportArgumentType]
PARAMS = {"scale": jnp.float32(3.0)}


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 2, 2, 1), np.uint8)


def test_stored_and_on_the_fly_are_the_same(images: np.ndarray) -> None:
    labels, key = jnp.arange(6), jax.random.key(1)
    stored = _encode(None, PARAMS, jnp.asarray(images)).astype(store_spec(TOKENIZER).dtype)  # as a store keeps it
    drawn = [
        with_tokens(TOKENIZER, params, {"labels": labels, **batch}, key=key)
        for params, batch in ((PARAMS, {"images": images}), (None, {"tokens": stored}))
    ]
    assert all(sorted(batch) == ["labels", "tokens"] for batch in drawn)
    np.testing.assert_array_equal(drawn[0]["tokens"], drawn[1]["tokens"])
    mean = stored[:, :4].astype(np.float32)
    noise = np.asarray(drawn[0]["tokens"] - mean) / 0.1
    assert 0.5 < noise.std() < 1.5
    other = with_tokens(TOKENIZER, None, {"tokens": stored}, key=jax.random.key(2))["tokens"]
    assert not np.array_equal(other, drawn[0]["tokens"])
    np.testing.assert_array_equal(with_tokens(TOKENIZER, None, {"tokens": stored})["tokens"], mean)


def test_reconstructions_draw_nothing(images: np.ndarray) -> None:
    found, tokens = reconstruct_images(TOKENIZER, PARAMS, jnp.asarray(images), rounding="round")
    np.testing.assert_array_equal(found, images)
    assert tokens.shape == (6, 4)


def test_ids_are_widened() -> None:
    ids = types.SimpleNamespace(token_spec=lambda config: TokenSpec((3,), "int32", 70_000))
    tokenizer = Model(ids, None)  # pyright: ignore[reportArgumentType]
    assert store_spec(tokenizer) == TokenSpec((3,), "uint32", 70_000)
    tokens = with_tokens(tokenizer, None, {"tokens": np.array([[0, 5, 69_999]], np.uint32)})["tokens"]
    assert tokens.dtype == jnp.int32 and tokens.tolist() == [[0, 5, 69_999]]
    assert with_tokens(None, None, {"tokens": ids}) == {"tokens": ids}
