"""One writer per work directory, on a disk or in a bucket: a file that names it, rewritten at every heartbeat.

    <workdir>/.lock.json     {"nonce", "host", "machine", "pid", "started", "verb", "since", "beat", "time"}

Every write is conditional on the file being unchanged (TensorStore's generations). A process that died on this machine is recognised
at once. A process elsewhere counts as dead if its heartbeat stops for STALE_SECONDS: a new writer waits that long before it takes over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

import tensorstore

from rar_jax.errors import LockError
from rar_jax.runs.bucket import WAIT_SECONDS, BucketPath, Path, kvstore_spec

HEARTBEAT_SECONDS, STALE_SECONDS, LOOK_SECONDS = 10.0, 60.0, 0.5
NAME = ".lock.json"
log: logging.Logger = logging.getLogger(__name__)


class Lock:
    """Holds a work directory until `release`. Process 0 takes it for the whole run.

    Raises: LockError if another process holds it.
    """

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder: Path = folder
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        self._me: dict[str, Any] = {"nonce": secrets.token_hex(8), "verb": verb, "since": since, "beat": 0}
        self._me |= {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}
        self._lost: str | None = None
        self._released = threading.Event()
        self._writing = threading.Lock()
        with folder.translate_errors() if isinstance(folder, BucketPath) else contextlib.nullcontext():
            self._generation: bytes = self._take()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raise LockError if another process has taken the lock."""
        if self._lost is not None:
            raise LockError(self._lost)

    def release(self) -> None:
        """Let others in. Safe to call twice; another process's lock stays."""
        with self._writing, contextlib.suppress(ValueError, OSError, RuntimeError):
            if self._lost is None and not self._released.is_set():
                self._released.set()
                _open(self.folder).write(NAME, None, if_equal=self._generation).result(timeout=WAIT_SECONDS)

    def _take(self) -> bytes:
        holder, generation = _read(self.folder)
        first, deadline = holder, time.monotonic() + STALE_SECONDS
        while holder and not has_ended(holder) and time.monotonic() < deadline:
            if _is_here(holder) or (holder["nonce"], holder["beat"]) != (first["nonce"], first["beat"]):
                raise LockError(f"{self.folder} is being written to by {_who(holder)}: wait for it or stop it")
            if holder is first:
                log.warning("%s: waiting for a heartbeat of %s", self.folder, _who(holder))
            time.sleep(LOOK_SECONDS)
            holder, generation = _read(self.folder)
        if not (written := self._write(generation)):
            raise LockError(f"{self.folder} is being locked by another process right now: start only one")
        return written

    def _write(self, generation: bytes) -> bytes:
        """Write the lock if it still has a generation. Returns the new generation, empty if it was not written."""
        content = json.dumps(self._me | {"time": time.time()})
        return _open(self.folder).write(NAME, content, if_equal=generation).result(timeout=WAIT_SECONDS).generation

    def _beat(self) -> None:
        while self._lost is None and not self._released.wait(HEARTBEAT_SECONDS):
            try:
                with self._writing:
                    if not self._released.is_set():
                        self._renew()
            except (ValueError, OSError, RuntimeError) as error:  # a full disk, or a file server or bucket that is away
                log.warning("%s: no heartbeat could be written (%s)", self.folder, str(error)[:200])

    def _renew(self) -> None:
        self._me["beat"] += 1
        if written := self._write(self._generation):
            self._generation = written
            return
        holder, generation = _read(self.folder)
        if holder.get("nonce") == self._me["nonce"]:  # this write was repeated after a lost answer
            self._generation = generation
            return
        stale = f"after {STALE_SECONDS:.0f} s without a heartbeat"
        self._lost = f"{self.folder} was locked by {_who(holder)} {stale}: aborting"


def read_holder(folder: Path) -> dict[str, Any] | None:
    """Return the live process that holds a folder; None if there is none. Of other machines only the heartbeat tells."""
    holder = _read(folder)[0]
    if not holder or has_ended(holder):
        return None
    return holder if _is_here(holder) or time.time() - holder["time"] < STALE_SECONDS else None


def _open(folder: Path) -> Any:
    return tensorstore.KvStore.open(kvstore_spec(folder)).result(timeout=WAIT_SECONDS)


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return the holder, {} if there is none, and the generation of the file."""
    found = _open(folder).read(NAME).result(timeout=WAIT_SECONDS)
    try:
        holder = json.loads(found.value)
        return (holder if {"nonce", "beat", "time"} <= holder.keys() else {}), found.stamp.generation
    except (ValueError, AttributeError):
        return {}, found.stamp.generation


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} (rar-jax {holder.get('verb')}, since {holder.get('since')})"


def has_ended(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; False for processes of other machines."""
    return _is_here(holder) and _started(holder["pid"]) != holder.get("started")


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _machine() and holder.get("started") is not None


def _machine() -> str:
    """Identify the space of process ids: two containers, or two machines of one name, differ."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return when a process started, which distinguishes it from a later one of the same id; None if unknown or ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return None
