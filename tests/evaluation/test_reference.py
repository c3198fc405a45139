import hashlib
import os
import pathlib
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rar_jax.errors import ReferenceFileError
from rar_jax.evaluation import reference
from rar_jax.evaluation.image_sets import NpzImages
from rar_jax.evaluation.npz import write_npz
from rar_jax.evaluation.reference import read_reference

F, S = 6, 4
META: dict[str, Any] = {"n": 50, "protocol": "adm", "weights_sha256": "ab" * 32, "source": "random numbers"}


def _statistics() -> dict[str, np.ndarray]:
    """In ADM's names."""
    rng = np.random.default_rng(0)
    features, spatial = rng.standard_normal((50, F)), rng.standard_normal((50, S))
    return {
        "mu": features.mean(axis=0),
        "sigma": np.cov(features.T),
        "mu_s": spatial.mean(axis=0),
        "sigma_s": np.cov(spatial.T),
    }


def _images(n: int = 7, height: int = 5, width: int = 4) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def _read(path: pathlib.Path) -> reference.Reference:
    return read_reference(path, feature_dims=F, spatial_dims=S)


def _write(path: pathlib.Path, **changes: Any) -> None:
    stats = _statistics()
    arguments = {
        "mean": stats["mu"],
        "cov": stats["sigma"],
        "spatial_mean": stats["mu_s"],
        "spatial_cov": stats["sigma_s"],
        "images": (_images().shape, [_images()]),
    }
    reference.write_reference(path, **(arguments | META | changes))


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8"])
def test_reads_adm_files(tmp_path: pathlib.Path, save: Callable[..., None], dtype: str) -> None:
    stats = {key: value.astype(dtype) for key, value in _statistics().items()}
    path = tmp_path / "VIRTUAL.npz"
    save(path, arr_0=_images(), **stats)
    ours = _read(path)
    for key, value in (
        ("mu", ours.mean),
        ("sigma", ours.cov),
        ("mu_s", ours.spatial_mean),
        ("sigma_s", ours.spatial_cov),
    ):
        assert value is not None and value.dtype == np.float64
        np.testing.assert_array_equal(value, stats[key].astype(np.float64))
    assert ours.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (ours.n, ours.protocol, ours.weights_sha256, ours.source) == (None, None, None, None)
    assert ours.images is not None and ours.images.num == 7
    np.testing.assert_array_equal(ours.images.read(0, 7), _images())


def test_reads_copies_with_mu_and_sigma_alone_and_in_fortran_order(tmp_path: pathlib.Path) -> None:
    stats = _statistics()
    np.savez(tmp_path / "small.npz", mu=stats["mu"], sigma=np.asfortranarray(stats["sigma"]))
    ours = _read(tmp_path / "small.npz")
    np.testing.assert_array_equal(ours.cov, stats["sigma"])
    assert ours.spatial_mean is None and ours.spatial_cov is None and ours.images is None


def test_the_default_sizes_are_those_of_inception(tmp_path: pathlib.Path) -> None:
    np.savez_compressed(
        tmp_path / "adm.npz",
        mu=np.zeros(2048),
        sigma=np.zeros((2048, 2048)),
        mu_s=np.zeros(2023),
        sigma_s=np.zeros((2023, 2023)),
    )
    ours = read_reference(tmp_path / "adm.npz")
    assert ours.cov.shape == (2048, 2048) and ours.spatial_cov is not None and ours.spatial_cov.shape == (2023, 2023)


def test_what_is_written_is_read_by_us_and_by_plain_numpy(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new folder" / "ours.npz"
    _write(path)
    ours, stats = _read(path), _statistics()
    assert {key: getattr(ours, key) for key in META} == META
    np.testing.assert_array_equal(ours.mean, stats["mu"])
    with np.load(path) as plain:  # allow_pickle is off by default
        assert set(plain.files) == {*stats, "meta", "arr_0"}
        for key, value in (*stats.items(), ("arr_0", _images())):
            np.testing.assert_array_equal(plain[key], value)
            assert plain[key].dtype == value.dtype
        assert '"protocol": "adm"' in str(plain["meta"])
    assert os.listdir(path.parent) == ["ours.npz"]


def test_the_same_numbers_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "a.npz")
    _write(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    _write(tmp_path / "b.npz", n=51)
    assert _read(tmp_path / "a.npz").sha256 != _read(tmp_path / "b.npz").sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cov": np.triu(np.ones((F, F)))}, "'mu': the covariance is not symmetric"),
        ({"cov": np.ones((F, F + 1))}, r"mean \(6,\) and covariance \(6, 7\)"),
        ({"mean": np.full(F, np.nan)}, "not finite"),
    ],
)
def test_wrong_statistics_are_not_written(tmp_path: pathlib.Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReferenceFileError, match=message):
        _write(tmp_path / "wrong.npz", **changes)
    assert not os.listdir(tmp_path)


def _damaged(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (_statistics() | changes).items() if value is not None}


def _with(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": None}, "lacks 'mu': it holds sigma, mu_s, sigma_s"),
        ({"sigma": None}, "lacks 'sigma'"),
        ({"mu": None, "arr_0": _images()}, "lacks 'mu': it holds images and no statistics.*evaluate --make-reference"),
        ({"sigma_s": None}, "lacks 'sigma_s'"),
        ({"mu_s": None}, "lacks 'mu_s'"),
        ({"mu": np.zeros(F + 1)}, r"'mu' is float64 \(7,\), expected kind 'f' \(6,\).*another network"),
        ({"sigma": np.zeros((F, F + 1))}, r"'sigma' is float64 \(6, 7\)"),
        ({"mu_s": np.zeros((1, S))}, r"'mu_s' is float64 \(1, 4\)"),
        ({"mu": np.zeros(F, np.int64)}, "'mu' is int64 \\(6,\\), expected kind 'f'"),
        ({"mu": np.zeros(F, np.complex64)}, "'mu' is complex64"),
        ({"mu": _with(_statistics()["mu"], 2, np.nan)}, "'mu': mean or covariance holds 1 numbers that are not finite"),
        (
            {"sigma": _with(_statistics()["sigma"], (1, 1), np.inf)},
            "'mu': mean or covariance holds 1 numbers that are not finite",
        ),
        ({"sigma": _with(_statistics()["sigma"], (1, 2), 9.0)}, "'mu': the covariance is not symmetric"),
        ({"sigma_s": -np.eye(S)}, "'mu_s': the covariance is not symmetric or has a negative variance"),
        ({"arr_0": _images().astype(np.int16)}, r"'arr_0' is int16 \(7, 5, 4, 3\), expected uint8"),
        ({"arr_0": _images()[..., :1]}, r"'arr_0' is uint8 \(7, 5, 4, 1\)"),
        ({"arr_0": _images()[0]}, r"'arr_0' is uint8 \(5, 4, 3\)"),
        ({"arr_0": np.asfortranarray(_images())}, "'arr_0' is .* in C order"),
        ({"arr_0": _images(0)}, "sides must be 1 to 4096 pixels"),
        ({"arr_0": np.zeros((1, 1, 5000, 3), np.uint8)}, "sides must be 1 to 4096 pixels"),
        ({"meta": np.array("no json")}, "'meta' is not a JSON object"),
        ({"meta": np.array("[" * 5000)}, "'meta' is not a JSON object"),
        ({"meta": np.array("[1]")}, "'meta' is not a JSON object"),
        ({"meta": np.array('{"n": true}')}, "n is True, expected int"),
        ({"meta": np.array('{"n": 1}')}, "a covariance needs at least 2"),
        ({"meta": np.zeros(3)}, r"'meta' is float64 \(3,\), expected kind 'U'"),
        ({"meta": np.array(["{}"])}, r"expected kind 'U'"),
    ],
)
def test_wrong_files_are_named(tmp_path: pathlib.Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **_damaged(**changes))
    with pytest.raises(ReferenceFileError, match=message) as caught:
        _read(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_reads_samples_in_batches(tmp_path: pathlib.Path, save: Callable[..., None], batch_size: int) -> None:
    save(tmp_path / "samples.npz", _images(), np.arange(7))  # ADM's scripts save labels as arr_1
    file = NpzImages(tmp_path / "samples.npz")
    assert (file.num, file.shape) == (7, (7, 5, 4, 3))
    batches = [file.read(start, min(batch_size, 7 - start)) for start in range(0, 7, batch_size)]
    np.testing.assert_array_equal(np.concatenate(batches), _images())


def test_neither_reading_nor_writing_holds_all_images(tmp_path: pathlib.Path) -> None:
    batch = np.full((10, 64, 64, 3), 7, np.uint8)  # 0.12 MB
    tracemalloc.start()
    try:
        write_npz(tmp_path / "many.npz", {}, ((1000, 64, 64, 3), (batch for _ in range(100))))
        file = NpzImages(tmp_path / "many.npz")
        total = sum(int(file.read(start, 10)[:, 0, 0, 0].sum()) for start in range(0, 1000, 10))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 7000
    assert peak < 2e6 < os.path.getsize(tmp_path / "many.npz")


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 0, 6)])
def test_written_samples_are_what_savez_writes(tmp_path: pathlib.Path, sizes: tuple[int, ...]) -> None:
    path = tmp_path / "samples.npz"
    write_npz(path, {}, (_images().shape, iter(np.split(_images(), np.cumsum(sizes)[:-1]))))
    np.savez(tmp_path / "theirs.npz", _images())
    assert path.read_bytes() == (tmp_path / "theirs.npz").read_bytes()
    # ADM's evaluator streams only what is stored without compression, under a header of version 1.0.
    assert _images().tobytes() in path.read_bytes() and b"\x93NUMPY\x01\x00" in path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["samples.npz", "theirs.npz"]


def test_an_unfinished_file_leaves_nothing_and_spares_the_old_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "samples.npz"
    write_npz(path, {}, (_images().shape, [_images()]))
    before = path.read_bytes()

    def killed() -> Iterator[np.ndarray]:
        yield _images()
        raise KeyboardInterrupt

    for batches, error in (([_images()[:3]], ValueError), (killed(), KeyboardInterrupt)):
        with pytest.raises(error):
            write_npz(path, {}, (_images().shape, batches))
    for wrong in (_images() / 255.0, _images(7, 4, 5), _images(8)):
        with pytest.raises(ValueError, match="images"):
            write_npz(path, {}, (_images().shape, [wrong]))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["samples.npz"]
