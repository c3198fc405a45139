"""Memory is predicted from the compiled program, and a batch that does not fit is refused before it is run."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rar_jax.errors import ConfigError
from rar_jax.parallel import memory
from rar_jax.parallel.mesh import MeshConfig, make_mesh


def compiled(rows: int) -> Any:
    """A program whose only large arrays are its result, 8 bytes a row, and one of 4 KiB a row on the way to it."""
    square = jax.jit(lambda x: jnp.sort(x[:, None] * jnp.arange(1024.0)[None], axis=1)[:, :2])
    return square.lower(jax.ShapeDtypeStruct((rows,), jnp.float32)).compile()


def test_what_is_needed_grows_with_the_rows() -> None:
    few, many = memory.needed(compiled(1000)), memory.needed(compiled(3000))
    assert 2000 * (4096 + 8) <= many - few <= 2000 * 2.1 * (4096 + 8)


def test_free_is_a_part_of_the_machine() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    free = memory.free(jax.devices()[0])
    assert free is not None and 0 < free <= total / jax.local_device_count()


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(4000)
    monkeypatch.setattr(memory, "free", lambda device: memory.needed(program))
    memory.check(program, 4000)
    monkeypatch.setattr(memory, "free", lambda device: memory.needed(program) // 3)
    with pytest.raises(ConfigError, match=r"batch_size 4000 takes .* GiB on each device, .* are free") as caught:
        memory.check(program, 4000, divisor=16)
    fits = int(re.findall(r"give batch_size (\d+)", str(caught.value))[0])
    assert fits % 16 == 0
    assert 1000 < fits < 4000 / 3
    memory.check(compiled(fits), fits)
    monkeypatch.setattr(memory, "free", lambda device: 10)
    with pytest.raises(ConfigError, match="choose a smaller model, more devices"):
        memory.check(program, 4000)


def test_arrays_that_do_not_fit_are_refused_by_what_one_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(MeshConfig(1, 4, 1))
    tree = {"cut": jax.ShapeDtypeStruct((8, 100), jnp.float32), "whole": jax.ShapeDtypeStruct((50,), jnp.bfloat16)}
    at = {"cut": NamedSharding(mesh, PartitionSpec("fsdp")), "whole": NamedSharding(mesh, PartitionSpec())}
    monkeypatch.setattr(memory, "free", lambda device: 2 * 100 * 4 + 50 * 2)
    memory.check_arrays(tree, at, "weights")
    monkeypatch.setattr(memory, "free", lambda device: 2 * 100 * 4 + 50 * 2 - 1)
    with pytest.raises(ConfigError, match=r"weights: 8\.38e-07 GiB on each device, 8\.37e-07 are free: choose"):
        memory.check_arrays(tree, at, "weights")
