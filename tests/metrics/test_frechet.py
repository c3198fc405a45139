from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from rar_jax.metrics import frechet

Gaussian = tuple[np.ndarray, np.ndarray]


def _gaussian(x_nd: np.ndarray) -> Gaussian:
    x_nd = x_nd.astype(np.float64)
    return x_nd.mean(axis=0), np.cov(x_nd.T)


def _random(seed: int, d: int = 12) -> Gaussian:
    rng = np.random.default_rng(seed)
    return _gaussian(rng.standard_normal((200, d)) @ rng.standard_normal((d, d)) / np.sqrt(d))


def test_equals_scipy_sqrtm_on_full_rank() -> None:
    (m1, s1), (m2, s2) = _random(1), _random(2)
    root = np.real(np.asarray(scipy.linalg.sqrtm(s1 @ s2)))
    expected = np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * root)
    assert frechet.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, abs=1e-8)


def test_commuting_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(3)
    m1, m2, a, b = rng.standard_normal(8), rng.standard_normal(8), rng.uniform(0, 2, 8), rng.uniform(0, 2, 8)
    a[0] = b[1] = 0.0  # singular
    expected = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet.frechet_distance(m1, np.diag(a), m2, np.diag(b)) == pytest.approx(expected, abs=1e-10)
    args = (jnp.asarray(x, jnp.float32) for x in (m1, np.diag(a), m2, np.diag(b)))
    assert float(frechet.frechet_distance_in_graph(*args)) == pytest.approx(expected, abs=5e-4)


def test_identical_gaussians_are_at_no_distance() -> None:
    mean, cov = _random(8)
    assert frechet.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)
    args = (jnp.asarray(x, jnp.float32) for x in (mean, cov, mean, cov))
    assert float(frechet.frechet_distance_in_graph(*args)) == pytest.approx(0, abs=5e-4)


@pytest.mark.parametrize(("n", "m", "d"), [(10, 14, 24), (40, 9, 64), (5, 5, 128)])
def test_rank_deficient_equals_the_nuclear_norm_of_the_data(n: int, m: int, d: int) -> None:
    # tr (S1 S2)^(1/2) is the sum of singular values of Xc Yc^T / sqrt((n-1)(m-1)): no root of a singular matrix.
    rng = np.random.default_rng(9)
    x_nd, y_md = rng.standard_normal((n, d)), 1.5 * rng.standard_normal((m, d)) + 0.2
    xc_nd, yc_md = x_nd - x_nd.mean(axis=0)[None, :], y_md - y_md.mean(axis=0)[None, :]
    root = np.linalg.svd(xc_nd @ yc_md.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    traces = (xc_nd**2).sum() / (n - 1) + (yc_md**2).sum() / (m - 1)
    expected = np.sum((x_nd.mean(axis=0) - y_md.mean(axis=0)) ** 2) + traces - 2 * root
    assert frechet.frechet_distance(*_gaussian(x_nd), *_gaussian(y_md)) == pytest.approx(expected, rel=1e-6)


def _spectra() -> dict[str, np.ndarray]:
    k = np.arange(1, 129)
    return {"k^-1": 1.0 / k, "k^-2": 1.0 / k**2, "k^-3": 1.0 / k**3, "to 1e-7": np.geomspace(1, 1e-7, 128)}


@pytest.mark.parametrize("name", list(_spectra()))
@pytest.mark.parametrize("same_axes", [False, True])
def test_steep_spectrum_in_float32(name: str, same_axes: bool) -> None:
    # The cases that go wrong by whole units when the spectrum is squared. With the same axes the distance is near 0,
    # and all of it is cancellation.
    values = _spectra()[name]
    q1, q2 = (np.linalg.qr(np.random.default_rng(s).standard_normal((128, 128)))[0] for s in (4, 5))
    if same_axes:
        q2 = q1
    s1, s2 = (q1 * values) @ q1.T, (q2 * (1.1 * values)) @ q2.T
    zero = np.zeros(len(values))
    args = (jnp.asarray(x, jnp.float32) for x in (zero, s1, zero, s2))
    in_graph = jax.jit(frechet.frechet_distance_in_graph)(*args)
    assert float(in_graph) == pytest.approx(frechet.frechet_distance(zero, s1, zero, s2), abs=5e-4)


def test_symmetric_and_moved_by_the_means() -> None:
    (m1, s1), (m2, s2) = _random(6), _random(7)
    base = frechet.frechet_distance(m1, s1, m2, s2)
    assert frechet.frechet_distance(m2, s2, m1, s1) == pytest.approx(base, abs=1e-9)
    assert frechet.frechet_distance(m1, s1, m1 + 2.0, s1) == pytest.approx(4.0 * len(m1), abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, s: (m, s[:3]), r"covariance \(3, 12\) must have shapes"),
        (lambda m, s: (m[None], s), r"mean \(1, 12\)"),
        (lambda m, s: (m[:4], s[:4, :4]), "mean1 has 4 features and mean2 12"),
        (lambda m, s: (m, np.where(s == s[0, 0], np.nan, s)), "mean or covariance holds 1 numbers that are not finite"),
        (lambda m, s: (m * np.inf, s), "mean or covariance holds 12 numbers that are not finite"),
        (lambda m, s: (m, np.triu(s)), "the covariance is not symmetric"),
    ],
)
def test_bad_arguments_are_named(change: Callable[..., Gaussian], message: str) -> None:
    (m1, s1), (m2, s2) = change(*_random(1)), _random(2)
    with pytest.raises(ValueError, match=message):
        frechet.frechet_distance(m1, s1, m2, s2)


def test_numbers_of_samples_take_the_noise_out_of_singular_covariances() -> None:
    rng = np.random.default_rng(10)
    x_nd, y_md = rng.standard_normal((12, 200)), 1.5 * rng.standard_normal((9, 200)) + 0.2
    expected = frechet.frechet_distance(*_gaussian(x_nd), *_gaussian(y_md))
    (m1, s1), (m2, s2) = (
        (mean, cov.astype(np.float32).astype(np.float64)) for mean, cov in map(_gaussian, (x_nd, y_md))
    )
    with_noise = frechet.frechet_distance(m1, s1, m2, s2)
    assert abs(with_noise - expected) > 1e-4, "rounding to float32 does no harm here: the test shows nothing"
    assert frechet.frechet_distance(m1, s1, m2, s2, n1=12, n2=9) == pytest.approx(expected, abs=1e-6)
    (m1, s1), (m2, s2) = _random(1), _random(2)  # more samples than features: nothing is cut
    assert frechet.frechet_distance(m1, s1, m2, s2, n1=13, n2=50_000) == frechet.frechet_distance(m1, s1, m2, s2)
