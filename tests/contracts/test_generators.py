"""What every file in rar_jax/generators/ must do. A new file is tested the moment it exists."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_tokens

from rar_jax.models import find_module, module_names
from rar_jax.sampling import Guidance


@pytest.fixture(scope="module", params=module_names("generators"))
def generator(request: pytest.FixtureRequest) -> ModuleType:
    return find_module("generators", request.param)


def batch_of(generator: ModuleType, size: int = 4) -> dict[str, jax.Array]:
    config = generator.TINY
    spec = generator.token_spec(config)
    key = jax.random.key(0)
    if spec.vocab is not None:
        tokens = jax.random.randint(key, (size, *spec.shape), 0, spec.vocab)
    else:
        tokens = jax.random.normal(key, (size, *spec.shape), spec.dtype)
    return {"tokens": tokens, "labels": jnp.arange(size) % config.num_classes}


def nonzero(params: Any) -> Any:
    """Layers that start at zero (adaLN) pass no gradient to what is behind them: move everything a little."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_trees_agree(generator: ModuleType) -> None:
    params = generator.init(generator.TINY, jax.random.key(0))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    axes = generator.axes(generator.TINY)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, params)
    mask = generator.decay_mask(generator.TINY)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert all(isinstance(x, bool) for x in jax.tree.leaves(mask)) and any(jax.tree.leaves(mask))


def test_loss_is_finite_and_its_gradient_reaches_every_leaf(generator: ModuleType) -> None:
    config, batch = generator.TINY, batch_of(generator)
    params = nonzero(generator.init(config, jax.random.key(0)))

    def loss(params: Any) -> tuple[jax.Array, Any]:
        return generator.loss(config, params, batch, key=jax.random.key(2), step=0)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value.shape == () and np.isfinite(value) and float(metrics["loss"]) == float(value)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)


def test_evaluation_is_deterministic(generator: ModuleType) -> None:
    config, batch = generator.TINY, batch_of(generator)
    params = nonzero(generator.init(config, jax.random.key(0)))
    a, b = (float(generator.loss(config, params, batch, key=None, step=s)[0]) for s in (0, 0))
    assert a == b != float(generator.loss(config, params, batch, key=jax.random.key(0), step=0)[0])


def test_init_is_a_function_of_the_key(generator: ModuleType) -> None:
    a, b, c = (jax.tree.leaves(generator.init(generator.TINY, jax.random.key(k))) for k in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert any((x != y).any() for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("guidance", [Guidance(0.0), Guidance(2.0, 1.0)])
def test_samples_are_within_the_spec(generator: ModuleType, guidance: Guidance) -> None:
    config = generator.TINY
    params = nonzero(generator.init(config, jax.random.key(0)))
    labels, keys = jnp.asarray([0, 1, 2]), jax.random.split(jax.random.key(5), 3)
    tokens = jax.jit(lambda p: generator.sample(config, p, labels, keys=keys, guidance=guidance))(params)
    spec = generator.token_spec(config)
    assert tokens.shape == (3, *spec.shape) and tokens.dtype == spec.dtype
    if spec.vocab is not None:
        assert int(tokens.min()) >= 0 and int(tokens.max()) < spec.vocab
    prepared = generator.prepare(config, params)
    again = generator.sample(config, prepared, labels, keys=keys, guidance=guidance)
    assert_same_tokens(spec, again, tokens)


def test_given_tokens_stay_and_a_sample_does_not_depend_on_its_batch(generator: ModuleType) -> None:
    config = generator.TINY
    params = nonzero(generator.init(config, jax.random.key(0)))
    labels, keys = jnp.asarray([0, 1, 2]), jax.random.split(jax.random.key(5), 3)
    given = batch_of(generator, 3)["tokens"][:, : generator.token_spec(config).shape[0] // 2]

    def sample(rows: slice) -> jax.Array:
        guidance = Guidance(2.0)
        return generator.sample(config, params, labels[rows], keys=keys[rows], guidance=guidance, prefix=given[rows])

    tokens = sample(slice(None))
    np.testing.assert_array_equal(tokens[:, : given.shape[1]], given)
    assert_same_tokens(generator.token_spec(config), sample(slice(1, 2)), tokens[1:2])
