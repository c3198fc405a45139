"""Measure the ceilings of a machine: the rate of a large matmul and the bandwidth of memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rar_jax.networks.layers import matmul_precision

MATMUL_SIZES = (1024, 16_384)  # rows of the square matrices: doubled from the first until one product is long enough
MEMORY_SIZES = (2**28, 2**31)  # bytes on each device, likewise; far more than any cache holds
MATMUL_SECONDS, MEMORY_SECONDS = 0.1, 0.02  # long enough to neglect the dispatch
CALLS = 7  # the fastest counts


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of all devices of a mesh together."""

    flops_per_second: float
    bytes_per_second: float

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of each rate."""
        return Ceilings(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


def measure_ceilings(mesh: Mesh, dtype: Any) -> Ceilings:
    """Measure both rates on all devices at once, in a few seconds. dtype: of the matmul, float32 (not TF32) or bfloat16."""
    return Ceilings(_matmul_rate(mesh, jnp.dtype(dtype)), _bandwidth(mesh))


def _matmul_rate(mesh: Mesh, dtype: Any) -> float:
    best, (size, largest) = 0.0, MATMUL_SIZES
    while True:
        draw = _on_each(mesh, lambda: jax.random.normal(jax.random.key(0), (size, size), dtype))  # noqa: B023
        product = _on_each(mesh, lambda a: jnp.matmul(a, a, precision=matmul_precision(dtype)))
        seconds = _fastest(product, draw())
        best = max(best, mesh.size * 2 * size**3 / seconds)
        if seconds > MATMUL_SECONDS or size >= largest:
            return best
        size *= 2


def _bandwidth(mesh: Mesh) -> float:
    """The better of reading and copying."""
    best, (size, largest) = 0.0, MEMORY_SIZES
    while True:
        array = _on_each(mesh, lambda: jnp.ones((size // 4 // 1024, 1024), jnp.float32))()  # noqa: B023
        # On a CPU, a product with a vector reads fastest: a sum of each row has half the rate.
        read = _fastest(_on_each(mesh, lambda x: x @ jnp.ones((1024,), jnp.float32)), array)
        copied = _fastest(_on_each(mesh, lambda x: x + 1), array)
        best = max(best, mesh.size * size / read, mesh.size * 2 * size / copied)
        if read > MEMORY_SECONDS or size >= largest:
            return best
        size *= 2


def _on_each(mesh: Mesh, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Run a function on every device, each with its own arrays, stacked along the first dimension."""
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
