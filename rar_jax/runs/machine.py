"""Hardware and library versions, recorded with every result."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

import rar_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "tensorstore", "grain", "numpy")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of rar_jax and of these packages, which must be installed."""
    return {"rar_jax": rar_jax.__version__} | {name: importlib.metadata.version(name) for name in packages}


def describe_machine() -> dict[str, Any]:
    """The kind of device, the number of devices of all processes, and versions."""
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "versions": versions()}
