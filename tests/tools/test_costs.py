"""FLOPs and bytes of traced programs: against closed formulas for RAR, and against products counted by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rar_jax.errors import TripCountError
from rar_jax.generators import rar
from rar_jax.generators.rar import Sampling
from rar_jax.keys import sample_keys
from rar_jax.tools.costs import Cost, count_costs

RAR_B, UNGUIDED, GUIDED = rar.Config(), Sampling(), Sampling(2.0)


def count(function: Any, *args: Any) -> Cost:
    return count_costs(jax.make_jaxpr(function)(*args))


# ---------------------------------------------------------------- RAR, by closed formulas


def block_weights(c: rar.Config) -> int:
    """Of qkv, proj, fc1 and fc2 in all blocks."""
    return c.depth * (4 * c.width**2 + 2 * c.width * c.mlp_width)


def adaln_weights(c: rar.Config) -> int:
    return (6 * c.depth + 2) * c.width**2


def forward_flops(c: rar.Config, rows: int, conditions: int, pairs: int) -> int:
    """Of `rows` sequences that attend to so many pairs of positions, and so many sequences of conditioning vectors."""
    positions = c.num_tokens + 1
    weights = rows * (block_weights(c) + c.width * c.codebook_size) + conditions * adaln_weights(c)
    return 2 * positions * weights + 2 * rows * c.depth * 2 * c.width * pairs


def causal_pairs(c: rar.Config) -> int:
    return (c.num_tokens + 1) * (c.num_tokens + 2) // 2


def sampling_bytes(c: rar.Config, batch: int, guided: bool) -> int:
    """The least that drawing a batch moves, in float32: weights once a token, the cache, adaLN's weights and outputs once."""
    weights = c.num_tokens * (block_weights(c) + c.width * c.codebook_size)
    modulations = 2 * (batch + guided) * (c.num_tokens + 1) * (6 * c.depth + 2) * c.width
    cache = batch * (1 + guided) * c.depth * 2 * c.width * causal_pairs(c)
    return 4 * (weights + min(c.num_tokens * adaln_weights(c), adaln_weights(c) + modulations) + cache)


def param_shapes(config: rar.Config) -> Any:
    return jax.eval_shape(functools.partial(rar.init, config), jax.random.key(0))


@pytest.mark.parametrize(
    "config", [rar.TINY, dataclasses.replace(rar.TINY, depth=5, width=48, mlp_width=80, num_tokens=25), RAR_B]
)
def test_a_training_step(config: rar.Config) -> None:
    tokens = jax.ShapeDtypeStruct((4, config.num_tokens), jnp.int32)
    batch = {"tokens": tokens, "labels": jax.ShapeDtypeStruct((4,), jnp.int32)}

    def loss(params: Any, batch: Any) -> Any:
        return rar.loss(config, params, batch, key=jax.random.key(0), step=0, train=True)[0]

    params = param_shapes(config)
    step = count(jax.grad(loss), params, batch)
    # The network computes the scores that the causal mask discards, too.
    assert step.flops == 3 * forward_flops(config, 4, 4, (config.num_tokens + 1) ** 2)
    assert count(loss, params, batch).flops == step.flops / 3
    if config == RAR_B:
        assert step.flops == pytest.approx(3 * forward_flops(config, 4, 4, causal_pairs(config)), rel=0.02)
    sizes = sum(4 * x.size for x in jax.tree.leaves(params))
    assert step.bytes == 2 * sizes + 4 * 4 * (config.num_tokens + 1)  # parameters, gradients and the batch


def test_remat_computes_blocks_again() -> None:
    def flops(remat: bool) -> float:
        config = dataclasses.replace(rar.TINY, remat=remat)
        batch = {"tokens": jnp.zeros((4, 16), jnp.int32), "labels": jnp.zeros(4, jnp.int32)}
        loss = functools.partial(rar.loss, config, batch=batch, key=jax.random.key(0), step=0, train=True)
        return count(jax.grad(loss, has_aux=True), param_shapes(config)).flops

    blocks = 2 * 4 * 17 * (block_weights(rar.TINY) + 2 * 6 * 32**2) + 2 * 4 * 2 * 2 * 32 * 17**2
    assert 0.5 * blocks < flops(True) - flops(False) <= blocks


@pytest.mark.parametrize("sampling", [UNGUIDED, GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    ("config", "batch", "ends", "periods", "within"),
    [
        (rar.TINY, 2, (8, 17), (8, 9), None),
        (RAR_B, 1, (257,), (52,) * 5, 0.024),
        (RAR_B, 8, (128, 257), (64, 64, 43, 43, 43), 0.02),
        (RAR_B, 32, (85, 171, 257), (29,) * 9, 0.02),
    ],
    ids=["tiny", "rar_b-1", "rar_b-8", "rar_b-32"],
)
def test_sampling(
    config: rar.Config,
    batch: int,
    ends: tuple[int, ...],
    periods: tuple[int, ...],
    within: float | None,
    sampling: Sampling,
) -> None:
    """Against what the sampler executes, and for RAR-B against the least that it must.

    Args:
      ends: of the stages of the cache, each of which attention reads as a whole. periods: so many positions are modulated
        at a time. within: of the least.
    """
    params = jax.eval_shape(functools.partial(rar.prepare, config), param_shapes(config))
    labels, guided = jax.ShapeDtypeStruct((batch,), jnp.int32), sampling.scale is not None

    def sample(params: Any, labels: jax.Array) -> jax.Array:
        return rar.sample(config, params, labels, keys=sample_keys(0, jnp.arange(batch)), sampling=sampling)

    cost, rows, conditions = count(sample, params, labels), batch * (1 + guided), batch + guided
    pairs = sum((end - begin) * end for begin, end in zip((0, *ends), ends, strict=False))
    padded = 2 * conditions * (sum(periods) - config.num_tokens - 1) * adaln_weights(config)
    assert cost.flops == forward_flops(config, rows, conditions, pairs) + padded
    matmuls = block_weights(config) + config.width * config.codebook_size
    read_in_loops = matmuls + adaln_weights(config)
    once = sum(x.size for x in jax.tree.leaves(params)) - read_in_loops + batch * (1 + config.num_tokens)
    weights = (config.num_tokens + 1) * matmuls
    cache = rows * config.depth * 2 * config.width * causal_pairs(config)
    assert cost.bytes == 4 * (once + weights + cache + len(periods) * (1 + guided) * adaln_weights(config))
    if within is not None:
        assert cost.flops == pytest.approx(forward_flops(config, rows, conditions, causal_pairs(config)), rel=within)
        assert cost.bytes == pytest.approx(sampling_bytes(config, batch, guided), rel=0.02)


@pytest.mark.parametrize("config", [rar.TINY, RAR_B], ids=["tiny", "rar_b"])
def test_scanned_layers_cost_what_unrolled_ones_do(config: rar.Config) -> None:
    def count_form(scanned: bool) -> Cost:
        params = jax.eval_shape(functools.partial(rar.prepare, config, scanned=scanned), param_shapes(config))
        keys = sample_keys(0, jnp.arange(8))
        return count(functools.partial(rar.sample, config, labels=jnp.arange(8), keys=keys, sampling=GUIDED), params)

    scanned, unrolled = count_form(True), count_form(False)
    assert scanned.flops == unrolled.flops
    # The position that a step writes counts as half filled in every layer of the stack, not in one.
    assert scanned.bytes == pytest.approx(unrolled.bytes, rel=0.015)


def test_a_cache_in_bfloat16_moves_half_the_bytes() -> None:
    def moved(dtype: str) -> float:
        params = jax.eval_shape(functools.partial(rar.prepare, rar.TINY, dtype=dtype), param_shapes(rar.TINY))
        keys = sample_keys(0, jnp.arange(2))
        sample = functools.partial(rar.sample, rar.TINY, labels=jnp.arange(2), keys=keys, sampling=UNGUIDED)
        return count(sample, params).bytes

    c, halves = rar.TINY, 17 * block_weights(rar.TINY) + 2 * 2 * 2 * 32 * causal_pairs(rar.TINY)
    assert moved("float32") - moved("bfloat16") == 2 * (halves + 2 * c.depth * 6 * c.width**2)


# ---------------------------------------------------------------- programs by hand


def multiply(weights: jax.Array, x: jax.Array) -> jax.Array:
    return x @ weights


@pytest.mark.parametrize(("steps", "runs"), [(3, 0 + 1 + 2), (6, 0 + 1 + 2 + 3 + 3 + 3)])
def test_bounds_that_depend_on_an_outer_loop(steps: int, runs: int) -> None:
    def inner(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: x @ x, x)

    whole = functools.partial(jax.lax.fori_loop, 0, steps, lambda i, x: inner(x, jnp.minimum(i, 3)))
    assert count(whole, jnp.ones((4, 4))).flops == runs * 2 * 4**3


def test_bounds_that_depend_on_data() -> None:
    def whole(x: jax.Array, n: jax.Array, most: int | None) -> jax.Array:
        bound = n if most is None else jnp.minimum(n * n, most)
        return jax.lax.fori_loop(0, bound, lambda _, x: x @ x, x)

    assert count(functools.partial(whole, most=7), jnp.ones((4, 4)), 3).flops == 7 * 2 * 4**3
    with pytest.raises(TripCountError):
        count(functools.partial(whole, most=None), jnp.ones((4, 4)), 3)
    with pytest.raises(TripCountError):
        count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.ones((4, 4)))


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, lambda f: lambda *x: jax.lax.cond(x[1].sum() > 0, f, lambda w, x: x, *x)]
)
def test_calls_count_as_what_they_call(wrap: Any) -> None:
    weights, x = jnp.ones((8, 8)), jnp.ones((2, 8))
    assert count(wrap(multiply), weights, x) == count(multiply, weights, x) == (2 * 2 * 8 * 8, 4 * (64 + 16 + 16))


def test_weights_count_in_every_turn_unless_turns_are_independent() -> None:
    weights, x = jnp.ones((8, 8)), jnp.ones((5, 2, 8))

    def chain(weights: jax.Array, x: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, x: (carry @ weights + x, None), x[0], x)[0]

    def independent(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.map(functools.partial(multiply, weights), x)

    flops = 5 * 2 * 2 * 8 * 8
    assert count(chain, weights, x) == (flops, 4 * (5 * 16 + 16 + 5 * (64 + 16)))
    assert count(independent, weights, x) == (flops, 4 * (64 + 5 * 16 + 5 * 16))


@pytest.mark.parametrize(
    ("stride", "padding", "spread", "groups"), [(1, "SAME", 1, 1), (2, "VALID", 1, 1), (1, "SAME", 2, 2)]
)
def test_convolutions(stride: int, padding: str, spread: int, groups: int) -> None:
    image, kernel = jnp.ones((2, 9, 7, 4)), jnp.ones((3, 3, 4 // groups, 6))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(stride, stride), padding=padding, rhs_dilation=(spread, spread),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    # Of ones, the sum is the number of products that meet the image and not the padding. Each gradient has as many products.
    products = float(convolve(image, kernel).sum())
    assert count(convolve, image, kernel).flops == 2 * products
    gradient = jax.grad(lambda image, kernel: convolve(image, kernel).sum(), argnums=(0, 1))
    assert count(gradient, image, kernel).flops == 3 * 2 * products
