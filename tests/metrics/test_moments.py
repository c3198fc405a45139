import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.metrics import moments


def _features(n: int, d: int = 6) -> np.ndarray:
    # Far from zero: sums that are not centred on a shift would lose digits in float32.
    return (np.random.default_rng(0).standard_normal((n, d)) * np.arange(1, d + 1) + 300).astype(np.float32)


def _stream(x_nd: np.ndarray, batch: int, shift_d: np.ndarray) -> moments.Moments:
    update = jax.jit(moments.update_moments)
    total = moments.init_moments(x_nd.shape[1])
    for start in range(0, len(x_nd), batch):
        rows = x_nd[start : start + batch]
        padding = batch - len(rows)
        padded = np.concatenate([rows, np.full((padding, x_nd.shape[1]), np.nan, np.float32)])
        weights = np.concatenate([np.ones(len(rows)), np.zeros(padding)]).astype(np.float32)
        total = update(total, jnp.asarray(padded), jnp.asarray(weights), jnp.asarray(shift_d))
    return total


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_equals_numpy_for_any_batch_size_and_a_masked_tail(batch: int) -> None:
    x_nd = _features(200)
    shift_d = x_nd[:10].mean(axis=0)
    mean_d, cov_dd = moments.finalize_moments(_stream(x_nd, batch, shift_d), shift_d)
    assert mean_d.dtype == cov_dd.dtype == np.float64
    np.testing.assert_allclose(mean_d, x_nd.astype(np.float64).mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(cov_dd, np.cov(x_nd.astype(np.float64).T), rtol=2e-6, atol=2e-6)


def test_merged_chunks_equal_the_whole() -> None:
    x_nd = _features(150)
    shift_d = np.full(6, 299.7)  # float64, and no float32 number
    parts = [jax.device_get(_stream(part, 16, shift_d)) for part in np.split(x_nd, [40, 41, 100])]
    merged = functools.reduce(moments.add_in_float64, parts)
    assert merged.outer.dtype == np.float64
    assert merged.count == 150
    mean_d, cov_dd = moments.finalize_moments(merged, shift_d)
    np.testing.assert_allclose(mean_d, x_nd.astype(np.float64).mean(axis=0), rtol=1e-8)
    np.testing.assert_allclose(cov_dd, np.cov(x_nd.astype(np.float64).T), rtol=1e-6, atol=1e-6)


def test_scan_and_psum_style_addition_work_in_graph() -> None:
    x_nd, shift_d = _features(64), jnp.full((6,), 300.0)

    @jax.jit
    def scanned(batches: jax.Array) -> moments.Moments:
        def step(total: moments.Moments, rows: jax.Array) -> tuple[moments.Moments, None]:
            return moments.update_moments(total, rows, jnp.ones(rows.shape[0]), shift_d), None

        return jax.lax.scan(step, moments.init_moments(6), batches)[0]

    _, cov_dd = moments.finalize_moments(scanned(jnp.asarray(x_nd).reshape(4, 16, 6)), shift_d)
    np.testing.assert_allclose(cov_dd, np.cov(x_nd.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_samples_are_an_error(n: int) -> None:
    shift_d = np.zeros(6, np.float32)
    with pytest.raises(ValueError, match="at least 2 samples"):
        moments.finalize_moments(_stream(_features(n), 4, shift_d), shift_d)
