"""Kernel Inception Distance: the squared maximum mean discrepancy of features under a cubic kernel, without bias.

k(x, y) = (x.y / d + 1)^3. Unlike a Frechet distance its expectation does not depend on the number of samples, and it
may be slightly negative. In float64 on the host: it is a small difference of means of numbers near 1.
Shapes: n, m samples, d feature width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

_BLOCK_BYTES = 1 << 26  # of kernel values at a time


class SubsetKid(NamedTuple):
    """KID over random subsets."""

    mean: float
    std: float  # over subsets, ddof 0, as torch-fidelity reports it; not the error of `mean`: subsets overlap


def kid(reference: npt.ArrayLike, samples: npt.ArrayLike) -> float:
    """KID of the whole sets.

    Args:
      reference: (n, d) features, any float dtype.
      samples: (m, d) features of the same network.

    Returns: the squared distance, without the factor 1000 of some papers; below 0 where the sets are as close as two of one kind.
    Raises: ValueError if shapes do not fit, a set has fewer than 2 rows, or a number is not finite.
    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 3; the unbiased estimator is equation 3 of Gretton et
      al. 2012. Cost: (n + m)^2 d multiplications in blocks of 64 MB.
    """
    return _kid(*_checked(reference, samples))


def kid_subsets(
    reference: npt.ArrayLike, samples: npt.ArrayLike, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> SubsetKid:
    """Mean and spread of the KID of random subsets: the protocol of most papers.

    Args:
      reference, samples: as in `kid`.
      subsets: how many subsets; size: rows of each set in one, drawn without replacement.
      seed: of the draw (NumPy's default_rng; other tools draw other subsets, so the mean agrees only statistically).

    Raises: ValueError as in `kid`, or if a set has fewer than `size` rows.
    """
    reference_nd, samples_md = _checked(reference, samples)
    if subsets < 1 or size < 2:
        raise ValueError(f"subsets is {subsets} and size {size}: at least 1 and 2")
    for name, x in (("reference", reference_nd), ("samples", samples_md)):
        if len(x) < size:
            raise ValueError(f"{name} has {len(x)} rows, fewer than size {size}: make size smaller, or more of them")
    rng = np.random.default_rng(seed)
    values = [
        _kid(
            reference_nd[rng.choice(len(reference_nd), size, replace=False)],
            samples_md[rng.choice(len(samples_md), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return SubsetKid(float(np.mean(values)), float(np.std(values)))


def _kid(x_nd: Float64, y_md: Float64) -> float:
    n, m = len(x_nd), len(y_md)
    # A pair of a sample with itself is no pair of independent samples: it is what biases the plain mean.
    within = (_kernel_sum(x_nd, x_nd) - _diagonal_sum(x_nd)) / (n * (n - 1))
    within += (_kernel_sum(y_md, y_md) - _diagonal_sum(y_md)) / (m * (m - 1))
    return float(within - 2 * _kernel_sum(x_nd, y_md) / (n * m))


def _kernel_sum(x_nd: Float64, y_md: Float64) -> float:
    rows = max(1, _BLOCK_BYTES // (8 * len(y_md)))
    blocks = (_cubic(x_nd[i : i + rows] @ y_md.T, x_nd.shape[1]).sum() for i in range(0, len(x_nd), rows))
    return float(sum(blocks))


def _diagonal_sum(x_nd: Float64) -> float:
    return float(_cubic(np.einsum("nd,nd->n", x_nd, x_nd), x_nd.shape[1]).sum())


def _cubic(products: Float64, d: int) -> Float64:
    root = products / d + 1
    return root * root * root  # ten times faster than ** 3


def _checked(reference: npt.ArrayLike, samples: npt.ArrayLike) -> tuple[Float64, Float64]:
    arrays: dict[str, Any] = {"reference": np.asarray(reference), "samples": np.asarray(samples)}
    for name, x in arrays.items():
        if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
            raise ValueError(f"{name} has shape {x.shape}: it must be (n, d) with at least 2 rows")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds {np.sum(~np.isfinite(x))} numbers that are not finite: look at the images")
    if arrays["reference"].shape[1] != arrays["samples"].shape[1]:
        raise ValueError(
            f"reference has {arrays['reference'].shape[1]} features and samples {arrays['samples'].shape[1]}: "
            "both must come from one network"
        )
    return arrays["reference"].astype(np.float64), arrays["samples"].astype(np.float64)
