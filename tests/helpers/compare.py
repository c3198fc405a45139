"""Tokens of two programs that compute the same."""

from typing import Any

import numpy as np

from rar_jax.models import TokenSpec


def assert_same_tokens(spec: TokenSpec, ours: Any, theirs: Any) -> None:
    """Ids are equal; latents to 1e-4 of their root mean square, as far as float32 sums in another order may move them.

    Two compilations of one function fuse and order sums differently: each of the sums of a TINY model, of fewer than 128
    terms, is then off by up to 128 * 2**-24 = 8e-6 of its terms, and a TINY chain of layers and steps has a dozen of them in
    a row. Another key, row, label or branch moves latents by about their root mean square.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if spec.vocab is not None:
        np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.sqrt(np.mean(np.square(theirs))))
