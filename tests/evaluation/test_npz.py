"""Hostile and damaged files: each gives one ReferenceFileError, runs nothing, and takes little memory."""

import io
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from rar_jax.errors import ReferenceFileError
from rar_jax.evaluation.image_sets import NpzImages
from rar_jax.evaluation.reference import read_reference


class _Bomb:
    """Pickled inside an object array: reading it makes a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def _header(shape: tuple[int, ...], descr: str, version: tuple[int, int] = (1, 0)) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


def _zip(path: pathlib.Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _statistics(dims: int = 4) -> dict[str, bytes]:
    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    return {"mu.npy": npy(np.zeros(dims)), "sigma.npy": npy(np.eye(dims))}


def _check_refused(path: pathlib.Path, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ReferenceFileError, match=message) as caught:
            read_reference(path, feature_dims=4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 4e6


@pytest.mark.parametrize("key", ["mu", "sigma", "meta", "arr_0"])
def test_pickled_objects_are_refused_and_not_run(tmp_path: pathlib.Path, key: str) -> None:
    ran = tmp_path / "ran"
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4)}
    objects = np.empty(4, object)
    objects[:] = _Bomb(ran)
    np.savez(tmp_path / "hostile.npz", **(arrays | {key: objects}), allow_pickle=True)
    _check_refused(tmp_path / "hostile.npz", f"'{key}' holds pickled objects, which can run code")
    assert not ran.exists()


def test_a_bare_pickle_as_a_member_is_refused_and_not_run(tmp_path: pathlib.Path) -> None:
    ran = tmp_path / "ran"
    _check_refused(
        _zip(tmp_path / "a.npz", _statistics() | {"mu.npy": pickle.dumps(_Bomb(ran))}), "magic string is not"
    )
    (tmp_path / "b.npz").write_bytes(pickle.dumps(_Bomb(ran)))
    _check_refused(tmp_path / "b.npz", "cannot be read as .npz")
    assert not ran.exists()


def test_a_structured_dtype_with_an_object_inside_is_refused(tmp_path: pathlib.Path) -> None:
    header = _header((4,), "PLACE").replace(b"'PLACE'", b"[('a', '<f8'), ('b', '|O')]")
    header = header[:8] + struct.pack("<H", len(header) - 10) + header[10:]
    _check_refused(
        _zip(tmp_path / "a.npz", _statistics() | {"mu.npy": header + bytes(64)}), "'mu' holds pickled objects"
    )


def test_what_is_no_file_or_no_zip(tmp_path: pathlib.Path) -> None:
    _check_refused(tmp_path / "missing.npz", "there is no such file")
    _check_refused(tmp_path, "cannot be read as .npz")
    for content in (b"", b"PK\x03\x04", b"<html>404 Not Found</html>" * 100):
        (tmp_path / "page.npz").write_bytes(content)
        _check_refused(tmp_path / "page.npz", "cannot be read as .npz.*get it again")
    np.save(tmp_path / "one.npy", np.zeros(4))
    _check_refused(tmp_path / "one.npy", "cannot be read as .npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_truncated_anywhere(tmp_path: pathlib.Path, compression: int) -> None:
    whole = _zip(tmp_path / "whole.npz", _statistics(), compression).read_bytes()
    for size in range(0, len(whole) - 1, 13):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(ReferenceFileError, match=r"cut\.npz"):
            read_reference(tmp_path / "cut.npz", feature_dims=4)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_damaged_byte_is_an_error_or_changes_nothing(tmp_path: pathlib.Path, compression: int) -> None:
    whole = bytearray(_zip(tmp_path / "whole.npz", _statistics(), compression).read_bytes())
    refused = 0
    for position in range(0, len(whole), 3):
        damaged = whole.copy()
        damaged[position] ^= 0x5B
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            ours = read_reference(tmp_path / "damaged.npz", feature_dims=4)
        except ReferenceFileError:
            refused += 1
        else:  # dates, attributes and the like
            np.testing.assert_array_equal(ours.mean, np.zeros(4))
            np.testing.assert_array_equal(ours.cov, np.eye(4))
    assert refused > len(whole) / 3 / 2


def test_damaged_images_are_found_by_the_checksum(tmp_path: pathlib.Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 50, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    content = (tmp_path / "a.npz").read_bytes()
    at = content.index(images.tobytes()) + 30_000  # beyond what opening reads
    (tmp_path / "a.npz").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    for batch_size in (1, 4, 6):
        images_of_file = NpzImages(tmp_path / "a.npz")
        with pytest.raises(ReferenceFileError, match="Bad CRC-32"):
            for start in range(0, 6, batch_size):
                images_of_file.read(start, min(batch_size, 6 - start))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_checksum_is_compared(tmp_path: pathlib.Path, compression: int) -> None:
    # Another checksum in the directory, and not a damaged byte, which inflating may notice before.
    pixels = {"arr_0.npy": _header((6, 50, 40, 3), "|u1") + bytes(6 * 50 * 40 * 3)}
    content = bytearray(_zip(tmp_path / "a.npz", pixels | _statistics(), compression).read_bytes())
    for name in (b"mu.npy", b"arr_0.npy"):
        content[content.rindex(name) - 46 + 16] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    _check_refused(tmp_path / "a.npz", "Bad CRC-32")
    for batch_size in (1, 4, 6):
        images_of_file = NpzImages(tmp_path / "a.npz")
        with pytest.raises(ReferenceFileError, match="Bad CRC-32"):
            for start in range(0, 6, batch_size):
                images_of_file.read(start, min(batch_size, 6 - start))


def test_a_file_that_changed_since_it_was_opened(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 5, 4, 3), np.uint8))
    file = NpzImages(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", np.zeros((3, 5, 4, 3), np.uint8))
    with pytest.raises(ReferenceFileError, match=r"changed: 'arr_0' was \(2, 5, 4, 3\), is \(3, 5, 4, 3\)"):
        file.read(0, 2)


def test_a_bomb_of_zeros_is_never_inflated(tmp_path: pathlib.Path) -> None:
    # 64 MB of zeros in 64 KB, as a mu of its size and as one that lies about its shape.
    zeros = bytes(8 << 23)
    for shape, message in (((1 << 23,), r"'mu' is float64 \(8388608,\), expected"), ((4,), "'mu' has 67108.* bytes")):
        mu = _header(shape, "<f8") + zeros
        _check_refused(
            _zip(tmp_path / "bomb.npz", _statistics() | {"mu.npy": mu}, zipfile.ZIP_DEFLATED),
            message,
        )


def test_declared_sizes_that_no_compression_reaches(tmp_path: pathlib.Path) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        mu = _header((4,), "<f8") + bytes(32)
        path = _zip(tmp_path / "bomb.npz", {"mu.npy": mu, "sigma.npy": _statistics()["sigma.npy"]}, compression)
        content = bytearray(path.read_bytes())
        directory = content.index(b"PK\x01\x02")
        _, size = struct.unpack_from("<II", content, directory + 20)
        assert size == len(mu)
        struct.pack_into("<I", content, directory + 24, 1 << 31)
        path.write_bytes(content)
        _check_refused(path, "'mu' claims a size or a compression")
        # Both sizes may lie.
        struct.pack_into("<I", content, directory + 20, 1 << 31)
        path.write_bytes(content)
        _check_refused(path, "'mu' claims a size or a compression")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (_header((1 << 40, 1 << 40), "<f8"), "takes 9671406556917033397649502"),
        (_header((), "<U1000000"), "but <U1000000 .* takes 40000"),
        (_header((-4,), "<f8"), "'mu'"),
        (_header((-2, -2), "<f8"), "'mu'"),
        (_header((4,), "<f8", version=(2, 0)), r"version \(2, 0\) of NumPy's format, expected \(1, 0\)"),
        (b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff", "version"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"__import__('os')", "cannot be read as .npz"),
        (b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 8192, "cannot be read as .npz"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535, "cannot be read as .npz"),
        (_header((4,), "<f99"), "cannot be read as .npz"),
    ],
    ids=["huge", "long text", "negative", "negative twice", "version", "long header", "code", "deep", "wide", "dtype"],
)
def test_hostile_headers(tmp_path: pathlib.Path, header: bytes, message: str) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = _zip(tmp_path / "hostile.npz", _statistics() | {"mu.npy": header + bytes(32)}, compression)
        _check_refused(path, message)


def test_other_compression_and_encryption(tmp_path: pathlib.Path) -> None:
    _check_refused(
        _zip(tmp_path / "a.npz", _statistics(), zipfile.ZIP_LZMA), "claims a size or a compression that NumPy does not"
    )
    content = bytearray(_zip(tmp_path / "d.npz", _statistics()).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "d.npz").write_bytes(content)
    _check_refused(tmp_path / "d.npz", "is encrypted")


def test_images_that_are_pickled_are_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", np.array([np.zeros((2, 2, 3), np.uint8), None], object), allow_pickle=True)
    with pytest.raises(ReferenceFileError, match="'arr_0' holds pickled objects"):
        NpzImages(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 2, 2, 3), np.uint8))
    with pytest.raises(ReferenceFileError, match="lacks 'arr_0': it holds images"):
        NpzImages(tmp_path / "b.npz")
