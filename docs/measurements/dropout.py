"""Times three sources of dropout bits in turn: python docs/measurements/dropout.py"""

import statistics
import time

import jax
import jax.numpy as jnp

from rar_jax.networks.layers import dropout_bits

SHAPE, RATE, ROUNDS = (128, 50, 768), 0.1, 15


def by_bernoulli(x: jax.Array, key: jax.Array) -> jax.Array:
    """Flax's dropout: bernoulli with the key's own generator."""
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, SHAPE), x / (1 - RATE), 0)


def by_hash(x: jax.Array, key: jax.Array) -> jax.Array:
    """Ours."""
    return jnp.where(dropout_bits(key, SHAPE) >= jnp.uint32(RATE * 2**32), x / (1 - RATE), 0)


ways = {
    "threefry": (jax.jit(by_bernoulli), jax.random.key(0)),
    "XLA's rbg": (jax.jit(by_bernoulli), jax.random.key(0, impl="rbg")),
    "hash (ours)": (jax.jit(by_hash), jax.random.key(0)),
}
x, times = jnp.ones(SHAPE), {name: [] for name in ways}
for _ in range(ROUNDS + 1):
    for name, (function, key) in ways.items():
        start = time.perf_counter()
        function(x, key).block_until_ready()
        times[name].append(time.perf_counter() - start)
for name, seconds in times.items():
    print(f"{name:12} {1e3 * statistics.median(seconds[1:]):8.2f} ms")
