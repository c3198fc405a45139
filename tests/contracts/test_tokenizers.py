"""What every file in rar_jax/tokenizers/ must do. A new file is tested the moment it exists."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_tokens
from found_models import list_models

from rar_jax.models import Model, TokenSpec, encode_tokens, find_module, store_spec


@pytest.fixture(scope="module", params=list_models("tokenizers"))
def tokenizer(request: pytest.FixtureRequest) -> ModuleType:
    return find_module("tokenizers", request.param)


def images_of(tokenizer: ModuleType, size: int = 4) -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (size, *tokenizer.image_spec(tokenizer.TINY).shape))


def test_trees_agree(tokenizer: ModuleType) -> None:
    params = tokenizer.init(tokenizer.TINY, jax.random.key(0))
    ranks = jax.tree.map(len, tokenizer.axes(tokenizer.TINY), is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, params)
    mask = tokenizer.decay_mask(tokenizer.TINY)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert all(isinstance(x, bool) for x in jax.tree.leaves(mask))


def test_encode_and_decode_keep_the_spec(tokenizer: ModuleType) -> None:
    config, images = tokenizer.TINY, images_of(tokenizer)
    params = tokenizer.init(config, jax.random.key(0))
    model, spec, stored = (
        Model(tokenizer, config),
        tokenizer.token_spec(config),
        tokenizer.encode(config, params, images),
    )
    assert stored.shape == (4, *store_spec(model).shape)
    # The batch an image is encoded in does not matter.
    as_encoded = TokenSpec(stored.shape[1:], str(stored.dtype), spec.vocab)
    assert_same_tokens(as_encoded, tokenizer.encode(config, params, images[1:2])[0], stored[1])
    tokens = encode_tokens(model, params, images)
    assert tokens.shape == (4, *spec.shape) and tokens.dtype == spec.dtype
    if spec.vocab is not None:
        assert int(tokens.min()) >= 0 and int(tokens.max()) < spec.vocab
    decoded = tokenizer.decode(config, params, tokens)
    assert decoded.shape == images.shape and decoded.dtype == jnp.float32 and np.isfinite(decoded).all()


def test_tokens_are_drawn_by_the_key_alone(tokenizer: ModuleType) -> None:
    """Without a key, what `draw` returns is deterministic; tokenizers without `draw` ignore the key."""
    model, params = Model(tokenizer, tokenizer.TINY), tokenizer.init(tokenizer.TINY, jax.random.key(0))
    keys = (None, None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    a, b, c, d, e = (np.asarray(encode_tokens(model, params, images_of(tokenizer), key=key)) for key in keys)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(c, d)
    assert np.array_equal(a, c) == np.array_equal(c, e) == (not hasattr(tokenizer, "draw"))


def test_a_pixel_belongs_to_one_token(tokenizer: ModuleType) -> None:
    if not hasattr(tokenizer, "known_tokens"):
        return
    config = tokenizer.TINY
    height, width, _ = tokenizer.image_spec(config).shape
    unknown = np.zeros(tokenizer.known_tokens(config, np.ones((height, width), bool)).shape, int)
    for y in range(height):
        for x in range(width):
            mask = np.ones((height, width), bool)
            mask[y, x] = False
            unknown += ~tokenizer.known_tokens(config, mask)
    assert unknown.sum() == height * width and (unknown > 0).all()
    assert unknown.shape == tokenizer.token_spec(config).shape[: unknown.ndim]


def test_latents_may_be_rounded_and_ids_may_not() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 16, 4)).astype(np.float32)
    one = np.arange(latents.size).reshape(latents.shape) == 70
    ids, latent_spec, id_spec = np.arange(32), TokenSpec((16, 4), "float32"), TokenSpec((16,), "int64", 32)
    assert_same_tokens(id_spec, ids, ids)
    assert_same_tokens(latent_spec, latents + np.float32(1e-5) * one, latents)
    wrong = latents + np.float32(1e-3) * one, latents[::-1], latents.astype(np.float64), np.full_like(latents, np.nan)
    for spec, ours, theirs in (*((latent_spec, x, latents) for x in wrong), (id_spec, ids + (ids == 3), ids)):
        with pytest.raises(AssertionError):
            assert_same_tokens(spec, ours, theirs)


def test_loss_trains(tokenizer: ModuleType) -> None:
    """Where there is a loss: finite, its gradient reaches every leaf, and following it lowers it."""
    if not hasattr(tokenizer, "loss"):
        return
    config = tokenizer.TINY
    batch = {"images": images_of(tokenizer), "labels": jnp.zeros((4,), jnp.int32)}
    params = tokenizer.init(config, jax.random.key(0))
    if hasattr(tokenizer, "after_step"):  # puts the codebook where the data is
        rest = {"outputs": None, "adversary_outputs": None, "key": jax.random.key(1), "step": jnp.int32(0)}
        params, _ = tokenizer.after_step(config, params, {}, batch, **rest)

    def loss(params: Any) -> jax.Array:
        return tokenizer.loss(config, params, batch, key=jax.random.key(2), step=0, train=True)[0]

    grad = jax.jit(jax.value_and_grad(loss))
    before, grads = grad(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    for _ in range(20):
        _, grads = grad(params)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
    assert float(grad(params)[0]) < float(before)
