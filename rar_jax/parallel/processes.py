"""Start the processes of a run, exchange values between them, and exit together.

Every process runs the same program on the same files. Process 0 alone writes files that exist once, and reads on behalf
of all what decides the control flow (`from_main`): processes that looked for themselves could disagree and wait for
each other.
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

# Environment variables for the flags --coordinator-address, --process-count and --process-index.
COORDINATOR, COUNT, INDEX = "RAR_JAX_COORDINATOR_ADDRESS", "RAR_JAX_PROCESS_COUNT", "RAR_JAX_PROCESS_INDEX"

# Time-outs in seconds; an environment variable of this name changes it.
TIMEOUTS = {
    "RAR_JAX_INITIALIZATION_SECONDS": 300,  # for all processes to arrive: hosts of a pod do not start together
    "RAR_JAX_HEARTBEAT_SECONDS": 100,  # without a heartbeat, a process counts as lost and the others stop
    "RAR_JAX_SHUTDOWN_SECONDS": 60,  # for all processes to leave, after a barrier
}
# A failing process waits before it exits. The others run into the same error, and would be killed without a message if
# process 0 left first.
GRACE_SECONDS = 2.0


# ---------------------------------------------------------------- starting and exiting


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
    """Manual settings of a process. coordinator: "HOST:PORT" of process 0."""

    coordinator: str
    count: int
    index: int


def read_settings(
    coordinator: str | None, count: int | None, index: int | None, environ: Mapping[str, str]
) -> ProcessSettings | int | None:
    """Read flags, else the environment: settings, 1 (single) or None (unset)."""
    coordinator = coordinator or environ.get(COORDINATOR)
    count = _read_number(environ, COUNT) if count is None and COUNT in environ else count
    index = _read_number(environ, INDEX) if index is None and INDEX in environ else index
    if (coordinator, count, index) == (None, None, None):
        return None
    if count == 1:
        return 1
    if coordinator is None or count is None or index is None:
        raise ConfigError(
            "several processes need --coordinator-address, --process-count and --process-index "
            f"(or {COORDINATOR}, {COUNT} and {INDEX}), got {coordinator}, {count} and {index}"
        )
    host, colon, port = coordinator.rpartition(":")
    require(bool(host and colon) and port.isdecimal(), f"coordinator address '{coordinator}' must be HOST:PORT")
    require(0 <= index < count, f"process index {index} must be in 0..{count - 1}")
    return ProcessSettings(coordinator, count, index)


def join_processes(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Join the processes of a run. Call it before JAX makes its first array.

    Without arguments or environment variables JAX looks for a cluster that it knows (TPU pod, GKE, Slurm, Open MPI).
    Without a cluster, or with a count of 1, this is a single process. Does nothing if JAX is initialised already.

    Raises: ConfigError for invalid arguments; ProcessError if the processes do not find each other in time.
    """
    if jax.distributed.is_initialized() or (settings := read_settings(coordinator, count, index, os.environ)) == 1:
        return
    manual = isinstance(settings, ProcessSettings)
    initialization, heartbeat, shutdown = (_read_number(os.environ, name, n) for name, n in TIMEOUTS.items())
    options: dict[str, Any] = {
        "initialization_timeout": initialization + 1,
        "heartbeat_timeout_seconds": heartbeat,
        "shutdown_timeout_seconds": shutdown,
    }
    if manual:
        options |= {"coordinator_address": settings.coordinator, "num_processes": settings.count}
        # Otherwise JAX looks for a cluster anyway, and on Slurm takes one local device per process.
        options |= {"process_id": settings.index, "cluster_detection_method": "deactivate"}
    # JAX's preemption service would take over SIGTERM, which runs/preemption.py handles in the training loop only.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only read on CPUs
    name = f"process {settings.index} of {settings.count} at {settings.coordinator}" if manual else "this process"
    missing = (
        f"{name} did not find the other processes within {initialization} s: start all of them, check the "
        f"coordinator's address and port, or set {COUNT}=1 for one process"
    )
    # JAX aborts a process that finds no others, with a stack trace. This message comes first.
    alarm = threading.Timer(initialization, print, [f"rar-jax: {missing}"], {"file": sys.stderr, "flush": True})
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        # JAX found no cluster, or was used before: a single process.
        if not manual and any(text in str(error) for text in ("coordinator_address", "before any JAX")):
            return
        raise ProcessError(f"{missing} ({str(error).strip().splitlines()[0][:300]})") from error
    finally:
        alarm.cancel()
    barrier("start")


def run_together(verb: str, function: Callable[[], int]) -> int:
    """Run a function in processes that exit together; return its exit code.

    One of many exits at once on an error: JAX's own exit would wait for the others, which wait for this one.
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
        who = f"process {jax.process_index()} of {jax.process_count()}"
        why = "If the error above is of a connection, another process was lost: its own log says why"
        print(f"rar-jax {verb}: {who} stops. {why}", file=sys.stderr)
        code = code or 1
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(GRACE_SECONDS)
    os._exit(code)


def _read_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, str(default))
    require(text.isdecimal(), f"{name} is '{text}': it must be a whole number")
    return int(text)


# ---------------------------------------------------------------- communicating


def is_main() -> bool:
    """Return whether this process writes files and messages that exist once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes. A lost process ends the wait with an error."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(function: Callable[[], Any]) -> Any:
    """Call `function` on process 0, return its result on all; all call this.

    function: returns a JSON value; must not wait for other processes. Tuples become lists.

    Raises: on process 0 the function's exception; on the others ProcessError with its message.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(function()))
    message: dict[str, Any] = {}
    error: Exception | None = None
    if is_main():
        try:
            message = {"value": function()}
        except Exception as raised:
            message, error = {"error": f"{type(raised).__name__}: {raised}"}, raised
    message = json.loads(_broadcast(json.dumps(message)))
    if error is not None:
        raise error
    if "error" in message:
        raise ProcessError(f"process 0 stopped: {message['error']}")
    return message["value"]


def _broadcast(text: str) -> str:
    # The length first: a broadcast array must have one shape everywhere.
    given = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(given))))
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # few shapes, since each is compiled
    if is_main():
        padded[:size] = given
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]).decode()


def gather_strings(text: str) -> list[str]:
    """Return each process's text, up to 1,000 bytes; all processes call this."""
    if jax.process_count() == 1:
        return [text]
    padded = np.zeros(1000, np.uint8)
    given = np.frombuffer(text.encode()[:1000], np.uint8)
    padded[: len(given)] = given
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
