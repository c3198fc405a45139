"""One program on one or many processes: how they start, who writes, how they agree and wait for one another.

Every process runs the same program on the same files. Process 0 alone writes what is one file, and what it finds on the disk is
what all go by (`from_main`): two processes that looked for themselves could see different things, and wait for each other for
ever. Arrays over the devices of all processes are made in arrays.py; orbax's checkpoints are written by all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rar_jax.config import require
from rar_jax.errors import PREEMPTED, ConfigError, ProcessError

# The environment variables that stand for the flags --coordinator-address, --process-count and --process-index.
COORDINATOR, COUNT, INDEX = "RAR_JAX_COORDINATOR_ADDRESS", "RAR_JAX_PROCESS_COUNT", "RAR_JAX_PROCESS_INDEX"

# ---- every time-out, in seconds; an environment variable of this name changes it
TIMEOUTS = {
    "RAR_JAX_INITIALIZATION_SECONDS": 300,  # for all processes to arrive: hosts of a pod do not start together
    "RAR_JAX_HEARTBEAT_SECONDS": 100,  # of silence, after which a process counts as lost and the others stop
    "RAR_JAX_SHUTDOWN_SECONDS": 60,  # for all processes to leave: they meet at a barrier before
}
# What a process that fails waits before it leaves: the others are on their way to the same error, and if process 0 leaves first
# they are killed without a word.
GRACE_SECONDS = 2.0


# ---------------------------------------------------------------- starting and leaving


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all, given by hand. coordinator: "HOST:PORT" of process 0, which the others reach."""

    coordinator: str
    count: int
    index: int


def place_of(
    coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str]
) -> Place | int | None:
    """Where this process stands by its flags or else the environment: a Place, 1 if it shall be alone, None if nothing is said.

    Raises: ConfigError unless all three are given, or a count of 1.
    """
    coordinator = coordinator or environ.get(COORDINATOR)
    numbers = [
        _number(environ, name) if given is None and name in environ else given
        for given, name in ((count, COUNT), (index, INDEX))
    ]
    if (coordinator, *numbers) == (None, None, None):
        return None
    if numbers[0] == 1:
        return 1
    count, index = numbers
    if coordinator is None or count is None or index is None:
        raise ConfigError(
            f"several processes need --coordinator-address, --process-count and --process-index (or {COORDINATOR}, {COUNT} "
            f"and {INDEX}): here are {coordinator}, {count} and {index}"
        )
    host, colon, port = coordinator.rpartition(":")
    require(
        bool(host and colon) and port.isdecimal(), f"the coordinator's address is '{coordinator}': it must be HOST:PORT"
    )
    require(0 <= index < count, f"process {index} of {count} cannot be: they are numbered 0..{count - 1}")
    return Place(coordinator, count, index)


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the processes of a run; call it before JAX makes its first array.

    By hand, with all three arguments or environment variables. With none, JAX looks for a cluster that it knows (TPU pod and
    multislice, GKE, Slurm, Open MPI); where there is none, and with a count of 1, this process is alone. A program whose JAX
    runs already keeps the processes that it has.

    Raises: ConfigError for arguments that cannot be; ProcessError if the processes do not find each other in time.
    """
    if jax.distributed.is_initialized():
        return
    place = place_of(coordinator, count, index, os.environ)
    if place == 1:
        return
    initialization, heartbeat, shutdown = (_number(os.environ, name, default) for name, default in TIMEOUTS.items())
    common: dict[str, Any] = {
        "initialization_timeout": initialization + 1,
        "heartbeat_timeout_seconds": heartbeat,
        "shutdown_timeout_seconds": shutdown,
    }
    # JAX's preemption service would take over SIGTERM. runs/preemption.py handles signals, and only in the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read only where the devices are CPUs
    asked = (
        f"process {place.index} of {place.count} at {place.coordinator}" if isinstance(place, Place) else "this process"
    )
    missing = (
        f"{asked} did not find the other processes within {initialization} s: start all of them, see that the coordinator's "
        f"address is process 0's and its port free and open, or set {COUNT}=1 for one process"
    )
    # JAX aborts a process that finds no others, with a stack trace. This message comes first.
    alarm = threading.Timer(initialization, print, [f"rar-jax: {missing}"], {"file": sys.stderr, "flush": True})
    alarm.daemon = True
    alarm.start()
    try:
        if isinstance(place, Place):
            # "deactivate": else JAX looks for a cluster all the same, and on Slurm would take one local device for each.
            jax.distributed.initialize(
                place.coordinator, place.count, place.index, cluster_detection_method="deactivate", **common
            )
        else:
            jax.distributed.initialize(**common)
    except ValueError as error:
        if place is None and "coordinator_address" in str(error):  # how JAX says that it knows no cluster here
            return
        raise ProcessError(f"the processes cannot start: {error}") from error
    except RuntimeError as error:
        if place is None and "before any JAX" in str(error):
            return
        raise ProcessError(f"{missing} ({_first_line(error)})") from error
    finally:
        alarm.cancel()
    barrier("start")


def together(verb: str, function: Callable[[], int]) -> int:
    """Run a program of one or many processes, which exit together, and return its exit code.

    Where there are many, an error ends this process at once and nothing is returned: JAX's own exit would first wait for the others,
    which wait for this one.
    """
    if jax.process_count() == 1:
        return function()
    code = 1
    try:
        code = function()
        if code in (0, PREEMPTED):
            barrier("end")
            jax.distributed.shutdown()
            return code
    except BaseException:
        traceback.print_exc()
        print(
            f"rar-jax {verb}: process {jax.process_index()} of {jax.process_count()} stops. If the error above is of a "
            "connection, another process was lost: its own log says why",
            file=sys.stderr,
        )
        code = code or 1
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(GRACE_SECONDS)
    os._exit(code)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, str(default))
    require(text.isdecimal(), f"{name} is '{text}': it must be a whole number")
    return int(text)


# ---------------------------------------------------------------- agreeing and waiting


def is_main() -> bool:
    """Whether this process writes what is one file (metrics, pictures, manifests) and tells what all do."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here, however long that takes; a lost one ends the waiting with an error."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(function: Callable[[], Any]) -> Any:
    """What `function` gives on process 0, on every process; the others do not call it. A barrier: all processes call this.

    For what is read from the disk and decided by, and for writing what the others then read. `function` itself must not wait
    for other processes.

    Args:
      function: gives something that JSON holds; tuples arrive as lists, on process 0 too.

    Raises: on process 0 what the function raises; on the others ProcessError with its message.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(function()))
    told: dict[str, Any] = {}
    error: Exception | None = None
    if is_main():
        try:
            told = {"value": function()}
        except Exception as raised:
            told, error = {"error": f"{type(raised).__name__}: {raised}"}, raised
    told = json.loads(_from_main(json.dumps(told)))
    if error is not None:
        raise error
    if "error" in told:
        raise ProcessError(f"process 0 stopped: {told['error']}")
    return told["value"]


def _from_main(text: str) -> str:
    # The length first: what is broadcast must have one shape everywhere.
    given = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(given))))
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # few shapes, since each is compiled
    if is_main():
        padded[:size] = given
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]).decode()


def from_all(text: str) -> list[str]:
    """Each process's text, up to 1,000 bytes of it, in the order of the processes, on every process. A barrier."""
    if jax.process_count() == 1:
        return [text]
    padded = np.zeros(1000, np.uint8)
    given = np.frombuffer(text.encode()[:1000], np.uint8)
    padded[: len(given)] = given
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
