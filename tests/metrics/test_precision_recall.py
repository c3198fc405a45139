import numpy as np
import pytest

from rar_jax.metrics import precision_recall as module
from rar_jax.metrics.precision_recall import precision_recall


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.stack([((row[None, :] - y) ** 2).sum(axis=1) for row in x])


def _brute(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> dict[str, float]:
    """Each pair by itself; the nearest of a point's sorted distances is its own."""
    radii_r = np.sort(_squared_distances(reference, reference), axis=1)[:, k]
    radii_s = np.sort(_squared_distances(samples, samples), axis=1)[:, k]
    across, back = _squared_distances(samples, reference), _squared_distances(reference, samples)
    return {
        "precision": float((across <= radii_r[None, :]).any(axis=1).mean()),
        "recall": float((back <= radii_s[None, :]).any(axis=1).mean()),
    }


def _sets(n: int = 90, m: int = 70, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)).astype(np.float32), (rng.standard_normal((m, d)) * 1.3).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 3, 10, 69])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_brute_force(k: int, seed: int) -> None:
    reference, samples = _sets(seed=seed)
    assert precision_recall(reference, samples, k=k) == _brute(reference, samples, k)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = _sets()
    reference[40:60] = reference[:20]
    samples[:10] = reference[:10]
    expected = _brute(reference, samples)
    monkeypatch.setattr(module, "_BLOCK_BYTES", rows * 8 * len(reference))
    monkeypatch.setattr(module, "_PAIR_BYTES", 3 * 8 * reference.shape[1])
    assert precision_recall(reference, samples) == expected


def test_the_third_neighbour_on_a_line() -> None:
    # Neighbours of 0 at 1, 3 and 7: its ball reaches to 7, and that of 7 to 7 too. Then balls [-7, 7], [-5, 7], ...
    reference = np.asarray([[0.0], [1.0], [3.0], [7.0]])
    far = np.asarray([[1000.0], [1002.0], [1004.0], [1006.0], [-7.0], [14.0], [-7.001], [14.001]])
    # -7 and 14 lie on spheres: inside.
    assert precision_recall(reference, far)["precision"] == 2 / 8


def test_on_the_sphere_is_inside_in_any_direction() -> None:
    # Pairs (a, a + v) far from one another, so with k = 1 both have the radius |v|. Then a - v lies on a sphere. All are
    # whole numbers, so the true distances are exact; their mean is not, so those of a matmul after centring are not.
    rng = np.random.default_rng(2)
    a = rng.integers(-9, 10, (31, 33)) + 1000 * np.arange(31)[:, None]
    v = rng.integers(-5, 6, (31, 33))
    reference = np.concatenate([a, a + v]).astype(np.float32)
    inside, outside = (a - v).astype(np.float32), (a - v).astype(np.float32)
    outside[:, 0] += np.where(v[:, 0] > 0, -1, 1) * 1e-2  # away from a, or at v = 0 to the side
    assert precision_recall(reference, inside, k=1)["precision"] == 1.0
    assert precision_recall(reference, outside, k=1)["precision"] == 0.0


@pytest.mark.parametrize("offset", [0.0, 3.7, 1e4])
def test_copies_have_balls_of_radius_zero(offset: float) -> None:
    # Four copies of each: the third neighbour of a point is itself again. Only an exact copy is inside.
    points = np.random.default_rng(3).standard_normal((9, 40)).astype(np.float32) + np.float32(offset)
    reference = np.tile(points, (4, 1))
    near = np.nextafter(points, np.float32(np.inf))
    samples = np.concatenate([points[:5], near, points[5:6]])
    result = precision_recall(reference, samples)
    assert result == _brute(reference, samples)
    assert result["precision"] == 6 / 15


def test_three_copies_are_not_enough() -> None:
    points = np.asarray([[0.0], [10.0], [100.0]])
    samples = np.asarray([[10.0], [11.0], [210.0], [190.1], [500.0]])
    # The third neighbour of 0 is 10, of 10 is 0, of 100 is 10: radii 10, 10 and 90.
    assert precision_recall(np.tile(points, (3, 1)), samples)["precision"] == 2 / 5


def test_a_set_against_itself_and_against_a_far_one() -> None:
    reference, samples = _sets()
    assert precision_recall(reference, reference) == {"precision": 1.0, "recall": 1.0}
    assert precision_recall(reference, samples + 1e3) == {"precision": 0.0, "recall": 0.0}
    swapped = precision_recall(samples, reference)
    assert swapped == dict(zip(("recall", "precision"), precision_recall(reference, samples).values(), strict=True))


def test_one_point_many_times() -> None:
    alike = np.full((50, 5), 0.1, np.float32)
    assert precision_recall(alike, alike) == {"precision": 1.0, "recall": 1.0}


def test_far_from_zero_and_with_an_outlier() -> None:
    reference, samples = _sets()
    moved = (reference + np.float32(1e3), samples + np.float32(1e3))
    assert precision_recall(*moved) == _brute(*moved)
    reference[0] = 1e6
    assert precision_recall(reference, samples) == _brute(reference, samples)


@pytest.mark.parametrize(
    ("reference", "samples", "k", "message"),
    [
        (np.zeros(4), np.zeros((4, 2)), 1, r"reference has shape \(4,\)"),
        (np.zeros((4, 2)), np.zeros((4, 3)), 1, "reference has 2 features and samples 3"),
        (
            np.zeros((4, 2)),
            np.zeros((3, 2)),
            3,
            r"samples has shape \(3, 2\): it must be \(n, d\) with at least 4 rows",
        ),
        (np.zeros((4, 2)), np.zeros((4, 2)), 0, "k is 0: it must be at least 1"),
        (np.zeros((4, 2)), np.full((4, 2), np.inf), 1, "samples holds 8 numbers that are not finite"),
    ],
)
def test_bad_arguments_are_named(reference: np.ndarray, samples: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision_recall(reference, samples, k=k)
