import numpy as np
import pytest

from rar_jax.metrics import kid as module
from rar_jax.metrics.kid import kid


def _brute(x: np.ndarray, y: np.ndarray) -> float:
    """Every pair by itself."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def _sets(n: int = 30, m: int = 23, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, d)).astype(np.float32), (rng.standard_normal((m, d)) + 0.3).astype(np.float32)


def test_equals_brute_force() -> None:
    assert kid(*_sets()) == pytest.approx(_brute(*_sets()), abs=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = kid(*_sets())
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 23 * 4)
    assert kid(*_sets()) == pytest.approx(expected, abs=1e-12)
    assert kid(*reversed(_sets())) == pytest.approx(expected, abs=1e-12)


def test_unbiased_at_few_samples() -> None:
    rng = np.random.default_rng(1)
    values = [kid(rng.standard_normal((8, 4)), rng.standard_normal((8, 4))) for _ in range(400)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0
    # The biased estimator has a positive expectation here, far outside of that.
    assert 4 * error < 0.5


def test_bad_arguments_are_named() -> None:
    reference, samples = _sets()
    with pytest.raises(ValueError, match=r"samples has shape \(1, 5\)"):
        kid(reference, samples[:1])
    with pytest.raises(ValueError, match="reference has 5 features and samples 4"):
        kid(reference, samples[:, :4])
    with pytest.raises(ValueError, match="reference holds 1 numbers that are not finite"):
        kid(np.where(reference == reference[3, 3], np.nan, reference), samples)
