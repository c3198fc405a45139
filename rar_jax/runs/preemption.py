"""SIGTERM: this machine is about to be taken away. What is worth saving is saved, and the process leaves with PREEMPTED.

Nearly everything that a verb does can be stopped at any moment and goes on with the same command: shards of tokens, chunks of an
evaluation, a compilation, a save. There a signal ends the process at once. Only a training has steps in memory that no file
holds: within `saving()` the signal is a note, which the loop asks for by `reached()`, then saves and raises Preempted. A second
signal ends the process at once anywhere, which does no harm (a kill does none). Within moments of the first it is the same one:
of a machine that shuts down a process may be told by the system and by the script that started it.

One thread hears the signal, since Python's own handlers wait for the main thread, which may compile for minutes.

Of several processes any one may get the signal. JAX tells the others, and finds the next number that none of them has asked
`reached_preemption_sync_point` for: the place where all stop. It answers by equality, so every process asks for every number:
within `saving()` all at the same places of the loop, elsewhere a thread by the clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rar_jax.errors import PREEMPTED
from rar_jax.parallel.processes import GRACE_SECONDS, barrier, gather_strings, is_main
from rar_jax.errors import Preempted

TICK_SECONDS = 0.5  # between two numbers that the thread asks for
SAME_SECONDS = 2.0  # within which two signals are one




class Watch:
    """Hears SIGTERM within `listening`, in this process or another one of the run.

    on_leave: called before the process ends at once. noticed: a signal came. hurried: a second one, to this process.
    """

    def __init__(self) -> None:
        self.on_leave: Callable[[], None] = lambda: None
        self.noticed: bool = False
        self.hurried: bool = False
        self._saving = False
        self._first: float | None = None  # when the first signal came to this process
        self._asked = 0  # the last number that JAX was asked for
        self._many = False
        self._tell_jax: Callable[[int], None] | None = None
        self._lock = threading.RLock()  # around `noticed`, `_saving` and `_asked`

    # ---- for the verbs

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over SIGTERM. Main thread only. Until `joined` a signal ends this process at once, and no other one."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        # A handler of Python's, so that the number of a signal is written into the pipe at once, whatever the main thread does.
        handler, pipe = (
            signal.signal(signal.SIGTERM, lambda *_: None),
            signal.set_wakeup_fd(write, warn_on_full_buffer=False),
        )
        os.register_at_fork(after_in_child=_forget)  # a worker that is ended by SIGTERM is none of our business
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(pipe)
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
            os.close(write)

    def joined(self) -> None:
        """The processes have found each other: a signal to one is heard by all. Main thread only, within `listening`."""
        self._many = jax.process_count() > 1
        if self._many:
            self._tell_jax = _handler_of_jax()
            signal.signal(signal.SIGTERM, lambda *_: None)
            threading.Thread(target=self._tick, daemon=True).start()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within it a signal is answered by `reached`. All processes enter and ask together."""
        if self._many:
            barrier("saving")  # until all are here the thread asks; then it stands still, and all go on from one number
        with self._lock:
            self._saving = not self.noticed
        self._stop_beside_last_words()
        if self._many:
            meeting = max(int(text) for text in gather_strings(str(self._asked)))
            while self._asked < meeting:
                self._ask()
        try:
            yield
        finally:
            with self._lock:
                self._saving = False

    def reached(self) -> bool:
        """Whether to save and stop here: the same answer on all processes. Outside of `saving` it never is: once a signal came,
        this process is about to end, and does not come back from asking."""
        with self._lock:
            saving = self._saving
        if saving:
            return self._ask() if self._many else self.noticed
        self._stop_beside_last_words()
        return False

    def _stop_beside_last_words(self) -> None:
        """Outside of `saving` one who was noticed is about to end, by another thread: nothing else is to be said or written."""
        if self.noticed and not self._saving:
            threading.Event().wait()

    def exit_code(self, code: int) -> int:
        """The code of a process that fails with `code`: what goes wrong after a signal, as connections do, is the preemption."""
        return PREEMPTED if self.noticed else code

    # ---- the threads

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number == signal.SIGTERM:
                    self._signalled()
        os.close(pipe)

    def _signalled(self) -> None:
        now = time.monotonic()
        if self._first is not None:
            if now - self._first >= SAME_SECONDS:
                self.hurried = True
                self._leave("a second signal")
            return
        self._first = now
        if self._tell_jax is not None:
            self._tell_jax(signal.SIGTERM)
        else:  # a thread, so that a second one is heard while this one's last words are sent
            threading.Thread(target=self._notice, daemon=True).start()

    def _tick(self) -> None:
        begun, first = time.monotonic(), self._asked
        while True:
            with self._lock:
                if self._saving:
                    begun, first = time.monotonic(), self._asked
                else:
                    self._ask()
                ahead = (self._asked - first) * TICK_SECONDS - (time.monotonic() - begun)
            time.sleep(TICK_SECONDS if self._saving else max(ahead, 0.01))

    def _ask(self) -> bool:
        with self._lock:
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self._notice()
            return self.noticed

    def _notice(self) -> None:
        with self._lock:
            self.noticed = True
            if self._saving:
                return
        # Process 0 last: with it goes what connects the others, who would be killed without a word.
        self._leave("SIGTERM", GRACE_SECONDS if self._many and is_main() else 0.0)

    def _leave(self, why: str, grace: float = 0.0) -> None:
        print(f"\nrar-jax: {why}: stopped at once; the same command goes on from what is on disk", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(grace)
        last_words, self.on_leave = (
            self.on_leave,
            lambda: None,
        )  # once: a second signal does not wait for the first one's
        try:
            last_words()
        except Exception as error:  # of a thread's end nobody would hear, and the process would live on, deaf
            print(f"rar-jax: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(PREEMPTED)


class _CheckpointManager(ocp.CheckpointManager):
    """Orbax's, which would ask JAX for the numbers of its steps, some of them long after a save began. JAX takes the last number
    that it was asked for as where a process is: it would name one that `Watch` is past, and nobody would ever stop."""

    def reached_preemption(self, step: int) -> bool:
        """Never: `Watch` decides."""
        return False


def checkpoint_manager(folder: pathlib.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Orbax's for a folder, but for its questions to JAX."""
    return _CheckpointManager(folder, options=options)


def _handler_of_jax() -> Callable[[int], None]:
    """The C function by which JAX's preemption service hears of SIGTERM. It sets a flag; Python's handler would take its place."""
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    address = set_handler(signal.SIGTERM, None)  # None is SIG_DFL, until Python's is set a moment later
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address and address > 1 else lambda number: None


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
