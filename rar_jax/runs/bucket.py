"""Paths in buckets, gs:// and s3://, with the part of pathlib's interface that checkpoints and token stores need.

TensorStore reaches the buckets, here and for the arrays of checkpoints, with the credentials of the machine or the environment.
AWS_ENDPOINT_URL and TENSORSTORE_GCS_HTTP_URL select other servers. (etils.epath would need TensorFlow or gcsfs and s3fs, and Orbax
0.12.8 writes arrays to gs:// only.)
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import tensorstore

from rar_jax.errors import ConfigError, ObjectStoreError, RarJaxError

DRIVERS = {"gs": "gcs", "s3": "s3"}
ENDPOINTS = ("AWS_ENDPOINT_URL", "TENSORSTORE_GCS_HTTP_URL")
RETRIES = 6  # of a request, within half a minute
# The longest wait for a request and its retries. Large objects take longer: a server that never answers is an error.
WAIT_SECONDS, SECONDS_PER_BYTE = 60.0, 1e-6


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, of a bucket or wrongly written."""
    return "://" in os.fspath(path)


def make_path(path: str | os.PathLike[str]) -> Path:
    """Return a path on a disk or in a bucket. Raises: ConfigError for an invalid bucket URL."""
    if isinstance(path, pathlib.Path | BucketPath):
        return path
    if not is_url(path):
        return pathlib.Path(path)
    scheme, _, rest = os.fspath(path).partition("://")
    if scheme not in DRIVERS or not re.fullmatch(r"[^/]+/+[^/].*", rest) or ".." in rest.split("/"):
        raise ConfigError(
            f"{path} is not a bucket URL: write gs://BUCKET/PATH or s3://BUCKET/PATH, or mount other storage"
        )
    return BucketPath(f"{scheme}:", *rest.split("/"))


def remove_tree(path: Path) -> None:
    """Remove a folder and everything below it, if it is there."""
    if isinstance(path, BucketPath):
        removals = [path.store.write((path / name).key, None) for name in path.names()]
        for removal in removals:
            path.wait(removal)
    else:
        shutil.rmtree(path, ignore_errors=True)


def list_files(folder: Path) -> list[str]:
    """Return the sorted names, relative to a folder, of all files below it."""
    if isinstance(folder, BucketPath):
        return folder.names()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def kvstore_spec(folder: Path) -> dict[str, Any]:
    """Return TensorStore's specification of a folder as a key-value store."""
    if not isinstance(folder, BucketPath):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    scheme, bucket = folder.parts[0][:-1], folder.parts[1]
    driver, key = DRIVERS[scheme], "/".join(folder.parts[2:])
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{key}/" if key else ""}
    spec["context"] = {f"{driver}_request_retries": {"max_retries": RETRIES}}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    return spec


class BucketPath(pathlib.PurePosixPath):
    """A path in a bucket. Folders exist as soon as something is below them. A file is never half written.

    Every method raises ObjectStoreError if the bucket cannot be reached.
    """

    def __str__(self) -> str:
        return f"{self.parts[0]}//{'/'.join(self.parts[1:])}"

    def __fspath__(self) -> str:
        return str(self)

    @property
    def store(self) -> Any:
        """TensorStore's key-value store of the whole bucket."""
        with self.translate_errors():
            return _open_bucket(type(self)(*self.parts[:2]), *map(os.environ.get, ENDPOINTS))

    @property
    def key(self) -> str:
        """The name of the object."""
        return "/".join(self.parts[2:])

    def wait(self, future: Any, size: int = 0) -> Any:
        """Wait for an answer of the bucket."""
        with self.translate_errors():
            return future.result(timeout=WAIT_SECONDS + size * SECONDS_PER_BYTE)

    @contextlib.contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn TensorStore's exceptions into ObjectStoreError."""
        try:
            yield
        except RarJaxError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else str(error).splitlines()[0][:300]
            raise ObjectStoreError(
                f"{self} cannot be reached ({reason}): check that the bucket exists and that this machine may read and write it"
            ) from error

    def names(self) -> list[str]:
        """Return the sorted names of all files below, without the empty objects that web consoles make for folders."""
        prefix = f"{self.key}/"
        keys = self.wait(self.store.list(tensorstore.KvStore.KeyRange(prefix, f"{self.key}0")))  # "0" follows "/"
        names = (key.decode().removeprefix(prefix) for key in keys if key.startswith(prefix.encode()))
        return sorted(name for name in names if name and not name.endswith("/"))

    def is_file(self) -> bool:
        found = self.wait(self.store.list(tensorstore.KvStore.KeyRange(self.key, f"{self.key}\0")))
        return self.key.encode() in found

    def is_dir(self) -> bool:
        return bool(self.names())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[BucketPath]:
        return (self / name for name in sorted({name.partition("/")[0] for name in self.names()}))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the files and folders directly below whose name matches."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        found = self.wait(self.store.read(self.key), 2**28)
        if found.state != "value":
            raise FileNotFoundError(f"{self} does not exist")
        return found.value

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        self.wait(self.store.write(self.key, content), len(content))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(f"{self} does not exist")
        self.wait(self.store.write(self.key, None))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder needs no object."""

    def absolute(self) -> BucketPath:
        return self


Path = pathlib.Path | BucketPath


@functools.cache
def _open_bucket(root: BucketPath, *endpoints: str | None) -> Any:
    del endpoints  # a part of the cache's key
    return tensorstore.KvStore.open(kvstore_spec(root)).result(timeout=WAIT_SECONDS)
