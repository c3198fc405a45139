"""Counts of operations and bytes: against every matmul of the traced program, XLA's own count, and sizes done by hand."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from rar_jax.generators import rar
from rar_jax.sampling import Guidance

RAR_B, RAR_XXL = rar.Config(), rar.Config(width=1408, depth=40, mlp_width=6144)


def matmul_flops(jaxpr: Any, *, trips: Iterator[int] | None = None) -> int:
    """Two for each multiply-add of every dot_general, as often as scans run it, and the sampler's loops over slots, which are
    those with a softmax, as `trips` says in turn. (Its other loops, over tiles of classes, run once for few classes.)"""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[i] for i in contracted]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)
        inner = [x for x in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "while" and "= exp" in str(eqn.params["body_jaxpr"]):
            assert trips is not None
            times = next(trips)
        total += times * sum(matmul_flops(getattr(x, "jaxpr", x), trips=trips) for x in inner)
    return total


def is_jaxpr(x: Any) -> bool:
    return isinstance(x, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr))


def masked_flops(config: rar.Config, rows: int) -> int:
    """Of the attention's two products, for the pairs that the causal mask throws away: networks compute them too."""
    slots = config.num_tokens + 1
    return rows * config.depth * 2 * 2 * config.width * (slots * (slots - 1) // 2)


def train_step(config: rar.Config, rows: int) -> tuple[Any, Any, Any]:
    params = jax.eval_shape(lambda key: rar.init(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, config.num_tokens), jnp.int32)
    batch = {"tokens": tokens, "labels": jax.ShapeDtypeStruct((rows,), jnp.int32)}

    def loss(params: Any, batch: Any) -> Any:
        return rar.loss(config, params, batch, key=jax.random.key(0), step=0)

    return jax.grad(loss, has_aux=True), params, batch


@pytest.mark.parametrize(
    "config", [rar.TINY, dataclasses.replace(rar.TINY, depth=5, width=48, mlp_width=80, num_tokens=25)]
)
def test_a_training_step_has_these_matmuls_and_no_others(config: rar.Config) -> None:
    traced = jax.make_jaxpr(train_step(config, 3)[0])(*train_step(config, 3)[1:])
    assert matmul_flops(traced.jaxpr) == rar.train_flops(config, batch_size=3) + 3 * masked_flops(config, 3)


def test_a_training_step_by_the_count_of_xla() -> None:
    # XLA counts the body of a scan once: hence one layer. It also counts additions, norms, softmax and the update of tables,
    # some ten operations for each number that a matmul makes of 2 x width: at this width 1 % more.
    config = dataclasses.replace(rar.TINY, depth=1, width=512, mlp_width=2048, num_heads=8)
    step, *args = train_step(config, 4)
    counted = jax.jit(step).lower(*args).cost_analysis()["flops"]
    ours = rar.train_flops(config, batch_size=4) + 3 * masked_flops(config, 4)
    assert 1.0 < counted / ours < 1.02, counted / ours


def test_a_forward_pass_in_full() -> None:
    params, tokens = train_step(rar.TINY, 2)[1], jnp.zeros((2, 16), jnp.int32)
    logits = jax.make_jaxpr(lambda p: rar.logits(rar.TINY, p, tokens, tokens[:, 0], tokens))(params)
    needed = rar.sample_flops(rar.TINY, batch_size=2, guided=False)
    assert matmul_flops(logits.jaxpr) == needed + masked_flops(rar.TINY, 2)
    assert rar.train_flops(rar.TINY, batch_size=2) == 3 * needed


@pytest.mark.parametrize("guidance", [Guidance(0.0), Guidance(2.0)])
def test_no_sampler_does_with_less(guidance: Guidance) -> None:
    params, labels, keys = train_step(rar.TINY, 2)[1], jnp.arange(2), jax.random.split(jax.random.key(0), 2)
    sample = jax.make_jaxpr(lambda p: rar.sample(rar.TINY, p, labels, keys=keys, guidance=guidance))(params)
    needed = rar.sample_flops(rar.TINY, batch_size=2, guided=guidance.enabled)
    # Of 17 slots 8 are in the first stage of the cache and 9 in the second; each attends to its whole stage.
    assert needed <= matmul_flops(sample.jaxpr, trips=iter([8, 9])) <= 1.05 * needed


def test_guidance_doubles_the_rows_but_needs_the_null_class_s_modulations_once() -> None:
    guided, double = (rar.sample_flops(RAR_B, batch_size=b, guided=b == 8) for b in (8, 16))
    assert double - guided == 2 * 257 * (16 - 9) * (24 * 6 + 2) * 768**2


@pytest.mark.parametrize(("config", "blocks"), [(RAR_B, 170e6), (RAR_XXL, 1009e6)])
def test_sampling_moves_these_bytes(config: rar.Config, blocks: float) -> None:
    shapes = jax.eval_shape(lambda key: rar.init(config, key), jax.random.key(0))
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="."): x.size
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if path[-1].key == "kernel"
    }
    adaln = sum(size for name, size in kernels.items() if "adaln" in name)
    of_blocks = sum(size for name, size in kernels.items() if name.startswith("transformer") and "adaln" not in name)
    assert of_blocks == pytest.approx(blocks, rel=0.01)
    head, d, depth = kernels["lm_head.kernel"], config.width, config.depth
    # One image of 256 tokens, guided, float32: the weights 256 times, adaLN's once, its outputs for 257 slots and two
    # classes (6 in each block, 2 in the end) there and back, and caches of two rows: slot s reads s others and writes one.
    modulations = 257 * 2 * (6 * depth + 2) * d
    cache = sum(2 * depth * 2 * d * (s + 1) for s in range(257))
    by_hand = 4 * (256 * (of_blocks + head) + adaln + 2 * modulations + cache)
    assert rar.sample_bytes(config, batch_size=1, guided=True) == by_hand
    # In bfloat16 half, but for the head, the final adaLN and the modulations.
    final = kernels["final_adaln.kernel"]
    halves = 2 * (256 * of_blocks + adaln - final + cache) + 4 * (256 * head + final + 2 * modulations)
    assert rar.sample_bytes(config, batch_size=1, guided=True, dtype="bfloat16") == halves


def test_many_images_read_the_weights_of_adaln_at_every_step() -> None:
    # Of a thousand images the modulations are larger than the weights that make them, so those are read instead.
    one, many, more = (rar.sample_bytes(RAR_B, batch_size=b, guided=False) for b in (1, 1000, 1001))
    cache = 4 * 24 * 2 * 768 * (257 * 258 // 2)
    assert more - many == cache
    assert many - 1000 * cache > one - cache + 4 * 254 * 24 * 6 * 768**2
