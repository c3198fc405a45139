"""Random keys. Every use of randomness has a domain, so that no two uses share a key.

    domain           what is folded in then           what is drawn
    train/<stage>    0                                the initial parameters
                     1, then the step                 labels and tokens that are dropped, orders, noise of the losses
                     ..., then "draw"                 tokens, by tokenizers that are random
    untrained                                         parameters of the generator that the trained one is compared with
    validation       the batch's number                 orders, masks, times and noise of the validation losses; the seed is 0
    sample           the sample's number              its tokens: one key per sample, whatever its batch and mesh

All are threefry keys; `mesh.find_devices` refuses the setting that changes their numbers. Only dropout bits come from a
faster hash of such a key (networks/layers.py).
"""

from __future__ import annotations

import zlib

import jax


def domain_key(seed: jax.Array | int, domain: str) -> jax.Array:
    """Return the threefry key of a domain, from the experiment's seed (uint32)."""
    return fold_in_domain(jax.random.key(seed, impl="threefry2x32"), domain)


def fold_in_domain(key: jax.Array, domain: str) -> jax.Array:
    """Return a key for another use than that of `key`."""
    return jax.random.fold_in(key, zlib.crc32(domain.encode()))


def training_keys(seed: int, stage: str) -> tuple[jax.Array, jax.Array]:
    """Return the keys of a stage's initialization and of its steps; the step is folded into the latter."""
    root = domain_key(seed, f"train/{stage}")
    return jax.random.fold_in(root, 0), jax.random.fold_in(root, 1)


def sample_keys(seed: jax.Array | int, ids: jax.Array) -> jax.Array:
    """Return the keys (b,) of the samples with these numbers, ints (b,)."""
    root = domain_key(seed, "sample")
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(ids)
