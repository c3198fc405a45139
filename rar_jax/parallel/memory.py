"""What a compiled program takes of a device's memory, and what is free: told before it is taken, or when it was too much."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from rar_jax.errors import ConfigError, DeviceMemoryError


@contextlib.contextmanager
def exhaustion(what: str, advice: str) -> Iterator[None]:
    """Turns XLA's RESOURCE_EXHAUSTED, while something is compiled or run, into an error that people can mend.

    Args:
      what: is being done, with the numbers that its memory depends on. advice: what of them to change, and how.

    Raises: DeviceMemoryError.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0][:200].rstrip(". ")
        raise DeviceMemoryError(f"{what}: the memory of a device is exhausted ({reason}): {advice}") from error


def needed(compiled: Any) -> int:
    """Bytes on each device that running a compiled program takes beside its arguments: temporaries and results that do not
    replace an argument."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def free(device: Any) -> int | None:
    """Bytes that a device has left; None where neither it nor the system says. Devices of a CPU share the machine's: each
    has its part."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform == "cpu":
        try:
            lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        except OSError:  # no Linux
            return None
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return kib * 1024 // jax.local_device_count("cpu")
    return None


def check_arrays(shapes: Any, shardings: Any, what: str) -> None:
    """Refuses arrays that a device has no room for, before they are made.

    Args:
      shapes, shardings: the same tree, of ShapeDtypeStructs and of Shardings. what: they are, for the message.

    Raises: ConfigError with both numbers.
    """
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    takes, left = sum(jax.tree.leaves(sizes)), free(jax.local_devices()[0])
    if left is not None and takes > left:
        raise ConfigError(
            f"{what}: {takes / 2**30:.3g} GiB on each device, {left / 2**30:.3g} are free: choose a smaller model, or more "
            "devices and mesh.fsdp"
        )


def check(compiled: Any, batch_size: int, *, divisor: int = 1, where: str = "batch_size") -> None:
    """Refuses a program that does not fit, before it is run.

    Args:
      batch_size: that it was compiled for. divisor: what batch sizes must divide by. where: the argument that sets it.

    Raises: ConfigError with both numbers and a batch size that fits, if one does.
    """
    takes, left = needed(compiled), free(jax.local_devices()[0])
    if left is None or takes <= left:
        return
    # What does not grow with the batch makes this too large a guess, so a tenth is kept back.
    fits = int(batch_size * 0.9 * left / takes) // divisor * divisor
    advice = f"give {where} {fits}" if fits else "choose a smaller model, more devices or dtype bfloat16"
    raise ConfigError(
        f"{where} {batch_size} takes {takes / 2**30:.3g} GiB on each device, {left / 2**30:.3g} are free: {advice}"
    )
