"""Actionable errors when device memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from rar_jax.errors import DeviceMemoryError


@contextlib.contextmanager
def exhaustion(what: str, advice: str) -> Iterator[None]:
    """Turn XLA's RESOURCE_EXHAUSTED into DeviceMemoryError.

    Args:
      what: what is being done, with the numbers that its memory depends on. advice: what to change.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0][:200].rstrip(". ")
        raise DeviceMemoryError(f"{what}: the memory of a device is exhausted ({reason}): {advice}") from error
