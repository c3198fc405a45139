"""Inception Score: exp of the mean KL divergence of a sample's classes to the classes of its split, averaged over splits.

A split is `split_size` *consecutive* samples: 50,000 samples of which every 5,000 hold only 100 classes score at most
100, so labels must be interleaved. As in ADM's evaluator nothing is dropped: the last split may be shorter. A short
split scores lower (its mean distribution is made of fewer samples), and it counts as much as a whole one: compare only
numbers of samples that split alike. Logits are `pool3 @ W`, without the bias (evaluation.md).

Two ways that agree: `inception_score` from all logits on the host in float64, and `split_sums` in graph with `score` on
the host, for which only c + 2 numbers a split leave the device. Shapes: b batch, n samples, c classes.
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
    """Sums over samples of one split, float32 in graph. Sums of parts of a split add up: `jax.tree.map(jnp.add, a, b)`."""

    count: Any  # (), how many samples
    plogp: Any  # (), sum over samples and classes of p log p, in nats
    p: Any  # (c,), sum over samples of p


def zero(classes: int, dtype: Any = np.float32) -> SplitSums:
    """Sums of no samples: where a scan over batches starts."""
    return SplitSums(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((classes,), dtype))


def split_sums(logits: jax.Array, weights: jax.Array) -> SplitSums:
    """Sums of a batch; jittable, and right under a sharded batch axis.

    Args:
      logits: (b, c), any float dtype.
      weights: (b,) 1 for a sample, 0 for the padding of the last batch, whose logits may be anything.

    Returns: SplitSums in float32, or float64 for float64 logits.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    # `where`, not a product: a padded row may hold a NaN, and 0 * NaN is NaN.
    is_sample_b1 = weights[:, None] > 0
    logp_bc = jax.nn.log_softmax(jnp.where(is_sample_b1, logits.astype(dtype), 0.0))
    p_bc = jnp.where(is_sample_b1, jnp.exp(logp_bc), 0.0)
    return SplitSums(count=jnp.sum(is_sample_b1, dtype=dtype), plogp=jnp.sum(p_bc * logp_bc), p=jnp.sum(p_bc, axis=0))


def score(splits: Iterable[SplitSums]) -> float:
    """Inception Score of the whole splits' sums, in float64 on the host.

    Args:
      splits: the sums of each split, in any order; fetched already or still on the device.

    Raises: ValueError if there is no split, one holds no sample, or a sum is not finite.
    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
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
    """Inception Score in float64 on the host: the number to report.

    Args:
      logits: (n, c), in the order in which the samples were made: splits are consecutive. Any float dtype.
      split_size: samples a split; the last one is shorter if n does not divide by it.

    Returns: the mean of the splits' scores, from 1 to c.
    Raises: ValueError if logits are not (n, c) with n > 0, or not finite, or split_size is not positive.
    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4, and ADM's evaluator.py for the splits.
    """
    logits_nc = np.asarray(logits)
    if logits_nc.ndim != 2 or 0 in logits_nc.shape:
        raise ValueError(f"logits are {logits_nc.shape}: they must be (n, c), at least one sample of one class")
    if split_size < 1:
        raise ValueError(f"split_size is {split_size}: it must be at least 1")
    splits = (logits_nc[start : start + split_size] for start in range(0, len(logits_nc), split_size))
    return score(_split_sums64(split_nc) for split_nc in splits)


def _split_sums64(logits_nc: npt.NDArray[Any]) -> SplitSums:
    logits_nc = logits_nc.astype(np.float64)
    if not np.isfinite(logits_nc).all():
        raise ValueError(f"{np.sum(~np.isfinite(logits_nc))} logits of a split are not finite: look at the features")
    shifted_nc = logits_nc - logits_nc.max(axis=1, keepdims=True)
    # log_softmax, not the log of a softmax: the latter is -inf where a probability underflows.
    logp_nc = shifted_nc - np.log(np.exp(shifted_nc).sum(axis=1, keepdims=True))
    p_nc = np.exp(logp_nc)
    return SplitSums(count=np.float64(len(p_nc)), plogp=np.sum(p_nc * logp_nc), p=p_nc.sum(axis=0))
