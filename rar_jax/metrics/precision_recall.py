"""Precision and recall of samples by balls about features (k nearest neighbours).

A ball about each point reaches to its k-th nearest neighbour in its own set. Precision is the share of samples inside
some ball of the reference, recall the share of the reference inside some ball of the samples; on the sphere counts as
inside.

In float64 on the host, because "on the sphere" is common: a copy of a reference image lies exactly as far from the
neighbours of that image as the image itself. |x|^2 - 2 x.y + |y|^2 answers such ties by its rounding, which differs
with the blocks of the matmul. So a float64 matmul only decides the pairs that its error bound allows it to decide. The
few others are summed directly from (x - y)^2, and the result is that of direct summation of every pair.

Cost: (n + m)^2 distances of d multiplications, in blocks of a few times 16 MB, beside the features twice in float64.
Shapes: n, m points, d feature width, b rows of a block, p pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rar_jax.metrics.features import check_feature_sets

Float64 = npt.NDArray[np.float64]

_BLOCK_BYTES = 1 << 24  # of distances at a time
_PAIR_BYTES = 1 << 23  # of differences at a time, summed directly


def precision_recall(reference: npt.ArrayLike, samples: npt.ArrayLike, *, k: int = 3) -> dict[str, float]:
    """Compute {"precision", "recall"}, in [0, 1], of samples against a reference.

    reference, samples: features (n, d), (m, d) of any float dtype. Numbers of different n or m do not compare.
    k: a ball reaches to its k-th neighbour; 3 in ADM.

    Raises: ValueError if shapes do not fit, a set has k points or fewer, or a number is not finite.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), section 2; ADM's evaluator.py.
    """
    if k < 1:
        raise ValueError(f"k is {k}: it must be at least 1")
    reference_nd, samples_md = check_feature_sets(reference, samples, least=k + 1)
    return {
        "precision": float(_inside(samples_md, reference_nd, _squared_radii(reference_nd, k)).mean()),
        "recall": float(_inside(reference_nd, samples_md, _squared_radii(samples_md, k)).mean()),
    }


def _squared_radii(points_nd: Float64, k: int) -> Float64:
    """Return (n,) squared distances of points to their k-th neighbours."""
    radii_n = np.empty(len(points_nd))
    for start, distance_bn, error_bn in _blocks(points_nd, points_nd):
        b = len(distance_bn)
        distance_bn[np.arange(b), start + np.arange(b)] = np.inf  # itself; its copies do count
        # The k-th neighbour is certainly no further than this, so it is among the pairs that may be that near.
        limit_b = np.partition(distance_bn + error_bn, k - 1, axis=1)[:, k - 1]
        row_p, column_p = np.nonzero(distance_bn - error_bn <= limit_b[:, None])
        exact_p = _direct(points_nd, start + row_p, points_nd, column_p)
        sorted_p = exact_p[np.lexsort((exact_p, row_p))]
        first_b = np.searchsorted(row_p, np.arange(b))  # nonzero lists row after row
        radii_n[start : start + b] = sorted_p[first_b + k - 1]
    return radii_n


def _inside(points_nd: Float64, centres_md: Float64, squared_radii_m: Float64) -> npt.NDArray[np.bool_]:
    """Return (n,) whether a point is inside, or on, the ball of some centre."""
    inside_n = np.zeros(len(points_nd), np.bool_)
    for start, distance_bm, error_bm in _blocks(points_nd, centres_md):
        b = len(distance_bm)
        outside_bm = distance_bm - squared_radii_m[None, :]
        inside_b: npt.NDArray[np.bool_] = np.any(outside_bm < -error_bm, axis=1)
        row_p, column_p = np.nonzero((outside_bm <= error_bm) & ~inside_b[:, None])
        exact_p = _direct(points_nd, start + row_p, centres_md, column_p)
        inside_b[row_p[exact_p <= squared_radii_m[column_p]]] = True
        inside_n[start : start + b] = inside_b
    return inside_n


def _blocks(x_nd: Float64, y_md: Float64) -> Iterator[tuple[int, Float64, Float64]]:
    """Yield first row, squared distances (b, m) and bounds of their errors."""
    d = x_nd.shape[1]
    centre_d = y_md.mean(axis=0)  # norms, and with them the error, are smallest about the middle
    y_md = y_md - centre_d[None, :]
    y_norm_m = np.einsum("md,md->m", y_md, y_md)
    rows = max(1, _BLOCK_BYTES // (8 * len(y_md)))
    for start in range(0, len(x_nd), rows):
        x_bd = x_nd[start : start + rows] - centre_d[None, :]
        norms_bm = np.einsum("bd,bd->b", x_bd, x_bd)[:, None] + y_norm_m[None, :]
        # A dot product of length d errs by at most d/2 eps |x||y|, whatever the order of its terms (Higham 2002,
        # section 3.1), and 2 |x||y| <= |x|^2 + |y|^2. Twice that for the norms, once more for the centring and for
        # the direct sum: below 4 d eps of the norms, and the 8 is for small d.
        error_bm = (4 * d + 8) * np.finfo(np.float64).eps * norms_bm
        yield start, norms_bm - 2 * (x_bd @ y_md.T), error_bm


def _direct(x_nd: Float64, row_p: npt.NDArray, y_md: Float64, column_p: npt.NDArray) -> Float64:
    """Return (p,) squared distances of pairs, bitwise the same in any block."""
    size = max(1, _PAIR_BYTES // (8 * x_nd.shape[1]))
    parts = [
        np.sum((x_nd[row_p[i : i + size]] - y_md[column_p[i : i + size]]) ** 2, axis=1)
        for i in range(0, len(row_p), size)
    ]
    return np.concatenate([np.zeros(0), *parts])
