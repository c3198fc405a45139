"""What every file in rar_jax/generators/ must do. A new file is tested the moment it exists."""

import dataclasses
import functools
import math
import typing
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_tokens
from found_models import list_models

from rar_jax.models import find_module


@pytest.fixture(scope="module", params=list_models("generators"))
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
        return generator.loss(config, params, batch, key=jax.random.key(2), step=0, train=True)

    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value.shape == () and np.isfinite(value) and float(aux.metrics["loss"]) == float(value)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in aux.metrics.values())
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), jax.tree_util.keystr(path)
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)


def test_the_loss_is_a_function_of_its_key(generator: ModuleType) -> None:
    """What is random in training must not repeat; a dropped label can be given."""
    config, batch = generator.TINY, batch_of(generator)
    params = nonzero(generator.init(config, jax.random.key(0)))

    @functools.partial(jax.jit, static_argnames="train")
    def loss(batch: Any, key: jax.Array, *, train: bool) -> jax.Array:
        return generator.loss(config, params, batch, key=key, step=0, train=train)[0]

    first, second = jax.random.split(jax.random.key(0))
    for train in (False, True):
        assert float(loss(batch, first, train=train)) == float(loss(batch, first, train=train))
    assert float(loss(batch, first, train=True)) != float(loss(batch, second, train=True))
    kept, dropped = ({**batch, "drop": jnp.full((4,), drop)} for drop in (False, True))
    assert float(loss(kept, first, train=False)) == float(loss(batch, first, train=False))
    null = {**batch, "labels": jnp.full((4,), config.num_classes)}
    assert float(loss(dropped, first, train=False)) == float(loss(null, first, train=False))


def test_init_is_a_function_of_the_key(generator: ModuleType) -> None:
    a, b, c = (jax.tree.leaves(generator.init(generator.TINY, jax.random.key(k))) for k in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert any((x != y).any() for x, y in zip(a, c, strict=True))


def samplings_of(generator: ModuleType) -> list[Any]:
    return [generator.Sampling(), generator.Sampling(scale=2.0)]


@pytest.mark.parametrize("guided", [False, True])
def test_samples_are_within_the_spec(generator: ModuleType, guided: bool) -> None:
    config, sampling = generator.TINY, samplings_of(generator)[guided]
    params = nonzero(generator.init(config, jax.random.key(0)))
    labels, keys = jnp.asarray([0, 1, 2]), jax.random.split(jax.random.key(5), 3)
    sample = jax.jit(lambda p, k: generator.sample(config, p, labels[: len(k)], keys=k, sampling=sampling))
    tokens = sample(params, keys)
    spec = generator.token_spec(config)
    assert tokens.shape == (3, *spec.shape) and tokens.dtype == spec.dtype
    if spec.vocab is not None:
        assert int(tokens.min()) >= 0 and int(tokens.max()) < spec.vocab
    if hasattr(generator, "prepare"):
        assert_same_tokens(spec, sample(generator.prepare(config, params), keys), tokens)
    assert_same_tokens(spec, sample(params, keys[:2]), tokens[:2])  # a sample does not depend on its batch
    assert (np.asarray(sample(params, keys[::-1])) != np.asarray(tokens)).any()


def test_settings_that_are_floats_do_not_recompile(generator: ModuleType) -> None:
    config, compiled = generator.TINY, []
    params = nonzero(generator.init(config, jax.random.key(0)))
    labels, keys = jnp.asarray([0, 1]), jax.random.split(jax.random.key(5), 2)

    @jax.jit
    def sample(sampling: Any) -> jax.Array:
        compiled.append(sampling)
        return generator.sample(config, params, labels, keys=keys, sampling=sampling)

    hints, unguided = typing.get_type_hints(generator.Sampling), generator.Sampling(scale=None)
    sample(unguided)
    floats = [name for name, hint in hints.items() if hint is float]
    for name in floats:
        sample(dataclasses.replace(unguided, **{name: 0.5 * getattr(unguided, name) + 0.25}))
    assert len(compiled) == 1, f"another number of one of {floats} compiled again"
    weak, strong = (np.asarray(sample(dataclasses.replace(unguided, scale=scale))) for scale in (1.5, 6.0))
    assert len(compiled) == 2 and (weak != strong).any()  # None to a number: once


def test_known_tokens_stay(generator: ModuleType) -> None:
    if not hasattr(generator, "complete"):
        return
    config, batch = generator.TINY, batch_of(generator, 3)
    params, keys = nonzero(generator.init(config, jax.random.key(0))), jax.random.split(jax.random.key(5), 3)
    places = generator.token_spec(config).shape[: 1 if generator.token_spec(config).vocab else -1]
    known = np.broadcast_to((np.arange(math.prod(places)) < math.prod(places) // 2).reshape(places), (3, *places))
    tokens = generator.complete(
        config, params, batch["labels"], keys=keys, sampling=generator.Sampling(), tokens=batch["tokens"], known=known
    )
    np.testing.assert_array_equal(tokens[known], batch["tokens"][known])
    assert (np.asarray(tokens)[~known] != np.asarray(batch["tokens"])[~known]).any()
