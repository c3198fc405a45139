"""One writer per work directory: a file that says who, kept fresh by a heartbeat, and taken over when it is stale.

    <workdir>/.lease.json     {"nonce", "host", "machine", "pid", "started", "verb", "since"}; its time of change is the last heartbeat

Times are the file system's own, so that the clocks of two machines do not matter. What a killed process left on this machine is
seen at once. Of one on another machine, or in another container, only the heartbeat tells: a start waits for the next one, at
most until the last is STALE_SECONDS old. A writer that stood still for so long and was taken for dead finds another's name at
its next heartbeat, and stops.
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

from rar_jax.errors import LeaseError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
LOOK_SECONDS = 0.5
NAME = ".lease.json"
log: logging.Logger = logging.getLogger(__name__)


class Lease:
    """Holds a work directory until `release`. Process 0 takes it for all of a run.

    Raises: LeaseError if another process holds it.
    """

    def __init__(self, folder: pathlib.Path, verb: str) -> None:
        self.path: pathlib.Path = folder / NAME
        self._nonce = secrets.token_hex(8)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._text = json.dumps({"nonce": self._nonce, **this_process(), "verb": verb, "since": since})
        self._lost: str | None = None
        self._released = threading.Event()
        self._take()
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises LeaseError if the lease was lost: another writer took this one for dead."""
        if self._lost is not None:
            raise LeaseError(self._lost)

    def release(self) -> None:
        """Lets others in. Safe to call twice, and from another thread."""
        self._released.set()
        if read_holder(self.path).get("nonce") == self._nonce:
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        for _ in range(3):
            try:
                with self.path.open("x") as file:
                    file.write(self._text)
                return
            except FileExistsError:
                holder = read_holder(self.path)
            who = f"process {holder.get('pid')} on {holder.get('host')} (rar-jax {holder.get('verb')}, since {holder.get('since')})"
            if alive(self.path, holder) and (_is_here(holder) or _beats(self.path, holder, who)):
                raise LeaseError(f"{self.path.parent} is being written to by {who}: wait for it or stop it")
            self._clear(holder)
        raise LeaseError(f"{self.path} is being taken by another process at this moment: start one only")

    def _clear(self, stale: dict[str, Any]) -> None:
        """Removes a stale lease, and no other: of two that found it stale the slower one could meet the quicker one's."""
        aside = self.path.with_name(f"{NAME}.{self._nonce}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if read_holder(aside) != stale:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            holder = read_holder(self.path)
            if holder and holder.get("nonce") != self._nonce:
                self._lost = (
                    f"{self.path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')}, since this one gave "
                    f"no sign of life for {STALE_SECONDS:.0f} s: this one stops"
                )
                return
            with contextlib.suppress(OSError):  # a file server that is away for a moment; or a disk that is full
                os.utime(self.path)


def read_holder(path: pathlib.Path) -> dict[str, Any]:
    """Who holds a lease; {} if none does, or the file is being written."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def this_process() -> dict[str, Any]:
    """{"host", "machine", "pid", "started"}, by which `ended` knows it."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def ended(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine and is none any more; False where that cannot be told from here."""
    return _is_here(holder) and not _started(holder["pid"]) == holder.get("started") is not None


def alive(path: pathlib.Path, holder: dict[str, Any]) -> bool:
    """Whether the holder of a lease still works: its process, where it is of this machine, else its heartbeat."""
    if _is_here(holder):
        return not ended(holder)
    probe = path.with_name(f"{NAME}.now-{secrets.token_hex(4)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - _last_beat(path) < STALE_SECONDS
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _beats(path: pathlib.Path, holder: dict[str, Any], who: str) -> bool:
    """Waits for the next heartbeat of a holder elsewhere; False if it grows stale, or the lease is given back."""
    log.warning("%s may be being written to by %s: waiting for a sign of life", path.parent, who)
    try:
        first = _last_beat(path)
        while alive(path, holder):
            if _last_beat(path) != first:
                return read_holder(path) == holder  # or else it is another's
            time.sleep(LOOK_SECONDS)
    except FileNotFoundError:
        pass
    return False


def _last_beat(path: pathlib.Path) -> float:
    """The file's time of change. Opened for it: what a file server's client remembers of a file may be a minute old."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's pid is one of this process's own world."""
    return holder.get("machine") == _machine() and isinstance(holder.get("pid"), int)


def _machine() -> str:
    """Where a pid means the same: neither another machine of this name, nor a container beside this one."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine began, which tells it from a later one of the same number; None if there is none."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if text[0] == "Z" else text[19]
    except (OSError, IndexError):
        if pathlib.Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return ""
