"""What surrounds the work on a work directory: one writer, a ledger of what happened, and SIGTERM heard."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from rar_jax.parallel.processes import from_main, is_main
from rar_jax.programs.machine import where
from rar_jax.training.lease import Lease
from rar_jax.training.ledger import Ledger
from rar_jax.training.object_store import Mirror
from rar_jax.training.preemption import Preempted, Watch
from rar_jax.training.report import read_metrics
from rar_jax.training.workdir import Workdir


class Session:
    """`ledger`, `watch`, and `poll`, which long loops call. Without arguments nothing is written and nothing heard."""

    def __init__(
        self, ledger: Ledger | None = None, watch: Watch | None = None, held: Sequence[Lease | Mirror] = ()
    ) -> None:
        self.ledger: Ledger = ledger or Ledger()
        self.watch: Watch = watch or Watch()
        self._held = held

    def poll(self) -> None:
        """Raises Preempted if it is time to save and leave, on all processes at the same call, and LeaseError if another writer
        has come."""
        for held in self._held:
            held.check()
        if self.watch.reached():
            raise Preempted


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

    watch.on_leave = lambda: leave("preempted", "lost")
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
        yield Session(ledger, watch, held)
        reason = "done"
    except Preempted:
        reason = "preempted"
        raise
    except KeyboardInterrupt:
        reason = "interrupted"
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise
    finally:
        try:
            leave(reason, "ending" if reason in ("done", "preempted") else "lost")
        except Exception as error:
            if reason == "done":
                raise
            print(f"rar-jax {verb}: {error}", file=sys.stderr, flush=True)  # what went wrong first is raised
