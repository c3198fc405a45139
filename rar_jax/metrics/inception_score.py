"""Inception Score, and the sums that it is made of.

It is exp of the mean KL divergence of a sample's classes to those of its split, averaged over splits.
A split is `split_size` consecutive samples, so labels must be interleaved: 5,000 samples of 100 classes score at most
100. As in ADM's evaluator the last split may be shorter, and counts as much as a whole one. Logits are `pool3 @ W`,
without the bias. `inception_score` takes all logits on the host; `sum_split` in graph and `score_splits` on the host
give the same number from c + 2 numbers a split. Shapes: b batch, n samples, c classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

SPLIT_SIZE = 5000  # ADM's, and every published number's


class SplitSums(NamedTuple):
    """Sums over samples of one split; sums of parts of a split add up."""

    count: Any  # (), number of samples
    plogp: Any  # (), sum over samples and classes of p log p, in nats
    p: Any  # (c,), sum over samples of p


def init_split_sums(classes: int, dtype: Any = np.float32) -> SplitSums:
    """Return the sums of no samples."""
    return SplitSums(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((classes,), dtype))


def sum_split(logits: jax.Array, weights: jax.Array) -> SplitSums:
    """Sum a batch; jittable, also with a sharded batch axis.

    logits: (b, c), any float dtype; sums are float64 for float64 logits, otherwise float32.
    weights: (b,) 1 for a sample, 0 for padding, whose logits may be anything.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    # `where`, not a product: a padded row may hold a NaN, and 0 * NaN is NaN.
    is_sample_b1 = weights[:, None] > 0
    logp_bc = jax.nn.log_softmax(jnp.where(is_sample_b1, logits.astype(dtype), 0.0))
    p_bc = jnp.where(is_sample_b1, jnp.exp(logp_bc), 0.0)
    return SplitSums(count=jnp.sum(is_sample_b1, dtype=dtype), plogp=jnp.sum(p_bc * logp_bc), p=jnp.sum(p_bc, axis=0))


def score_splits(splits: Iterable[SplitSums]) -> float:
    """Compute the Inception Score from the sums of each split, in float64 on the host.

    Raises: ValueError if there is no split, one holds no sample, or a sum is not finite.
    """
    scores = []
    for index, sums in enumerate(splits):
        count, plogp, p_c = (np.asarray(x, np.float64) for x in sums)
        if not (np.isfinite(plogp) and np.isfinite(p_c).all()):
            raise ValueError(f"split {index} has sums that are not finite: look at the logits of its samples")
        if count < 1:
            raise ValueError(f"split {index} holds no sample: leave it out")
        mean_c = p_c / count
        # A class that no sample has adds nothing: p log p goes to 0 with p.
        entropy = -np.sum(mean_c * np.log(np.where(mean_c > 0, mean_c, 1.0)))
        scores.append(np.exp(plogp / count + entropy))
    if not scores:
        raise ValueError("the Inception Score needs at least one split")
    return float(np.mean(scores))


def inception_score(logits: npt.ArrayLike, *, split_size: int = SPLIT_SIZE) -> float:
    """Compute the Inception Score of logits (n, c) in float64 on the host.

    Raises: ValueError if logits are not (n, c) with n > 0, or not finite, or split_size is not positive.
    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4, and ADM's evaluator.py for the splits.
    """
    logits_nc = np.asarray(logits)
    if logits_nc.ndim != 2 or not logits_nc.size or split_size < 1:
        raise ValueError(f"logits are {logits_nc.shape} and split_size is {split_size}: give (n, c) and at least 1")
    starts = range(0, len(logits_nc), split_size)
    return score_splits(_sum_split_in_float64(logits_nc[start : start + split_size]) for start in starts)


def _sum_split_in_float64(logits_nc: npt.NDArray[Any]) -> SplitSums:
    shifted_nc = logits_nc.astype(np.float64)
    shifted_nc -= shifted_nc.max(axis=1, keepdims=True)
    # log_softmax, not the log of a softmax: the latter is -inf where a probability underflows.
    logp_nc = shifted_nc - np.log(np.exp(shifted_nc).sum(axis=1, keepdims=True))
    p_nc = np.exp(logp_nc)
    return SplitSums(count=np.float64(len(p_nc)), plogp=np.sum(p_nc * logp_nc), p=p_nc.sum(axis=0))
