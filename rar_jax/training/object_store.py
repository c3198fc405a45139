"""A work directory in a bucket: `--workdir gs://BUCKET/PATH` or `s3://BUCKET/PATH`.

The work is done in a local folder (RAR_JAX_SCRATCH, default ~/.cache/rar_jax/<scheme>/BUCKET/PATH), since token stores are mapped into
memory, rows are appended and checkpoints renamed, none of which an object can do. What was made there goes to the bucket while it is
made, so that the same command goes on anywhere else, from the last checkpoint that arrived whole.

    <url>/...             the files of workdir.py; of a checkpoint only those with a manifest, which comes last
    <url>/.writer.json    {"nonce", "host", "pid", ..., "beat", "released"}: who writes here, rewritten at every heartbeat of lease.py
    <folder>/.mirror.json {"nonce", "files": {name: [bytes, time of change in ns]}}: what the bucket has of this folder

Where the last to write was this very folder, nothing is fetched. Buckets are reached by TensorStore, which takes the credentials of the
machine or the environment; AWS_ENDPOINT_URL and TENSORSTORE_GCS_HTTP_URL lead to other servers than Amazon's and Google's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import tensorstore

from rar_jax.config import ConfigError
from rar_jax.training import lease
from rar_jax.training.checkpoint import MANIFEST, write_json
from rar_jax.training.lease import LeaseError, this_process

SCRATCH = "RAR_JAX_SCRATCH"
WRITER, RECORD = ".writer.json", ".mirror.json"
PUSH = "RAR_JAX_PUSH_SECONDS"  # between two looks for what is new in the folder; by default 10
RETRIES = 6  # of a request, within half a minute
SCHEMES = {"gs": "gcs", "s3": "s3"}  # and TensorStore's names of them
_SELF = ("nonce", "host", "pid", "started")
log: logging.Logger = logging.getLogger(__name__)


class ObjectStoreError(RuntimeError):
    """The bucket cannot be read or written: the message says which and why."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this names a place in a bucket, or looks as if it should."""
    return "://" in os.fspath(path)


class Mirror:
    """A place in a bucket and its local folder."""

    def __init__(self, url: str) -> None:
        """Raises: ConfigError for a URL that is none."""
        parts = re.fullmatch(r"(\w+)://([^/]+)/(.+?)/*", url)
        if parts is None or parts[1] not in SCHEMES or ".." in parts[3].split("/"):
            raise ConfigError(
                f"{url}: write gs://BUCKET/PATH or s3://BUCKET/PATH; other storage, mounted, is a path like any other"
            )
        scheme, bucket, path = parts.groups()
        scratch = os.environ.get(SCRATCH) or pathlib.Path.home() / ".cache" / "rar_jax"
        self.url: str = f"{scheme}://{bucket}/{path}"
        self.folder: pathlib.Path = pathlib.Path(scratch) / scheme / bucket / path
        driver = SCHEMES[scheme]
        spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/"}
        spec["context"] = {f"{driver}_request_retries": {"max_retries": RETRIES}}
        if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
            spec["endpoint"] = endpoint
            spec["aws_region"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        with self._bucket_errors():
            self._store: Any = tensorstore.KvStore.open(spec).result()
        self._beating, self._pushing = threading.Lock(), threading.Lock()  # two: a push can take longer than a beat may
        self._nonce = self._read_record()["nonce"]
        self._known: dict[str, Any] | None = None  # what the writer's object says, while this is the writer
        self._stamp: bytes | None = None  # its generation, upon which the next beat is conditional
        self._lost: str | None = None
        self._verb, self._beats = "", 0
        self._ended = threading.Event()

    # ---- one writer

    def take(self, verb: str) -> None:
        """Makes this folder the one that writes, and pushes from then on in the background.

        A writer that died is known by its process on this machine, elsewhere after a minute without a beat, which is waited.
        Raises: LeaseError if another one writes.
        """
        self._verb, until = verb, time.monotonic() + lease.STALE_SECONDS
        first = self._writer()
        holder = first
        while not self._gone(holder) and time.monotonic() < until:
            self._ended.wait(1.0)
            holder = self._writer()
            if holder != first and not self._gone(holder):
                raise LeaseError(
                    f"{self.url} is being written to by process {holder.get('pid')} on {holder.get('host')} "
                    f"(rar-jax {holder.get('verb')}): wait for it or stop it"
                )
        self.pull()
        self._known = holder
        self._beat()
        for work, seconds in ((self._beat, lease.HEARTBEAT_SECONDS), (self.push, float(os.environ.get(PUSH, 10)))):
            threading.Thread(target=self._repeat, args=(work, seconds), daemon=True).start()

    def check(self) -> None:
        """Raises LeaseError if another writer took this one for dead."""
        if self._lost is not None:
            raise LeaseError(self._lost)

    def release(self) -> None:
        """Pushes what is left and lets others in. Raises: ObjectStoreError, LeaseError: what is left is then in the folder only."""
        if self._known is None or self._ended.is_set():
            return
        self._ended.set()
        self.check()
        self.push()
        self._beat(released=True)

    def _repeat(self, work: Any, seconds: float) -> None:
        while not self._ended.wait(seconds) and self._lost is None:
            try:
                work()
            except (ObjectStoreError, OSError) as error:  # what is away for a moment; `release` tries again, and raises
                log.warning("%s; it is tried again", error)
            except LeaseError:
                return

    def _gone(self, holder: dict[str, Any]) -> bool:
        """Whether a writer is known not to write any more: none, one that left, or one whose process was here and ended."""
        return not holder or bool(holder.get("released")) or lease.ended(holder)

    def _writer(self) -> dict[str, Any]:
        with self._bucket_errors():
            found = self._store.read(WRITER).result()
        if found.state == "missing" and self._known is None:
            self._stamp = found.stamp.generation
        return json.loads(found.value) if found.state == "value" else {}

    def _beat(self, released: bool = False) -> None:
        with self._beating:
            holder = self._writer()
            row = {
                "nonce": self._nonce,
                "verb": self._verb,
                "beat": self._beats,
                "released": released,
                **this_process(),
            }
            if holder != self._known and {k: holder.get(k) for k in _SELF} != {k: row[k] for k in _SELF}:
                self._lost = (
                    f"{self.url} was taken over by process {holder.get('pid')} on {holder.get('host')}: this one stops; its last "
                    f"work is in {self.folder} only"
                )
                raise LeaseError(self._lost)
            with self._bucket_errors():
                stamp = self._store.write(WRITER, json.dumps(row).encode(), if_equal=self._stamp).result()
            # Nothing: another one wrote in this moment, or the answer to an earlier beat was lost. The next look tells.
            self._stamp = stamp.generation or None
            self._beats, self._known = self._beats + 1, row

    # ---- to the folder

    def pull(self) -> None:
        """Makes the folder what the bucket has, unless this folder was the last to write there."""
        holder = self._writer()
        if holder.get("nonce") == self._nonce:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            if old.name != lease.NAME:  # held by this process
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        with self._bucket_errors():
            names = [key.decode() for key in self._store.list().result()]
        files: dict[str, list[int]] = {}
        for name in names:
            if name == WRITER:
                continue
            with self._bucket_errors():
                found = self._store.read(name).result()
            if found.state == "value":  # else removed meanwhile
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(found.value)
                files[name] = _signature(path)
        write_json(self.folder / RECORD, {"nonce": self._nonce, "files": files})

    # ---- to the bucket

    def add(self) -> None:
        """Sends what was made in a folder that another one may be writing beside: an evaluation's results."""
        holder = self._writer()
        if holder.get("nonce") != self._nonce or self._gone(holder):  # else the writer of this folder sends it
            self.push()

    def push(self) -> None:
        """Sends what is new or changed, checkpoints after the rest and their manifests last, and removes what is gone.

        Raises: ObjectStoreError; LeaseError if another folder writes there by now.
        """
        with self._pushing:
            self.check()
            record = self._read_record()
            files: dict[str, list[int]] = record["files"]
            there = sorted(
                _files(self.folder), key=lambda name: (name.startswith("checkpoints/"), name.endswith(MANIFEST))
            )
            for name in there:
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    path = self.folder / name
                    if (signature := _signature(path)) != files.get(name):
                        content = path.read_bytes()
                        with self._bucket_errors():
                            self._store.write(name, content).result()
                        files[name] = signature
            # The manifest first: what is half removed does not count.
            for name in sorted(files.keys() - set(there), key=lambda name: not name.endswith(MANIFEST)):
                with self._bucket_errors():
                    self._store.write(name, None).result()
                del files[name]
            if self.folder.is_dir():
                write_json(self.folder / RECORD, record)

    def _read_record(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / RECORD).read_text())
        except (OSError, ValueError):
            return {"nonce": getattr(self, "_nonce", None) or secrets.token_hex(8), "files": {}}

    @contextlib.contextmanager
    def _bucket_errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:  # what TensorStore raises
            if isinstance(error, (ObjectStoreError, LeaseError)):
                raise
            raise ObjectStoreError(
                f"{self.url} cannot be reached ({str(error).splitlines()[0][:300]}): see that the bucket is there and that this machine "
                "may read and write it"
            ) from error


def _signature(path: pathlib.Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _files(folder: pathlib.Path) -> Iterator[str]:
    """Names of the files that the bucket shall have: not those of this machine, nor checkpoints that are being made."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(
            part.startswith(".") or "tmp" in part.split(".")[1:] or "orbax-checkpoint-tmp" in part
            for part in name.parts
        )
        if hidden or not path.is_file():
            continue
        if (
            name.parts[0] == "checkpoints"
            and len(name.parts) > 3
            and not (folder / pathlib.Path(*name.parts[:3]) / MANIFEST).is_file()
        ):
            continue
        yield name.as_posix()
