"""Real commands on the tiny experiment, to be stopped, killed and started again."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rar_jax.parallel.processes import COORDINATOR, COUNT, INDEX

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "experiments" / "tiny.py"


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with fake devices, which shares the compilations of this run of the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "RAR_JAX_PROCESS", "RAR_JAX_COORD"))}
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    if cache := os.environ.get("RAR_JAX_TEST_CACHE"):
        kept |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return kept | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def start(
    verb: str, workdir: pathlib.Path, *flags: str, processes: int = 1, devices: int = 1
) -> list[subprocess.Popen[str]]:
    """A verb in as many processes, each with so many devices."""
    place: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {COORDINATOR: f"127.0.0.1:{free.getsockname()[1]}", COUNT: str(processes)}
    command = [sys.executable, "-m", "rar_jax", verb, "--config", str(TINY), "--workdir", str(workdir), *flags]
    return [
        subprocess.Popen(
            command, env=environment(devices) | place | {INDEX: str(k)} if place else environment(devices), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for k in range(processes)
    ]  # fmt: skip


def finish(running: list[subprocess.Popen[str]], code: int = 0) -> str:
    """Waits for all and checks their exit codes; what the first one said."""
    outs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [code] * len(running), "\n----\n".join(
        o[-4000:] for o in outs
    )
    return outs[0]


def wait_for(condition: Callable[[], bool], running: list[subprocess.Popen[str]], seconds: float = 200) -> None:
    """Until the condition holds; fails if a process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in running:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.005)


def terminate(running: list[subprocess.Popen[str]], which: int = 0) -> float:
    """SIGTERM to one of them; the seconds until all have left."""
    began = time.monotonic()
    running[which].send_signal(signal.SIGTERM)
    for process in running:
        process.wait(timeout=120)
    return time.monotonic() - began


def state_of(workdir: pathlib.Path, step: int, folder: str = "checkpoints/classifier") -> dict[str, bytes]:
    """The bytes of every array of a saved step."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = (workdir / folder / str(step) / "state").absolute()
        tree: Any = checkpointer.metadata(path).item_metadata.tree  # pyright: ignore
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(path, restore_args=args)
    return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_leaves_with_path(state)}
