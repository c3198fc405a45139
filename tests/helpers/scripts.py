"""The scripts of launch/, run with other programs in the place of clouds'."""

import os
import pathlib
import subprocess
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
EXPERIMENT = ["--config", "rar_b", "--workdir", "/mnt/shared/a run", "--config.seed=3"]
TPU = ["--name", "mine", "--zone", "here", "--type", "v5litepod-16", "--runtime", "base"]


def launch(script: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environ)


def stand_in(folder: pathlib.Path, **programs: str) -> dict[str, str]:
    """The PATH on which these shell scripts stand before the programs of the same name."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def lines_of(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
