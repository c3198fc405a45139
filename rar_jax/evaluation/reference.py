"""Reference statistics and image files, in the names of ADM's evaluation suite.

A reference is a .npz with `mu` (f,), `sigma` (f, f), for sFID `mu_s` (s,), `sigma_s` (s, s), and for precision and
recall `arr_0` uint8 (n, y, x, 3). Some published copies hold only `mu` and `sigma`. Samples are a .npz with `arr_0`.
ADM's files are read, and what is written here ADM's evaluator.py reads; ours also have `meta`, a JSON string.
`arr_0` is 1.97 GB in the ImageNet reference: it is read batch after batch, when asked for.
Shapes: b batch, n images, y x height width, f pool3 features, s spatial features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from rar_jax.errors import ReferenceFileError
from rar_jax.evaluation import npz

__all__ = [
    "ImageFile",
    "Reference",
    "ReferenceFileError",
    "SamplesWriter",
    "read_reference",
    "read_samples",
    "write_reference",
    "write_samples",
]

Path = str | os.PathLike[str]
Float64 = npt.NDArray[np.float64]
Images = npt.NDArray[np.uint8]

POOL3_DIMS, SPATIAL_DIMS = 2048, 2023
_IMAGES = "arr_0"
_LARGEST_SIDE = 4096  # pixels; a header may claim any


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """Images in a .npz; only its header was read."""

    path: pathlib.Path
    num: int
    height: int
    width: int

    def batches(self, batch_size: int) -> Iterator[Images]:
        """Yields read-only (b, y, x, 3) uint8 in the order of the file; the last batch may be shorter.

        Raises: ReferenceFileError, during the iteration, if the file is damaged: its checksum is only known at the end.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        shape = (self.num, self.height, self.width, 3)
        with npz.open_npz(self.path) as file, file.member(_IMAGES) as member:
            if member.shape != shape:
                raise ReferenceFileError(f"{self.path} changed: '{_IMAGES}' was {shape} and is {member.shape}")
            for start in range(0, self.num, batch_size):
                size = min(batch_size, self.num - start)
                data = member.read_exactly(size * math.prod(shape[1:]))
                yield np.frombuffer(data, np.uint8).reshape(size, *shape[1:])


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
    images: ImageFile | None
    n: int | None  # images that the statistics are of
    protocol: str | None  # how the features were made, for example "adm"
    weights_sha256: str | None  # of the network's weights
    source: str | None  # where the images are from


# ---------------------------------------------------------------- statistics


def read_reference(path: Path, *, feature_dims: int = POOL3_DIMS, spatial_dims: int = SPATIAL_DIMS) -> Reference:
    """Reads a reference file, ADM's or one of `write_reference`. Reads it twice: for the sha256, and the statistics.

    Args:
      path: .npz.
      feature_dims: f, the width of `mu`; 2048 for Inception's pool3.
      spatial_dims: s, the width of `mu_s`, if the file has one.

    Raises: ReferenceFileError that names the file, the key and what to do, for a missing or damaged file, a missing
      key, a wrong shape or dtype, pickled objects, numbers that are not finite, or a sigma that is no covariance.
    """
    path = pathlib.Path(path)
    with npz.open_npz(path) as file:
        if "mu" not in file.keys and _IMAGES in file.keys:
            raise ReferenceFileError(
                f"{path} lacks 'mu': it holds images and no statistics. Make them first: rar-jax evaluate "
                f"--make-reference {path}"
            )
        mean, cov = _gaussian(file, "mu", "sigma", feature_dims)
        spatial: tuple[Float64 | None, Float64 | None] = (None, None)
        if "mu_s" in file.keys or "sigma_s" in file.keys:
            spatial = _gaussian(file, "mu_s", "sigma_s", spatial_dims)
        meta = _read_meta(file) if "meta" in file.keys else {}
        images = _image_file(file) if _IMAGES in file.keys else None
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Reference(path, sha256, mean, cov, *spatial, images, **{key: meta.get(key) for key in _META})


def write_reference(
    path: Path,
    *,
    mean: npt.ArrayLike,
    cov: npt.ArrayLike,
    n: int,
    protocol: str,
    weights_sha256: str,
    source: str,
    spatial_mean: npt.ArrayLike | None = None,
    spatial_cov: npt.ArrayLike | None = None,
    images: Images | None = None,
) -> None:
    """Writes a reference file in float64; it has its name only when it is whole, and the same numbers give the same bytes.

    ADM's evaluator.py reads it if it has the spatial statistics, and for precision and recall the images.

    Args:
      path: .npz, replaced if it exists.  mean, cov: (f,), (f, f).  n: images that the statistics are of.
      protocol, weights_sha256, source: as in `Reference`: everything that changes the numbers.
      spatial_mean, spatial_cov: (s,), (s, s), both or neither.
      images: (n', y, x, 3) uint8, for precision and recall, not necessarily all n; may be a memmap.

    Raises: ReferenceFileError for arguments that `read_reference` would refuse.
    """
    path = pathlib.Path(path)
    if (spatial_mean is None) != (spatial_cov is None):
        raise ReferenceFileError(f"{path}: spatial_mean and spatial_cov must both be given, or neither")
    arrays = {"mu": mean, "sigma": cov}
    if spatial_mean is not None and spatial_cov is not None:
        arrays |= {"mu_s": spatial_mean, "sigma_s": spatial_cov}
    arrays = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s"))[: len(arrays) // 2]:
        if arrays[mu].ndim != 1 or arrays[sigma].shape != arrays[mu].shape * 2:
            raise ReferenceFileError(f"{path}: {mu} is {arrays[mu].shape} and {sigma} {arrays[sigma].shape}")
        if not (np.isfinite(arrays[mu]).all() and np.isfinite(arrays[sigma]).all()):
            raise ReferenceFileError(f"{path}: {mu} or {sigma} holds numbers that are not finite")
        _check_covariance(f"{path}, key '{sigma}'", arrays[sigma])
    if images is not None and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
        raise ReferenceFileError(f"{path}: images are {images.dtype} {images.shape}, expected uint8 (n, y, x, 3)")
    meta = {"n": n, "protocol": protocol, "weights_sha256": weights_sha256, "source": source}
    _check_meta(str(path), meta)
    with npz.new_npz(path) as archive:
        for key, values in arrays.items():
            npz.put(archive, key, values)
        npz.put(archive, "meta", np.array(json.dumps(meta, sort_keys=True)))
        if images is not None:
            npz.put(archive, _IMAGES, images)


def _gaussian(file: npz.Npz, mu: str, sigma: str, dims: int) -> tuple[Float64, Float64]:
    mean, cov = file.array(mu, shape=(dims,)), file.array(sigma, shape=(dims, dims))
    _check_covariance(f"{file.path}, key '{sigma}'", cov)
    return mean, cov


def _check_covariance(where: str, cov: Float64) -> None:
    if not np.allclose(cov, cov.T, rtol=1e-4, atol=1e-6 * np.abs(cov).max(initial=0)):
        raise ReferenceFileError(f"{where} is not symmetric: it is no covariance. Make the file again")
    if np.diagonal(cov).min(initial=0) < 0:
        raise ReferenceFileError(f"{where} has a negative variance: it is no covariance. Make the file again")


_META = {"n": int, "protocol": str, "weights_sha256": str, "source": str}


def _read_meta(file: npz.Npz) -> dict[str, Any]:
    where = f"{file.path}, key 'meta'"
    try:
        meta = json.loads(file.text("meta"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ReferenceFileError(f"{where} is no JSON ({error}): write the file anew") from error
    if not isinstance(meta, dict):
        raise ReferenceFileError(f"{where} must be a JSON object")
    _check_meta(where, meta)
    return meta


def _check_meta(where: str, meta: dict[str, Any]) -> None:
    for key, kind in _META.items():
        if key in meta and (not isinstance(meta[key], kind) or isinstance(meta[key], bool)):
            raise ReferenceFileError(f"{where}: {key} is {meta[key]!r}, expected {kind.__name__}")
    if meta.get("n", 2) < 2:
        raise ReferenceFileError(f"{where}: n is {meta['n']}: a covariance needs at least 2 images")


# ---------------------------------------------------------------- images


def read_samples(path: Path) -> ImageFile:
    """The images of a .npz as ADM's evaluator takes them; reads the header of `arr_0`, and no image.

    Raises: ReferenceFileError for a missing or damaged file, or an `arr_0` that is not uint8 (n, y, x, 3).
    """
    with npz.open_npz(pathlib.Path(path)) as file:
        return _image_file(file)


def _image_file(file: npz.Npz) -> ImageFile:
    with file.member(_IMAGES) as member:
        shape = member.shape
        if len(shape) != 4 or shape[3] != 3 or member.dtype != np.uint8 or member.fortran_order:
            raise ReferenceFileError(
                f"{file.path}, key '{_IMAGES}' is {member.dtype} {shape}{' in Fortran order' * member.fortran_order}, "
                "expected uint8 (n, height, width, 3) in C order"
            )
        if min(shape) < 1 or max(shape[1:]) > _LARGEST_SIDE:
            raise ReferenceFileError(
                f"{file.path}, key '{_IMAGES}' has shape {shape}: sides must be 1 to {_LARGEST_SIDE} pixels"
            )
    return ImageFile(file.path, *shape[:3])


class SamplesWriter:
    """Writes images for ADM's evaluator.py, batch after batch, in memory that does not grow with their number.

    with SamplesWriter("samples.npz", num=50_000, height=256, width=256) as writer:
        writer.append(images)

    The file has its name only when it is whole: an error, or a kill, leaves no .npz.

    Args:
      path: .npz, replaced if it exists.  num, height, width: of all images; the header comes first, so they are
        needed at the start, and the writer refuses to finish with another number.

    Raises: ReferenceFileError for wrong images or a wrong number of them.
    """

    def __init__(self, path: Path, *, num: int, height: int, width: int) -> None:
        self.path: pathlib.Path = pathlib.Path(path)
        self._shape = (num, height, width, 3)
        if min(self._shape) < 1:
            raise ReferenceFileError(f"{self.path}: {num} images of {height} x {width} pixels cannot be written")
        self._written = 0
        self._stack = contextlib.ExitStack()
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> Self:
        archive = self._stack.enter_context(npz.new_npz(self.path))
        self._stream = self._stack.enter_context(
            npz.new_member(archive, _IMAGES, shape=self._shape, dtype=np.dtype(np.uint8))
        )
        return self

    def append(self, images: npt.ArrayLike) -> None:
        """Adds images (b, y, x, 3) uint8. Raises: ReferenceFileError, before anything of them is written."""
        if self._stream is None:
            raise ReferenceFileError(f"{self.path}: append needs `with SamplesWriter(...) as writer`")
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self._shape[1:]:
            raise ReferenceFileError(
                f"{self.path}: images are {images.dtype} {images.shape}, expected uint8 (b, {str(self._shape[1:])[1:]}"
            )
        if self._written + len(images) > self._shape[0]:
            raise ReferenceFileError(f"{self.path}: more than the announced {self._shape[0]} images were appended")
        self._stream.write(np.ascontiguousarray(images).data)
        self._written += len(images)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream = None
        if kind is None and self._written != self._shape[0]:
            error = ReferenceFileError(
                f"{self.path}: {self._written} images were appended, {self._shape[0]} were announced: nothing is kept"
            )
            self._stack.__exit__(type(error), error, None)
            raise error
        self._stack.__exit__(kind, error, trace)


def write_samples(path: Path, batches: Iterable[npt.ArrayLike], *, num: int) -> None:
    """Writes an iterator of (b, y, x, 3) uint8 batches, `num` images in all, as `SamplesWriter` does.

    Raises: ReferenceFileError as there, or if there is no batch.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None or np.ndim(first) != 4:
        raise ReferenceFileError(f"{path}: the first batch is {np.shape(first) if first is not None else 'missing'}")
    with SamplesWriter(path, num=num, height=np.shape(first)[1], width=np.shape(first)[2]) as writer:
        writer.append(first)
        for batch in iterator:
            writer.append(batch)
