"""Buckets for tests: servers of Google's and Amazon's kind on this machine, and a store that is cut off at any of its requests."""

from __future__ import annotations

import contextlib
import pathlib
import random
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rar_jax.runs import checkpoint, object_store
from rar_jax.runs.object_store import RECORD, WRITER, Mirror

GOOGLE = pathlib.Path(__file__).with_name("google_server.py")
SERVERS = {"gs": (str(GOOGLE), "{port}"), "s3": ("-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}")}


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[dict[str, str]]:
    """Environment variables that lead to a server with a bucket named "bucket"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *(word.format(port=port) for word in SERVERS[scheme])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if not client.connect_ex(("127.0.0.1", port)):
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port}"
        if scheme == "gs":
            yield {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}
        else:
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
            keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
            yield {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", **keys}
    finally:
        process.kill()
        process.wait()


class Machine:
    """What has a scratch folder of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scratch: pathlib.Path) -> None:
        self._monkeypatch, self._scratch = monkeypatch, scratch

    def mirror(self, url: str) -> Mirror:
        self._monkeypatch.setenv(object_store.SCRATCH, str(self._scratch))
        return Mirror(url)


class Cut(BaseException):
    """The process was killed."""


class Store:
    """TensorStore's part that bucket.py uses, over a dict. What was asked for happens when it is waited for.

    Args:
      left: so many times something is asked or waited for until the process is killed: of what is not yet waited for some has happened.
      seen: called before each.
    """

    def __init__(
        self, objects: dict[str, bytes], left: int, seed: int = 0, seen: Callable[[str], None] = lambda name: None
    ) -> None:
        self.objects, self.left, self.dead = objects, left, False
        self.order: list[str] = []
        self._seen, self._random = seen, random.Random(f"{left} {seed}")
        self._asked: list[tuple[str, bytes | None]] = []

    def write(self, name: str, content: bytes | None, if_equal: Any = None) -> Any:
        del if_equal
        if name == WRITER:  # beats are not counted
            self._do((name, content))
            return _future(lambda: types.SimpleNamespace(generation=b"1"))
        self._seen(name)
        self._live()
        self.order.append(name)
        self._asked.append((name, content))
        return _future(lambda one=self._asked[-1]: self._answer(one))

    def read(self, name: str) -> Any:
        state = "value" if name in self.objects else "missing"
        found = types.SimpleNamespace(state=state, value=self.objects.get(name))
        found.stamp = types.SimpleNamespace(generation=b"1")
        return _future(lambda: found)

    def list(self) -> Any:
        return _future(lambda: [name.encode() for name in self.objects])

    def _answer(self, one: tuple[str, bytes | None]) -> Any:
        self._live()
        if one in self._asked:
            self._asked.remove(one)
            self._do(one)
        return types.SimpleNamespace(generation=b"1")

    def _live(self) -> None:
        if self.left == 0 and not self.dead:
            for one in self._asked:
                if self._random.random() < 0.5:
                    self._do(one)
            self.dead = True
        if self.dead:
            raise Cut
        self.left -= 1

    def _do(self, one: tuple[str, bytes | None]) -> None:
        name, content = one
        if content is None:
            self.objects.pop(name, None)
        else:
            self.objects[name] = content


def _future(answer: Callable[[], Any]) -> Any:
    return types.SimpleNamespace(result=lambda timeout=None: answer())


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: pathlib.Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != RECORD
    }


def step(folder: pathlib.Path, number: int, text: str) -> None:
    """A checkpoint of two files, with the row of metrics that leads to it."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{number}\n")
    at = f"checkpoints/generator/{number}"
    write(folder, {f"{at}/state/d/0": text, f"{at}/meta/metadata": f"{number} {text}"})
    checkpoint.write_manifest(folder / at)


def steps(folder: pathlib.Path, stage: str = "generator") -> list[int]:
    """Those that verify; what has a manifest must."""
    found = [int(path.parent.name) for path in folder.glob(f"checkpoints/{stage}/*/{checkpoint.MANIFEST}")]
    assert sorted(found, reverse=True) == [n for n, _ in checkpoint.good_steps(folder / "checkpoints" / stage)]
    return sorted(found)


def with_store(mirror: Mirror, store: Store) -> Mirror:
    mirror.bucket._store = store
    return mirror
