"""A work directory in a bucket: `--workdir gs://BUCKET/PATH` or `s3://BUCKET/PATH`.

The work is done in a local folder (RAR_JAX_SCRATCH, default ~/.cache/rar_jax/<scheme>/BUCKET/PATH), since token stores are mapped into
memory, rows are appended and checkpoints renamed, none of which an object can do. What was made there goes to the bucket while it is
made, so that the same command goes on anywhere else, from the last checkpoint that arrived whole.

    <url>/...             the files of workdir.py; a checkpoint without its manifest, which comes last, is none
    <url>/.writer.json    {"nonce", "host", "pid", ..., "beat", "released"}: who writes here, rewritten at every heartbeat of lease.py
    <folder>/.mirror.json {"nonce", "files": {name: [bytes, time of change in ns]}}: what the bucket has of this folder
    <folder>/.sending/    the checkpoint that is on its way, by hard links: retention may remove it meanwhile

At whatever point a push is cut off, what the bucket then holds can be gone on from: files that say that others are whole (manifests,
cards, results: all JSON) are read before those are listed and sent after them, rows are sent before the steps that they lead to, and a
step that is gone here is removed there once one that is here has arrived. Where the last to write was this very folder, nothing is fetched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from rar_jax.errors import CheckpointError, LeaseError, ObjectStoreError
from rar_jax.runs import lock as lease
from rar_jax.runs.bucket import Bucket
from rar_jax.runs.lock import this_process
from rar_jax.runs.manifest import MANIFEST, verify_manifest, write_json

SCRATCH = "RAR_JAX_SCRATCH"
WRITER, RECORD, SENDING = ".writer.json", ".mirror.json", ".sending"
PUSH = "RAR_JAX_PUSH_SECONDS"  # between two looks for what is new in the folder; by default 10
PATIENCE_SECONDS = 600.0  # so long may the bucket be away before the run stops
CONFIG = "config.json"  # a work directory without it is none: the first thing there
LOOKS = 3  # at who writes, for one beat
_SELF = ("nonce", "host", "pid", "started")
_UNFINISHED = re.compile(r"^\.|\.(tmp|partial)$|\.tmp\.")  # being written, or of this machine
log: logging.Logger = logging.getLogger(__name__)

Signature = list[int]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this names a place in a bucket, or looks as if it should."""
    return "://" in os.fspath(path)


class Mirror:
    """A place in a bucket and its local folder."""

    def __init__(self, url: str) -> None:
        """Raises: ConfigError for a URL that is none."""
        self.bucket: Bucket = Bucket(url)
        self.url: str = self.bucket.url
        scratch = os.environ.get(SCRATCH) or pathlib.Path.home() / ".cache" / "rar_jax"
        self.folder: pathlib.Path = pathlib.Path(scratch).joinpath(*self.bucket.place)
        self._beating, self._pushing = threading.Lock(), threading.Lock()  # two: a push can take longer than a beat may
        self._nonce, self._files = self._read_record()
        self._damaged: dict[str, Signature] = {}  # manifests of steps that do not verify, told once
        self._known: dict[str, Any] | None = None  # what the writer's object says, while this is the writer
        self._held = -math.inf  # when the last beat that arrived was begun
        self._lost: str | None = None
        self._failed: str | None = None
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
        there = set(self.bucket.names()) - {WRITER}
        # Neither sent from here nor here: what another folder added meanwhile (`add`). It would be removed there, as gone.
        added = {name for name in there - self._files.keys() if _step_of(name) is None}
        self._fetch(name for name in added if not (self.folder / name).exists())
        # What a push that was cut off had sent or removed without writing it down: to be sent again, or removed.
        self._files = {name: self._files.get(name) for name in there}
        self._write_record()
        for work, seconds in ((self._beat, lease.HEARTBEAT_SECONDS), (self.push, float(os.environ.get(PUSH, 10)))):
            threading.Thread(target=self._repeat, args=(work, seconds), daemon=True).start()

    def check(self) -> None:
        """Raises LeaseError if another writer took this one for dead, ObjectStoreError if the bucket has been away for too long."""
        if self._lost is not None:
            raise LeaseError(self._lost)
        if self._failed is not None:
            raise ObjectStoreError(self._failed)

    def release(self) -> None:
        """Pushes what is left and lets others in. Raises: ObjectStoreError, LeaseError: what is left is then in the folder only."""
        if self._known is None or self._ended.is_set():
            return
        self._ended.set()
        self.push()
        self._beat(released=True)

    def _repeat(self, work: Callable[[], None], seconds: float) -> None:
        good = time.monotonic()
        while not self._ended.wait(seconds):
            try:
                work()
                good = time.monotonic()
            except LeaseError:
                return
            except (ObjectStoreError, OSError) as error:  # it may be away for a moment
                log.warning("%s; it is tried again", error)
                if (away := time.monotonic() - good) > PATIENCE_SECONDS:
                    self._failed = f"{error}. For {away:.0f} s now: the work so far is in {self.folder}, and the same command goes on from there"
                    return
            except Exception as error:
                self._failed = f"{self.url}: {type(error).__name__}: {error}; the work so far is in {self.folder}"
                raise

    def _gone(self, holder: dict[str, Any]) -> bool:
        """Whether a writer is known not to write any more: none, one that left, or one whose process was here and ended."""
        return not holder or bool(holder.get("released")) or lease.ended(holder)

    def _writer(self) -> dict[str, Any]:
        return self._look()[0]

    def _look(self) -> tuple[dict[str, Any], bytes]:
        """The writer, {} if there is none, and the generation of what says so."""
        found, generation = self.bucket.read_one(WRITER)
        return json.loads(found) if found is not None else {}, generation

    def _beat(self, released: bool = False) -> None:
        """Says that this is the writer, upon the condition that none has come since it was."""
        with self._beating:
            for _ in range(LOOKS):
                began = time.monotonic()
                holder, generation = self._look()
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
                self._beats += 1
                if self.bucket.write_if(WRITER, json.dumps(row).encode(), generation):
                    self._held, self._known = began, row
                    return
                # Another one wrote in this moment, or the request was sent twice: the next look tells.
            raise ObjectStoreError(f"{self.url}: {WRITER} changes whenever it is written, and does not say by whom")

    def _hold(self) -> None:
        """Before anything is sent or removed: who was cut off, or stood still, and may soon be taken for dead asks the bucket first.

        Raises: LeaseError if another writer has come. Who only adds beside one (`add`) has nothing to hold.
        """
        if self._lost is not None:
            raise LeaseError(self._lost)
        if self._known is not None and time.monotonic() - self._held > lease.STALE_SECONDS / 2:
            self._beat()

    def writer(self) -> dict[str, Any] | None:
        """Who writes, or died elsewhere and could not say so; None if nobody does."""
        holder = self._writer()
        return None if self._gone(holder) else holder

    # ---- to the folder

    def fetch(self) -> None:
        """`pull`, by who does not hold the folder. Raises: LeaseError if another process of this machine does."""
        if self._is_last():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = lease.Lease(self.folder, "fetch")
        try:
            self.pull()
        finally:
            held.release()

    def pull(self) -> None:
        """Makes the folder what the bucket has, unless this folder was the last to write there."""
        if self._is_last():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.iterdir():
            if old.name != lease.NAME:  # held by this process
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        self._files = {}
        there = set(self.bucket.names()) - {WRITER}
        # Of a step without a manifest there is nothing to be had.
        self._fetch(name for name in there if (step := _step_of(name)) is None or f"{step}/{MANIFEST}" in there)
        self._write_record()

    def _is_last(self) -> bool:
        return self._writer().get("nonce") == self._nonce

    def _fetch(self, names: Iterable[str]) -> None:
        # JSON last, as it is sent: what it names is there by then.
        for name, content in self.bucket.read(sorted(names, key=lambda name: (name.endswith(".json"), name))):
            if content is not None:  # else removed meanwhile
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name(f"{path.name}.tmp")  # half a file that is here would be sent
                unfinished.write_bytes(content)
                unfinished.replace(path)
                self._files[name] = _signature(path)

    # ---- to the bucket

    def add(self) -> None:
        """Sends what was made in a folder that another one may be writing beside: an evaluation's results."""
        holder = self._writer()
        if holder.get("nonce") != self._nonce or self._gone(holder):  # else the writer of this folder sends it
            self.push(remove=False)

    def push(self, remove: bool = True) -> None:
        """Sends what is new or changed, and removes what is gone.

        Raises: ObjectStoreError; LeaseError if another folder writes there by now.
        """
        with self._pushing:
            self._hold()
            try:
                steps = self._steps()
                told = {name: self._read(name) for name in self._loose() if name.endswith(".json")}
                rest = [name for name in self._loose() if not name.endswith(".json")]
                here = CONFIG in told
                self._send({CONFIG: told.get(CONFIG)}.items())
                self._send((name, self._read(name)) for name in rest)
                for step in steps:
                    self._send_step(step)
                self._send(told.items())
                if remove and here:  # else something is wrong with the folder, and not with the bucket
                    self._remove(steps, {*rest, *told})
            finally:
                self._write_record()

    def _send(self, contents: Iterable[tuple[str, tuple[Signature, bytes] | None]]) -> None:
        """Sends what was read, unless it is there already; returns when all of it has arrived."""
        signatures: dict[str, Signature] = {}

        def new() -> Iterator[tuple[str, bytes]]:
            for name, read in contents:
                if read is not None:
                    signatures[name], content = read
                    self._hold()
                    yield name, content

        for name in self.bucket.write(new()):
            self._files[name] = signatures[name]

    def _read(self, name: str, folder: pathlib.Path | None = None) -> tuple[Signature, bytes] | None:
        """A file that the bucket does not have in this state; None if it has, or the file was removed since it was listed."""
        path = (folder or self.folder) / name
        with contextlib.suppress(FileNotFoundError):
            if (signature := _signature(path)) != self._files.get(name):
                return signature, path.read_bytes()
        return None

    def _send_step(self, step: str) -> None:
        """Sends a checkpoint that verifies, and when all of it has arrived its manifest, which makes it count."""
        name, held = f"{step}/{MANIFEST}", self.folder / SENDING
        if (manifest := self._read(name)) is None or manifest[0] == self._damaged.get(name):
            return
        shutil.rmtree(held, ignore_errors=True)  # of a push that was cut off
        try:
            _link_all(self.folder / step, held / step)
            verify_manifest(held / step)
        except (CheckpointError, FileNotFoundError) as error:
            if (self.folder / name).exists():  # else retention removed it while it was linked: a newer one is there
                self._damaged[name] = manifest[0]
                log.warning("%s is not sent to %s: %s", self.folder / step, self.url, error)
            return
        if name in self._files:  # of another training of this step, gone back from: half replaced it must not count
            self._delete([name])
        files = json.loads(manifest[1])["files"]
        self._send((f"{step}/{file}", self._read(f"{step}/{file}", held)) for file in files)
        self._send([(name, manifest)])
        shutil.rmtree(held, ignore_errors=True)

    def _remove(self, steps: Collection[str], loose: Collection[str]) -> None:
        """Removes what is not here, but no step of a stage before one that is here has arrived."""
        arrived = {_stage(step) for step in steps if self._files.get(f"{step}/{MANIFEST}")}

        def gone(name: str) -> bool:
            if (step := _step_of(name)) is None:
                return name not in loose
            return step not in steps and _stage(step) in arrived

        names = [name for name in self._files if gone(name)]
        # The manifest first: what is half removed does not count.
        self._delete([name for name in names if name.endswith(".json")])
        self._delete([name for name in names if not name.endswith(".json")])

    def _delete(self, names: Iterable[str]) -> None:
        self._hold()
        for name in self.bucket.write((name, None) for name in names):
            del self._files[name]

    # ---- what is in the folder

    def _steps(self) -> list[str]:
        """Checkpoints that are whole. Of each stage the newest first; first the stages that are done, on which the others build."""
        manifests = [path for path in self.folder.glob(f"checkpoints/*/*/{MANIFEST}") if path.parent.name.isdigit()]
        made: dict[str, int] = {}
        for path in manifests:
            with contextlib.suppress(FileNotFoundError):
                made[path.parts[-3]] = max(made.get(path.parts[-3], 0), path.stat().st_mtime_ns)
        manifests.sort(key=lambda path: (made.get(path.parts[-3], 0), path.parts[-3], -int(path.parts[-2])))
        return [path.parent.relative_to(self.folder).as_posix() for path in manifests]

    def _loose(self) -> list[str]:
        """Names of the other files that the bucket shall have: not those of this machine, nor what is being made or was set aside."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # a folder that was removed meanwhile
                raise error

        names = []
        for at, folders, files in os.walk(self.folder, onerror=fail):
            inside = pathlib.Path(at).relative_to(self.folder)
            deep = inside.parts[:1] == ("checkpoints",) and len(inside.parts) > 1
            folders[:] = [] if deep else [folder for folder in folders if not folder.startswith(".")]
            names += [(inside / file).as_posix() for file in files if not _UNFINISHED.search(file)]
        return sorted(names)

    # ---- what the bucket has of it

    def _read_record(self) -> tuple[str, dict[str, Signature | None]]:
        try:
            record = json.loads((self.folder / RECORD).read_text())
            return record["nonce"], record["files"]
        except (OSError, ValueError, KeyError):
            return secrets.token_hex(8), {}

    def _write_record(self) -> None:
        if self.folder.is_dir():
            write_json(self.folder / RECORD, {"nonce": self._nonce, "files": self._files})


def _signature(path: pathlib.Path) -> Signature:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _step_of(name: str) -> str | None:
    """The checkpoint that an object is a part of: checkpoints/<stage>/<step>."""
    parts = name.split("/")
    return "/".join(parts[:3]) if parts[0] == "checkpoints" and len(parts) > 3 else None


def _stage(step: str) -> str:
    return step.rpartition("/")[0]


def _link_all(folder: pathlib.Path, to: pathlib.Path) -> None:
    """The same files under another name. Raises: FileNotFoundError for one that is gone."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        link = to / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copy2(path, link)
