"""What surrounds the work on a work directory: its lock, its ledger and preemption."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from rar_jax.errors import Preempted
from rar_jax.parallel.processes import from_main, is_main
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.lock import Lock
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.machine import describe_machine
from rar_jax.runs.preemption import PreemptionMonitor
from rar_jax.runs.workdir import Workdir


@dataclasses.dataclass
class Session:
    """What a verb holds while it works on a directory. The defaults write nothing and hold nothing.

    locks: on process 0; each has `check` and `release`.
    """

    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    preemption: PreemptionMonitor = dataclasses.field(default_factory=PreemptionMonitor)
    locks: Sequence[Lock] = ()

    def poll(self) -> None:
        """Raise LockError if the lock was lost, Preempted if it is time to save and exit.

        Long loops of all processes call it.
        """
        for lock in self.locks:
            lock.check()
        if self.preemption.poll():
            raise Preempted


@contextlib.contextmanager
def open_session(workdir: Workdir, verb: str, claim: Callable[[], None]) -> Iterator[Session]:
    """Lock a work directory, claim it for an experiment, and record what the verb does there. All processes enter.

    Args:
      claim: makes the directory this experiment's. It runs under the lock.

    Raises: LockError if another run writes to the directory; what `claim` raises.
    """
    workdir.make()
    with contextlib.ExitStack() as stack:
        locks = stack.enter_context(hold_locks(workdir, verb))
        claim()
        stack.callback(workdir.send)
        yield Session(stack.enter_context(record_run(workdir, verb)), locks=locks)


@contextlib.contextmanager
def hold_locks(workdir: Workdir, verb: str) -> Iterator[Sequence[Lock]]:
    """Hold the work directory's lock on process 0. Every process raises what that raises."""
    locks: list[Lock] = []
    with contextlib.ExitStack() as stack:

        def take() -> None:
            locks.append(Lock(workdir.root, verb))
            stack.callback(locks[0].release)

        from_main(take)
        yield locks


@contextlib.contextmanager
def record_run(workdir: Workdir, verb: str) -> Iterator[Ledger]:
    """Write the rows "start" and "stop" of a run to the ledger, on process 0."""
    ledger = Ledger(workdir.path if is_main() else None)
    # When the previous run was still alive: it may have been killed, and this one drops its last rows of metrics.
    signs = [row["time"] for row in read_metrics(workdir.path)] if is_main() else []
    who = {"host": socket.gethostname(), "pid": os.getpid(), "processes": jax.process_count()}
    ledger.row("start", verb=verb, command=_command(), **who, last_sign=max(signs, default=0.0), **describe_machine())
    reason = "done"
    try:
        yield ledger
    except BaseException as error:
        named = {Preempted: "preempted", KeyboardInterrupt: "interrupted"}
        reason = named.get(type(error), f"{type(error).__name__}: {error}"[:300])
        raise
    finally:
        ledger.lap("ending" if reason in ("done", "preempted") else "lost")
        ledger.row("stop", reason=reason)


def _command() -> str | None:
    """The command line, to be typed again; None within another program."""
    name = pathlib.Path(sys.argv[0])
    ours = name.name == "rar-jax" or name.parts[-2:] == ("rar_jax", "__main__.py")
    return shlex.join(["rar-jax", *sys.argv[1:]]) if ours else None
