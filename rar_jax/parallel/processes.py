"""One program, one or many processes: who writes, and how each process's rows become a global array."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from rar_jax.parallel.rules import batch_sharding


def is_main() -> bool:
    """Whether this process writes what is one file (metrics, pictures, manifests)."""
    return jax.process_index() == 0


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split over (data, fsdp), from this process's rows of each global batch."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in rows.items()}
