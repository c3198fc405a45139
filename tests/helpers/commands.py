"""The command on the tiny experiment in processes of its own, to be stopped, killed and started again."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable

import jax

from rar_jax.cli import main
from rar_jax.parallel.processes import COORDINATOR, COUNT, INDEX
from rar_jax.runs.arrays import load_arrays, read_array_names
from rar_jax.runs.bucket import Path
from rar_jax.runs.checkpoint import find_arrays

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "tests" / "experiments" / "tiny.py"


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with fake devices, which shares the compilations of this run of the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "RAR_JAX_PROCESS", "RAR_JAX_COORD"))}
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    if cache := os.environ.get("RAR_JAX_TEST_CACHE"):
        kept |= {"JAX_COMPILATION_CACHE_DIR": cache}
    return kept | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


class Command:
    """`rar-jax ARGV...` in a process of its own, as subprocess.Popen would have it: forked by a server that has imported what the
    command imports, which takes longer than what these tests are about.

    Args:
      before: called in the process before the command, to change what it does; a function of a module.
    """

    def __init__(self, argv: list[str], environ: dict[str, str], before: Callable[[], None] | None = None) -> None:
        handle, self._told = tempfile.mkstemp(suffix=".txt")
        os.close(handle)
        self._text: str | None = None
        # A daemon, so that what a failed test leaves running ends with the tests.
        self._process = SERVER.Process(target=_command, args=(argv, environ, self._told, before), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"it still runs after {timeout} s: {pathlib.Path(self._told).read_text()[-4000:]}")

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        self.wait(timeout)
        if self._text is None:
            self._text = pathlib.Path(self._told).read_text()
            os.unlink(self._told)
        return self._text, None

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


SERVER = multiprocessing.get_context("forkserver")
VERBS = [f"rar_jax.programs.{verb}" for verb in ("run", "train", "evaluate", "tokenize")]
SERVER.set_forkserver_preload(["__main__", "sklearn.datasets", *VERBS])


def _command(argv: list[str], environ: dict[str, str], told: str, before: Callable[[], None] | None) -> None:
    for standard in (1, 2):
        os.dup2(os.open(told, os.O_WRONLY | os.O_APPEND), standard)
    os.environ.clear()
    os.environ.update(environ)
    # JAX was imported by the server, and read the environment then.
    jax.config.update("jax_disable_most_optimizations", environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    jax.config.update("jax_compilation_cache_dir", environ.get("JAX_COMPILATION_CACHE_DIR"))
    if before is not None:
        before()
    sys.argv = ["rar-jax", *argv]
    sys.exit(main())


def start(
    verb: str,
    workdir: pathlib.Path | None,
    *flags: str,
    processes: int = 1,
    devices: int = 1,
    before: Callable[[], None] | None = None,
) -> list[Command]:
    """A verb in as many processes, each with so many devices; of the tiny experiment if there is a work directory."""
    place: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {COORDINATOR: f"127.0.0.1:{free.getsockname()[1]}", COUNT: str(processes)}
    what = ["--config", str(TINY), "--workdir", str(workdir)] if workdir else []
    return [
        Command([verb, *what, *flags], environment(devices) | (place and {**place, INDEX: str(k)}), before)
        for k in range(processes)
    ]


def finish(running: list[Command], code: int = 0) -> str:
    """Waits for all and checks their exit codes; what the first one said."""
    outs = [
        process.communicate(timeout=500)[0] for process in running
    ]  # the whole tiny job compiles for minutes on a busy machine
    assert [process.returncode for process in running] == [code] * len(running), "\n----\n".join(
        o[-4000:] for o in outs
    )
    return outs[0]


def wait_for(condition: Callable[[], bool], running: list[Command], seconds: float = 200) -> None:
    """Until the condition holds; fails if a process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in running:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.005)


def terminate(running: list[Command], which: int = 0, number: int = signal.SIGTERM) -> float:
    """A signal to one of them; the seconds until all have left."""
    began = time.monotonic()
    running[which].send_signal(number)
    for process in running:
        process.wait(timeout=120)
    return time.monotonic() - began


def state_of(workdir: Path, step: int, folder: str = "checkpoints/classifier") -> dict[str, bytes]:
    """The bytes of every array of a saved step."""
    arrays = find_arrays(workdir / folder, step)
    names = read_array_names(arrays)
    return {name: x.tobytes() for name, x in zip(names, load_arrays(arrays, names), strict=True)}
