"""What a machine can do at most, measured: the rate of a large matmul and the bandwidth of memory; and what a computation needs."""

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
MATMUL_SECONDS, MEMORY_SECONDS = 0.1, 0.02  # long enough for the dispatch not to count
CALLS = 7  # the fastest counts: a ceiling is what is possible


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a computation cannot do without: operations (a multiply-add is two) and bytes moved to or from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of all devices of a mesh together."""

    flops_per_second: float
    bytes_per_second: float

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))

    def limit(self, cost: Cost) -> tuple[float, str]:
        """The seconds that a computation takes at least, and what they go into: "flops" or "bytes"."""
        return max((cost.flops / self.flops_per_second, "flops"), (cost.bytes / self.bytes_per_second, "bytes"))


def measure_ceilings(mesh: Mesh, dtype: Any) -> Ceilings:
    """Measures both, all devices at once, in a few seconds.

    Args:
      dtype: of the matmul, float32 (which means float32: no TF32) or bfloat16.
    """
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
    """The better of reading and of copying."""
    best, (size, largest) = 0.0, MEMORY_SIZES
    while True:
        array = _on_each(mesh, lambda: jnp.ones((size // 4 // 1024, 1024), jnp.float32))()  # noqa: B023
        # As a product with a vector: of what XLA offers, this reads fastest on a CPU (a sum of each row at half the rate).
        read = _fastest(_on_each(mesh, lambda x: x @ jnp.ones((1024,), jnp.float32)), array)
        copied = _fastest(_on_each(mesh, lambda x: x + 1), array)
        best = max(best, mesh.size * size / read, mesh.size * 2 * size / copied)
        if read > MEMORY_SECONDS or size >= largest:
            return best
        size *= 2


def _on_each(mesh: Mesh, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Runs a function of arrays on every device, each with arrays of its own (stacked along the first dimension)."""
    spec = PartitionSpec(mesh.axis_names)
    # check_vma would want to be told that a constant differs from device to device.
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _fastest(function: Callable[[jax.Array], jax.Array], array: jax.Array) -> float:
    jax.block_until_ready(function(array))
    times: list[float] = []
    for _ in range(CALLS):
        began = time.perf_counter()
        jax.block_until_ready(function(array))
        times.append(time.perf_counter() - began)
    return min(times)
