import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.metrics import inception_score as inception
from tests.golden.inception import score_in_batches

_split_sums = jax.jit(inception.sum_split)


def _brute(logits_nc: np.ndarray, split_size: int) -> float:
    """Softmax, mean and KL spelled out, in extended precision."""
    scores = []
    for start in range(0, len(logits_nc), split_size):
        part = logits_nc[start : start + split_size].astype(np.longdouble)
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        mean = p.mean(axis=0)
        scores.append(np.exp(np.mean([np.sum(row * (np.log(row) - np.log(mean))) for row in p])))
    return float(np.mean(scores))


def _logits(n: int = 103, c: int = 11, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((n, c)) * scale).astype(np.float32)


@pytest.mark.parametrize("split_size", [1, 20, 50, 103, 5000])
def test_equals_brute_force_with_a_shorter_last_split(split_size: int) -> None:
    expected = _brute(_logits(), split_size)
    assert inception.inception_score(_logits(), split_size=split_size) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("split_size", "batch"), [(50, 16), (50, 50), (103, 7), (40, 128)])
def test_streaming_equals_the_whole(split_size: int, batch: int) -> None:
    expected = inception.inception_score(_logits(), split_size=split_size)
    assert score_in_batches(_logits(), split_size, batch) == pytest.approx(expected, rel=1e-6)


def test_splits_are_consecutive_so_class_sorted_samples_are_capped() -> None:
    confident_cc = 50.0 * np.eye(10)
    by_class, interleaved = np.repeat(confident_cc, 100, axis=0), np.tile(confident_cc, (100, 1))
    for score in (
        lambda x: inception.inception_score(x, split_size=200),
        lambda x: score_in_batches(x, split_size=200, batch=64),
    ):
        assert score(by_class) == pytest.approx(2, rel=1e-5)  # two classes a split
        assert score(interleaved) == pytest.approx(10, rel=1e-5)


def test_sums_are_those_of_the_samples_of_weight_one() -> None:
    logits = jnp.asarray(_logits(6, 4))
    weights = jnp.asarray([1.0, 0, 1, 1, 0, 0])
    masked, alone = _split_sums(logits, weights), inception.sum_split(logits[jnp.asarray([0, 2, 3])], jnp.ones(3))
    assert masked.count == 3
    assert masked.p.shape == (4,) and masked.p.sum() == pytest.approx(3, abs=1e-5)
    for ours, expected in zip(masked, alone, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_sharded_sums_equal_unsharded() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    logits, weights = jnp.asarray(_logits(64)), jnp.asarray(np.arange(64) < 50, jnp.float32)
    sharded = _split_sums(jax.device_put(logits, rows), jax.device_put(weights, rows))
    for ours, expected in zip(sharded, _split_sums(logits, weights), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_probabilities_that_underflow_are_no_nan() -> None:
    # exp(-1000) is 0 in float64, and 0 * log 0 is NaN.
    logits = np.asarray([[1000.0, 0.0, -1000.0], [0.0, 1000.0, -1000.0]])
    assert inception.inception_score(logits) == pytest.approx(2, rel=1e-12)
    assert score_in_batches(logits, split_size=2, batch=2) == pytest.approx(2, rel=1e-6)


def test_logits_far_from_zero_lose_nothing() -> None:
    expected = inception.inception_score(_logits(), split_size=50)
    assert inception.inception_score(_logits() + 1e3, split_size=50) == pytest.approx(expected, rel=1e-4)
    assert inception.inception_score(_logits().astype(np.float64) + 1e3, split_size=50) == pytest.approx(expected)


def test_padding_alone_adds_nothing() -> None:
    sums = _split_sums(jnp.full((3, 5), jnp.nan), jnp.zeros(3))
    assert all(np.all(np.asarray(x) == 0) for x in sums)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits are \(3,\)"):
        inception.inception_score(np.zeros(3))
    with pytest.raises(ValueError, match=r"logits are \(0, 3\)"):
        inception.inception_score(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="split_size is 0"):
        inception.inception_score(_logits(), split_size=0)
    with pytest.raises(ValueError, match="split 0 has sums that are not finite"):
        inception.inception_score(np.where(_logits() == _logits()[60, 2], np.nan, _logits()))
    with pytest.raises(ValueError, match="at least one split"):
        inception.score_splits([])
    with pytest.raises(ValueError, match="split 1 holds no sample"):
        inception.score_splits([inception.sum_split(jnp.ones((2, 3)), jnp.ones(2)), inception.init_split_sums(3)])
    with pytest.raises(ValueError, match="split 0 has sums that are not finite"):
        inception.score_splits([inception.sum_split(jnp.full((2, 3), jnp.nan), jnp.ones(2))])
