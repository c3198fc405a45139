"""Frechet distance: |m1-m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

The last trace is the nuclear norm (sum of singular values) of S1^(1/2) S2^(1/2). Roots of eigenvalues of
S1 S2 would square the spectrum first: errors of -5 and -8 were seen in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rar_jax.metrics.moments import Float64, Moments


def frechet_distance(
    mean1: npt.ArrayLike,
    cov1: npt.ArrayLike,
    mean2: npt.ArrayLike,
    cov2: npt.ArrayLike,
    *,
    n1: int | None = None,
    n2: int | None = None,
) -> float:
    """Compute the Frechet distance in float64 on the host: the number to report.

    Means are (d,), covariances (d, d); they may be singular. n1, n2: numbers of samples, where known. The rank of a
    covariance is below that, so smaller eigenvalues are rounding and left out.

    Raises: ValueError if shapes do not fit, a covariance is not symmetric, or a number is not finite.
    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6 of Dowson and Landau 1982.
    """
    m1_d, s1_dd = check_gaussian(mean1, cov1)
    m2_d, s2_dd = check_gaussian(mean2, cov2)
    if m1_d.shape != m2_d.shape:
        raise ValueError(f"mean1 has {m1_d.size} features and mean2 {m2_d.size}: both must come from one network")
    root = np.linalg.svd(_root(s1_dd, n1).T @ _root(s2_dd, n2), compute_uv=False).sum()
    return float(np.sum((m1_d - m2_d) ** 2) + np.trace(s1_dd) + np.trace(s2_dd) - 2 * root)


def _root(cov_dd: Float64, n: int | None) -> Float64:
    """Return R (d, rank) with cov = R R^T, a rotation of the symmetric root."""
    values_d, vectors_dd = np.linalg.eigh(cov_dd)  # ascending
    rank = len(values_d) if n is None else min(n - 1, len(values_d))
    values_r, vectors_dr = values_d[len(values_d) - rank :], vectors_dd[:, len(values_d) - rank :]
    # Rounding makes zero eigenvalues slightly negative.
    return vectors_dr * np.sqrt(np.clip(values_r, 0, None))[None, :]


def check_gaussian(mean: npt.ArrayLike, cov: npt.ArrayLike) -> tuple[Float64, Float64]:
    """Return both in float64. Raises: ValueError for no mean and covariance."""
    mean_d, cov_dd = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean_d.ndim != 1 or cov_dd.shape != mean_d.shape * 2:
        raise ValueError(f"mean {mean_d.shape} and covariance {cov_dd.shape} must have shapes (d,) and (d, d)")
    if bad := np.sum(~np.isfinite(mean_d)) + np.sum(~np.isfinite(cov_dd)):
        raise ValueError(f"mean or covariance holds {bad} numbers that are not finite: look at the features")
    rounding = 1e-6 * np.abs(cov_dd).max(initial=0)
    symmetric = np.allclose(cov_dd, cov_dd.T, rtol=1e-4, atol=rounding)
    if not symmetric or np.diagonal(cov_dd).min(initial=0) < -rounding:
        raise ValueError("the covariance is not symmetric or has a negative variance")
    return mean_d, cov_dd


def frechet_distance_of_moments(cov1: jax.Array, sums: Moments) -> jax.Array:
    """Compute the distance of a covariance and moments about its mean; jittable."""
    shift_d = sums.sum / sums.count  # the difference of the means
    cov_dd = (sums.outer - sums.count * shift_d[:, None] * shift_d[None, :]) / (sums.count - 1)
    return frechet_distance_in_graph(jnp.zeros_like(shift_d), cov1, shift_d, (cov_dd + cov_dd.T) / 2)


def frechet_distance_in_graph(mean1: jax.Array, cov1: jax.Array, mean2: jax.Array, cov2: jax.Array) -> jax.Array:
    """Compute the distance in float32, within 5e-4 at unit scale; jittable."""

    def sqrt(cov_dd: jax.Array) -> jax.Array:
        values_d, vectors_dd = jnp.linalg.eigh(cov_dd)
        # Below 2 eps an eigenvalue is rounding noise, and its root is 1e-4 and more: of a rank-deficient covariance
        # the distance would err by 1.5e-3 if only negative ones were clipped.
        noise = 2 * jnp.finfo(jnp.float32).eps * values_d[-1]
        scaled_dd = vectors_dd * jnp.sqrt(jnp.where(values_d > noise, values_d, 0.0))[None, :]
        return jnp.matmul(scaled_dd, vectors_dd.T, precision=jax.lax.Precision.HIGHEST)

    m1_d, s1_dd, m2_d, s2_dd = (x.astype(jnp.float32) for x in (mean1, cov1, mean2, cov2))
    product_dd = jnp.matmul(sqrt(s1_dd), sqrt(s2_dd), precision=jax.lax.Precision.HIGHEST)
    root = jnp.linalg.svd(product_dd, compute_uv=False).sum()
    return jnp.sum((m1_d - m2_d) ** 2) + jnp.trace(s1_dd) + jnp.trace(s2_dd) - 2 * root
