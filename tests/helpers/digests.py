"""Digests of batches."""

from __future__ import annotations

import hashlib

import numpy as np

from rar_jax.data.loader import Batch


def batch_digest(batch: Batch) -> str:
    """Hex sha256 over the names, dtypes, shapes and bytes of a batch."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()
