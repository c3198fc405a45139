"""Preemption: a signal to any process makes every process save the same step and exit with code PREEMPTED.

Only a training loop holds results that no file has, so only there, within `PreemptionMonitor.listening`, signals are
handled. Elsewhere
they keep their default action: finished shards and chunks are on disk, and the same command continues after them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# A shutdown may signal a process twice, through the system and through its launch script. Later signals have the
# default action.
REPEAT_SECONDS = 2.0


class PreemptionMonitor:
    """Agrees on preemption across processes.

    Handlers only set a flag: every program of the loop is compiled before `listening`.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # the first signal to this process, and its time
        self._previous: dict[int, Any] = {}  # handlers
        self._in_flight: Any = False  # the answer that the next `poll` returns
        self._mesh: Mesh | None = None

    @contextlib.contextmanager
    def listening(self, mesh: Mesh) -> Iterator[None]:
        """Handle SIGNALS, except those that are ignored (nohup). Only the main thread can: elsewhere nothing is
        handled.

        Args:
          mesh: all devices of all processes.
        """
        self._mesh, self._first, self._in_flight = mesh, None, False
        self.agree()  # compiles
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
            self._previous = {number: known for number, known in handlers.items() if known is not signal.SIG_IGN}
        for number in self._previous:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}
        if self._first is not None:  # it came after the last `agree`
            signal.raise_signal(self._first[0])

    def poll(self) -> bool:
        """Whether any process had received a signal by the previous call. Every process calls it equally often, and
        gets one answer.

        A single process needs no agreement: it learns of its signal at once. Among several, the devices never wait for
        the host.
        """
        answer, self._in_flight = self._in_flight, self._any_process()
        return bool(self._in_flight if jax.process_count() == 1 else answer)

    def agree(self) -> bool:
        """Whether any process has received a signal by now. A barrier."""
        return bool(self._any_process())

    def _any_process(self) -> Any:
        received = self._first is not None
        if jax.process_count() == 1 or self._mesh is None:
            return received
        devices = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        flags = jax.make_array_from_callback((self._mesh.size,), devices, lambda _: np.array([received]))
        return _any(flags)

    def _receive(self, number: int, frame: Any) -> None:
        if self._first is None:
            self._first = number, time.monotonic()
        elif time.monotonic() - self._first[1] > REPEAT_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    """One fact that every device knows."""
    return jnp.any(flags)
