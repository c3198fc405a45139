"""What surrounds the work on a work directory: one writer, a ledger of what happened, and SIGTERM heard."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import jax

from rar_jax.parallel.processes import from_main, is_main
from rar_jax.programs.machine import where
from rar_jax.training.lease import Lease
from rar_jax.training.ledger import Ledger
from rar_jax.training.preemption import Preempted, Watch
from rar_jax.training.workdir import Workdir


class Session:
    """`ledger`, `watch`, and `poll`, which long loops call. Without arguments nothing is written and nothing heard."""

    def __init__(self, ledger: Ledger | None = None, watch: Watch | None = None, lease: Lease | None = None) -> None:
        self.ledger = ledger or Ledger()
        self.watch = watch or Watch()
        self._lease = lease

    def poll(self) -> None:
        """Raises Preempted if it is time to save and leave, on all processes at the same call, and LeaseError if another writer
        has come."""
        if self._lease is not None:
            self._lease.check()
        if self.watch.reached():
            raise Preempted


@contextlib.contextmanager
def session(workdir: Workdir, verb: str, watch: Watch, claim: Callable[[], None]) -> Iterator[Session]:
    """A session of a verb. All processes enter it; process 0 holds the lease and writes.

    Args:
      claim: makes the directory this experiment's; called when no other process can write there.

    Raises: LeaseError if another run writes to the directory; what `claim` raises.
    """
    workdir.make()
    lease: list[Lease] = []
    from_main(lambda: lease.append(Lease(workdir.path, verb)))
    ledger = Ledger(workdir.path if is_main() else None)
    began = False
    reason = "an error"

    def leave(why: str) -> None:
        if began:
            ledger.row("stop", reason=why)
        for held in lease:
            held.release()

    watch.on_leave = lambda: leave("preempted")
    try:
        claim()
        began = True
        ledger.row(
            "start", verb=verb, host=socket.gethostname(), pid=os.getpid(), processes=jax.process_count(), **where()
        )
        yield Session(ledger, watch, lease[0] if lease else None)
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
        leave(reason)
