"""What a number was made on: devices and versions, as the ledger, results and `doctor` tell them."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax

import rar_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "tensorstore", "grain", "numpy")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Of rar_jax and these packages, all of which must be installed."""
    return {"rar_jax": rar_jax.__version__} | {name: importlib.metadata.version(name) for name in packages}


def where() -> dict[str, Any]:
    """The kind of device, how many all processes have, and versions."""
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "versions": versions()}
