"""Kernel Inception Distance of features.

The unbiased squared maximum mean discrepancy under k(x, y) = (x.y / d + 1)^3. Unlike a Frechet distance, its
expectation does not depend on the number of samples, and it may be slightly negative. In float64 on the host: it is
a small difference of means of numbers near 1.
Shapes: n, m samples, d feature width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rar_jax.metrics.features import check_feature_sets

Float64 = npt.NDArray[np.float64]

_BLOCK_BYTES = 1 << 26  # of kernel values at a time


def kid(reference: npt.ArrayLike, samples: npt.ArrayLike) -> float:
    """Compute the KID of two sets of features, (n, d) and (m, d), of any float dtype.

    Returns: the squared distance, without the factor 1000 of some papers.
    Raises: ValueError if shapes do not fit, a set has fewer than 2 rows, or a number is not finite.
    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 3; the unbiased estimator is equation 3 of Gretton et
      al. 2012. Cost: (n + m)^2 d multiplications in blocks of 64 MB.
    """
    x_nd, y_md = check_feature_sets(reference, samples, least=2)
    n, m = len(x_nd), len(y_md)
    # A pair of a sample with itself is no pair of independent samples: it is what biases the plain mean.
    within = (_sum_kernel(x_nd, x_nd) - _sum_diagonal(x_nd)) / (n * (n - 1))
    within += (_sum_kernel(y_md, y_md) - _sum_diagonal(y_md)) / (m * (m - 1))
    return float(within - 2 * _sum_kernel(x_nd, y_md) / (n * m))


def _sum_kernel(x_nd: Float64, y_md: Float64) -> float:
    rows = max(1, _BLOCK_BYTES // (8 * len(y_md)))
    blocks = (_cubic(x_nd[i : i + rows] @ y_md.T, x_nd.shape[1]).sum() for i in range(0, len(x_nd), rows))
    return float(sum(blocks))


def _sum_diagonal(x_nd: Float64) -> float:
    return float(_cubic(np.einsum("nd,nd->n", x_nd, x_nd), x_nd.shape[1]).sum())


def _cubic(products: Float64, d: int) -> Float64:
    root = products / d + 1
    return root * root * root  # ten times faster than ** 3
