"""Measure the ceilings of a machine: matmul rate and memory bandwidth."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rar_jax.networks.layers import matmul_precision

# First and largest size: doubled until one run takes long enough to neglect the dispatch.
MATMUL_SIZES, MATMUL_SECONDS = (1024, 16_384), 0.1  # rows of the square matrices
MEMORY_SIZES, MEMORY_SECONDS = (2**28, 2**31), 0.02  # bytes on each device, more than any cache holds
CALLS = 7  # the fastest counts


class Ceilings(NamedTuple):
    """Rates of all devices of a mesh together."""

    flops_per_second: float
    bytes_per_second: float


def measure_ceilings(mesh: Mesh, dtype: Any) -> Ceilings:
    """Measure both rates on all devices at once, in a few seconds.

    dtype: of the matmul, float32 (not TF32) or bfloat16.
    """
    time_matmul = functools.partial(_time_matmul, mesh, jnp.dtype(dtype))
    flops = _find_best_rate(time_matmul, MATMUL_SIZES, MATMUL_SECONDS)
    return Ceilings(flops, _find_best_rate(functools.partial(_time_memory, mesh), MEMORY_SIZES, MEMORY_SECONDS))


def _find_best_rate(measure: Callable[[int], tuple[float, float]], sizes: tuple[int, int], enough: float) -> float:
    """The best rate of growing sizes.

    measure: gives the seconds and the rate of a size.
    """
    best, (size, largest) = 0.0, sizes
    while True:
        seconds, rate = measure(size)
        best = max(best, rate)
        if seconds > enough or size >= largest:
            return best
        size *= 2


def _time_matmul(mesh: Mesh, dtype: Any, size: int) -> tuple[float, float]:
    draw = _on_each(mesh, lambda: jax.random.normal(jax.random.key(0), (size, size), dtype))
    product = _on_each(mesh, lambda a: jnp.matmul(a, a, precision=matmul_precision(dtype)))
    seconds = _fastest(product, draw())
    return seconds, mesh.size * 2 * size**3 / seconds


def _time_memory(mesh: Mesh, size: int) -> tuple[float, float]:
    """The better of reading and copying."""
    array = _on_each(mesh, lambda: jnp.ones((size // 4 // 1024, 1024), jnp.float32))()
    # On a CPU, a product with a vector reads fastest: a sum of each row has half the rate.
    read = _fastest(_on_each(mesh, lambda x: x @ jnp.ones((1024,), jnp.float32)), array)
    copied = _fastest(_on_each(mesh, lambda x: x + 1), array)
    return read, mesh.size * size * max(1 / read, 2 / copied)


def _on_each(mesh: Mesh, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Run a function on every device, each with its part of the first dimension."""
    spec = PartitionSpec(mesh.axis_names)
    # check_vma does not accept a constant that differs from device to device.
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _fastest(function: Callable[[jax.Array], jax.Array], array: jax.Array) -> float:
    jax.block_until_ready(function(array))
    times: list[float] = []
    for _ in range(CALLS):
        began = time.perf_counter()
        jax.block_until_ready(function(array))
        times.append(time.perf_counter() - began)
    return min(times)
