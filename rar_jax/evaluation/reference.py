"""Reference statistics, in the names of ADM's evaluation suite.

A reference is a .npz with `mu` (f,), `sigma` (f, f), for sFID `mu_s` (s,), `sigma_s` (s, s), and for precision, recall
and KID `arr_0` uint8 (n, y, x, 3). Some published copies hold only `mu` and `sigma`. ADM's evaluator.py reads what is
written here; our files also have `meta`, a JSON string. Shapes: f pool3 features, s spatial features.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rar_jax.errors import ReferenceFileError
from rar_jax.evaluation import npz
from rar_jax.evaluation.image_sets import NpzImages
from rar_jax.metrics.frechet import check_gaussian
from rar_jax.metrics.moments import Float64
from rar_jax.metrics.sums import POOL3, SPATIAL
from rar_jax.runs.manifest import file_sha256


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Statistics that samples are compared with. None: the file does not say.

    ADM's statistics are of more images than `arr_0` holds, so the number of `images` is not `n`.
    """

    path: pathlib.Path
    sha256: str  # of the whole file
    mean: Float64  # (f,)
    cov: Float64  # (f, f), ddof 1
    spatial_mean: Float64 | None  # (s,)
    spatial_cov: Float64 | None  # (s, s)
    images: NpzImages | None
    n: int | None = None  # images that the statistics are of
    protocol: str | None = None  # how the features were made, for example "adm"
    weights_sha256: str | None = None  # of the network's weights
    source: str | None = None  # where the images are from


_META = {"n": int, "protocol": str, "weights_sha256": str, "source": str}


def read_reference(path: str | pathlib.Path, *, feature_dims: int = POOL3, spatial_dims: int = SPATIAL) -> Reference:
    """Read a reference file, ADM's or our own.

    feature_dims, spatial_dims: widths of `mu` and, if the file has one, `mu_s`.
    Raises: ReferenceFileError for a missing, damaged or hostile file, or numbers that are no mean and covariance.
    """
    path = pathlib.Path(path)
    with npz.open_npz(path) as archive:
        keys = npz.list_arrays(archive)
        if "mu" not in keys and npz.IMAGES in keys:
            raise ReferenceFileError(
                f"{path} lacks 'mu': it holds images and no statistics. Make them with rar-jax evaluate "
                f"--make-reference {path}"
            )
        mean, cov = _read_statistics(archive, "mu", feature_dims)
        spatial: tuple[Float64 | None, Float64 | None] = (None, None)
        if "mu_s" in keys or "sigma_s" in keys:
            spatial = _read_statistics(archive, "mu_s", spatial_dims)
        meta = _read_meta(archive) if "meta" in keys else {}
    images = NpzImages(path) if npz.IMAGES in keys else None
    return Reference(path, file_sha256(path), mean, cov, *spatial, images, **meta)


def write_reference(
    path: pathlib.Path,
    *,
    mean: npt.ArrayLike,
    cov: npt.ArrayLike,
    n: int,
    protocol: str,
    weights_sha256: str,
    source: str,
    spatial_mean: npt.ArrayLike | None = None,
    spatial_cov: npt.ArrayLike | None = None,
    images: tuple[tuple[int, ...], Iterable[np.ndarray]] | None = None,
) -> None:
    """Write a reference file in float64; the same numbers give the same bytes.

    n, protocol, weights_sha256, source: as in `Reference`. spatial_mean, spatial_cov: both or neither.
    images: shape and batches as in `npz.write_npz`, for precision, recall and KID; not necessarily all n.
    Raises: ReferenceFileError for statistics that `read_reference` would refuse.
    """
    statistics = {"mu": mean, "sigma": cov, "mu_s": spatial_mean, "sigma_s": spatial_cov}
    arrays = {key: np.asarray(value, np.float64) for key, value in statistics.items() if value is not None}
    for key in ("mu", "mu_s")[: 1 if spatial_mean is None else 2]:
        _check_statistics(path, key, arrays[key], arrays[key.replace("mu", "sigma")])
    meta = {"n": n, "protocol": protocol, "weights_sha256": weights_sha256, "source": source}
    npz.write_npz(path, {**arrays, "meta": json.dumps(meta, sort_keys=True)}, images)


def _read_statistics(archive: zipfile.ZipFile, key: str, dims: int) -> tuple[Float64, Float64]:
    sigma = key.replace("mu", "sigma")
    mean = npz.read_array(archive, key, shape=(dims,), kind="f")
    cov = npz.read_array(archive, sigma, shape=(dims, dims), kind="f")
    return _check_statistics(archive.filename, key, mean, cov)


def _check_statistics(path: Any, key: str, mean: np.ndarray, cov: np.ndarray) -> tuple[Float64, Float64]:
    try:
        return check_gaussian(mean, np.ascontiguousarray(cov))
    except ValueError as error:
        raise ReferenceFileError(f"{path}, key '{key}': {error}: make the file again") from error


def _read_meta(archive: zipfile.ZipFile) -> dict[str, Any]:
    where, text = f"{archive.filename}, key 'meta'", str(npz.read_array(archive, "meta", shape=(), kind="U"))
    try:
        meta = dict(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ReferenceFileError(f"{where} is not a JSON object ({error}): make the file again") from error
    for key, kind in _META.items():
        if type(meta.get(key, kind())) is not kind:
            raise ReferenceFileError(f"{where}: {key} is {meta[key]!r}, expected {kind.__name__}")
    if meta.get("n", 2) < 2:
        raise ReferenceFileError(f"{where}: n is {meta['n']}: a covariance needs at least 2 images")
    return {key: meta[key] for key in _META if key in meta}
