"""No two uses of randomness share a key."""

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.experiment import STAGES
from rar_jax.keys import domain_key, sample_keys, training_keys


def test_all_keys_of_a_seed_are_different() -> None:
    """Before domains, the key of a stage was sample 0, 1 or 2's key: the same numbers initialized and sampled."""
    found = [domain_key(0, "untrained")]
    for stage in STAGES:
        init, steps = training_keys(0, stage)
        folded = jax.vmap(jax.random.fold_in, (None, 0))(steps, jnp.arange(200))
        found += [init, steps, *folded, *jax.random.split(init)]
    samples = sample_keys(0, jnp.arange(500))
    found += [
        *samples,
        *(key for row in samples[:20] for key in jax.vmap(jax.random.fold_in, (None, 0))(row, jnp.arange(20))),
    ]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in found}
    assert len(data) == len(found) > 1000


def test_a_sample_has_the_same_key_in_any_batch() -> None:
    whole, part = sample_keys(jnp.uint32(5), jnp.arange(9)), sample_keys(5, jnp.array([7, 2]))
    np.testing.assert_array_equal(jax.random.key_data(whole[jnp.array([7, 2])]), jax.random.key_data(part))
