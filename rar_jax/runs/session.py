"""What surrounds the work on a work directory: one writer, a ledger of what happened, and SIGTERM heard."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax

from rar_jax.errors import LeaseError, Preempted
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.runs import lock as lease
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.lock import Lease
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.machine import where
from rar_jax.runs.object_store import Mirror, ObjectStoreError
from rar_jax.runs.preemption import Watch
from rar_jax.runs.workdir import Workdir

# How long a process that leaves at once sends to its bucket: with processes.GRACE_SECONDS, which may come before, less than the 10
# seconds that are promised. After a second signal there is only time for the ledger and the lease.
LEAVING_SECONDS, HURRIED_SECONDS = 7.0, 0.5


class Session:
    """`ledger`, `watch`, and `poll`, which long loops call. Without arguments nothing is written and nothing heard."""

    def __init__(
        self, ledger: Ledger | None = None, watch: Watch | None = None, held: Sequence[Lease | Mirror] = ()
    ) -> None:
        self.ledger: Ledger = ledger or Ledger()
        self.watch: Watch = watch or Watch()
        self._held = held

    def check(self) -> None:
        """Raises LeaseError if another writer has come, ObjectStoreError if the bucket has been away for too long."""
        for held in self._held:
            held.check()

    def poll(self) -> None:
        """Raises Preempted if it is time to save and leave, on all processes at the same call, and what `check` does."""
        self.check()
        if self.watch.reached():
            raise Preempted


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _command() -> str | None:
    """What was typed, to be typed again; None within another program."""
    name = pathlib.Path(sys.argv[0])
    ours = name.name == "rar-jax" or name.parts[-2:] == ("rar_jax", "__main__.py")
    return shlex.join(["rar-jax", *sys.argv[1:]]) if ours else None


@contextlib.contextmanager
def session(workdir: Workdir, verb: str, watch: Watch, claim: Callable[[], None]) -> Iterator[Session]:
    """A session of a verb. All processes enter it; process 0 holds the lease and writes.

    Args:
      claim: makes the directory this experiment's; called when no other process can write there.

    Raises: LeaseError if another run writes to the directory, ObjectStoreError if its bucket cannot be reached; what `claim` raises.
    """
    workdir.make()
    held: list[Lease | Mirror] = []
    ledger = Ledger(workdir.path if is_main() else None)
    began = False
    reason = "an error"

    def take() -> None:
        held.append(Lease(workdir.path, verb))
        if workdir.mirror is not None:
            workdir.mirror.take(verb)
            held.append(workdir.mirror)

    def leave(why: str, kind: str) -> None:
        if began:
            ledger.lap(kind)
            ledger.row("stop", reason=why)
        with contextlib.ExitStack() as stack:
            for one in held:  # the last first: the bucket gets what is left before the folder is let go of
                stack.callback(one.release)

    def try_to_leave() -> None:
        try:
            leave("preempted", "lost")
        except Exception as error:  # nobody would hear of it from a thread
            print(f"rar-jax {verb}: {error}", file=sys.stderr, flush=True)

    def leave_at_once() -> None:
        # In a thread that ends with the process: what a bucket has not got by then may be more than there is time for.
        leaving = threading.Thread(target=try_to_leave, daemon=True)
        leaving.start()
        leaving.join(HURRIED_SECONDS if watch.hurried else LEAVING_SECONDS)
        if leaving.is_alive() and workdir.mirror is not None:
            told = f"the next start there sends what {workdir.mirror.url} has not got: {workdir.path}"
            print(f"rar-jax {verb}: {told}", file=sys.stderr, flush=True)

    def mind() -> None:
        """Ends this process when its place was lost. A training asks after each step, and is given the time to; nothing else does."""
        while not over.wait(lease.HEARTBEAT_SECONDS):
            try:
                around.check()
            except (LeaseError, ObjectStoreError) as error:
                if not over.wait(lease.HEARTBEAT_SECONDS):
                    ledger.row("stop", reason=_reason(error))
                    print(f"\nrar-jax {verb}: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    watch.on_leave = leave_at_once
    over = threading.Event()
    around = Session(ledger, watch, held)
    try:
        from_main(take)
        claim()
        began = True
        # The run before may have been killed: its last rows, which this one is about to take back, say when it still lived.
        signs = [row["time"] for row in read_metrics(workdir.path)] if is_main() else []
        who = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": jax.process_count(),
            "last_sign": max(signs, default=0.0),
        }
        ledger.row("start", verb=verb, command=_command(), **who, **where())
        threading.Thread(target=mind, daemon=True).start()
        yield around
        reason = "done"
    except Preempted:
        reason = "preempted"
        raise
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    except Exception as error:
        reason = _reason(error)
        raise
    finally:
        over.set()
        watch.on_leave = lambda: None
        try:
            leave(reason, "ending" if reason in ("done", "preempted") else "lost")
        except Exception as error:
            if reason == "done":
                raise
            print(f"rar-jax {verb}: {error}", file=sys.stderr, flush=True)  # what went wrong first is raised
