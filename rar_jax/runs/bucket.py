"""Objects below gs://BUCKET/PATH or s3://BUCKET/PATH, many in flight at once, each waited for within bounds.

Buckets are reached by TensorStore, which takes the credentials of the machine or the environment; AWS_ENDPOINT_URL and
TENSORSTORE_GCS_HTTP_URL lead to other servers than Amazon's and Google's.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tensorstore

from rar_jax.errors import ConfigError, ObjectStoreError

RETRIES = 6  # of a request, within half a minute
SCHEMES = {"gs": "gcs", "s3": "s3"}  # and TensorStore's names of them
REQUESTS, BYTES = 32, 2**28  # in flight at once, so that memory stays small and a slow line is shared by few
READS = 8  # of objects whose size is not known beforehand
# What a request may take, with its retries, and what the bytes that share the line with it may add: a server that takes what it
# is sent and never answers is an error, not a wait.
WAIT_SECONDS, SECONDS_A_BYTE = 60.0, 1e-6


class Bucket:
    """A place in a bucket. Names are relative to it."""

    def __init__(self, url: str) -> None:
        """Raises: ConfigError for a URL that is none."""
        parts = re.fullmatch(r"(\w+)://([^/]+)/(.+?)/*", url)
        if parts is None or parts[1] not in SCHEMES or ".." in parts[3].split("/"):
            raise ConfigError(
                f"{url}: write gs://BUCKET/PATH or s3://BUCKET/PATH; other storage, mounted, is a path like any other"
            )
        scheme, bucket, path = parts[1], parts[2], parts[3]
        self.place: tuple[str, str, str] = (scheme, bucket, path)
        self.url: str = f"{scheme}://{bucket}/{path}"
        driver = SCHEMES[scheme]
        spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/"}
        spec["context"] = {f"{driver}_request_retries": {"max_retries": RETRIES}}
        if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
            spec["endpoint"] = endpoint
            spec["aws_region"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        with self._errors():
            self._store: Any = tensorstore.KvStore.open(spec).result(timeout=WAIT_SECONDS)

    def names(self) -> list[str]:
        """Of all objects, sorted, but for what stands for a folder: web pages make an empty object "PATH/" or "PATH/x/" for one."""
        names = (key.decode() for key in self._wait(self._store.list()))
        return sorted(name for name in names if name and not name.endswith("/"))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Contents, in the order of the names; None for what is not there."""
        flying: collections.deque[tuple[str, Any]] = collections.deque()
        names = iter(names)
        while True:
            for name in names:
                flying.append((name, self._store.read(name)))
                if len(flying) == READS:
                    break
            if not flying:
                return
            name, future = flying.popleft()
            found = self._wait(future, BYTES)
            yield name, found.value if found.state == "value" else None

    def write(self, contents: Iterable[tuple[str, bytes | None]]) -> Iterator[str]:
        """Writes objects, or removes those whose content is None; yields the names that the server acknowledged."""
        flying: collections.deque[tuple[str, int, Any]] = collections.deque()
        size = 0
        try:
            for name, content in contents:
                with self._errors():
                    flying.append((name, len(content or b""), self._store.write(name, content)))
                size += flying[-1][1]
                while len(flying) == REQUESTS or (flying and size > BYTES):
                    size -= flying[0][1]
                    yield self._landed(flying, size)
            while flying:
                yield self._landed(flying, size)
        finally:  # after an error, too: none may arrive later than what is written next
            for _, length, future in flying:
                with contextlib.suppress(ObjectStoreError):
                    self._wait(future, size + length)

    def _landed(self, flying: collections.deque[tuple[str, int, Any]], size: int) -> str:
        name, length, future = flying.popleft()
        self._wait(future, size + length)
        return name

    def read_one(self, name: str) -> tuple[bytes | None, bytes]:
        """The content of an object, None if it is not there, and the generation upon which `write_if` is conditional."""
        found = self._wait(self._store.read(name))
        return found.value if found.state == "value" else None, found.stamp.generation

    def write_if(self, name: str, content: bytes, generation: bytes) -> bool:
        """Writes if the object is still of that generation. Returns whether it was."""
        return bool(self._wait(self._store.write(name, content, if_equal=generation)).generation)

    def _wait(self, future: Any, size: int = 0) -> Any:
        with self._errors():
            return future.result(timeout=WAIT_SECONDS + size * SECONDS_A_BYTE)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:  # what TensorStore raises
            reason = "it does not answer" if isinstance(error, TimeoutError) else str(error).splitlines()[0][:300]
            raise ObjectStoreError(
                f"{self.url} cannot be reached ({reason}): see that the bucket is there and that this machine may read and write it"
            ) from error
