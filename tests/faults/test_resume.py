"""Promise 1: a run that was killed and started again is, to the bit, the run that was not. With the real command,
dropout on, across an epoch boundary (step 22.5) and both annealing boundaries (steps 20 and 30)."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from rar_jax.runs.arrays import load_arrays, read_array_names
from rar_jax.runs.checkpoint import find_arrays
from rar_jax.runs.logging import read_metrics

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"
ROOT = pathlib.Path(__file__).parents[2]
LOGGED = ROOT / "tests" / "helpers" / "logged.py"
FORTY = ("--config.train.steps=40",)


def start(workdir: pathlib.Path, cache: pathlib.Path | None = None) -> subprocess.Popen[str]:
    """The command, optimized as a person's; with a cache it need not compile what was compiled before."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    if cache is not None:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    digests = str(workdir.with_name(f"{workdir.name}_digests"))
    command = [sys.executable, str(LOGGED), digests, "run", "--config", str(TINY), "--workdir", str(workdir), *FORTY]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    return out


def kill_after(workdir: pathlib.Path, step: int, cache: pathlib.Path) -> None:
    """Starts the command and kills it, -9, once the generator has told of a step."""
    process = start(workdir, cache)
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in read_metrics(workdir, "generator")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "result.json").exists()


def final_state(workdir: pathlib.Path) -> Any:
    folder = workdir / "checkpoints" / "generator"
    arrays = find_arrays(folder, 40)
    names = read_array_names(arrays)
    return dict(zip(names, load_arrays(arrays, names), strict=True))


def digests(workdir: pathlib.Path) -> dict[int, set[str]]:
    """The digests of the generator's batches by step, as all starts of a run saw them."""
    found: dict[int, set[str]] = {}
    for line in workdir.with_name(f"{workdir.name}_digests").read_text().splitlines():
        step, records, digest = line.split()
        if int(records) == 16:  # its batches hold 16 tokens a row
            found.setdefault(int(step), set()).add(digest)
    assert all(len(seen) == 1 for seen in found.values())
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(start(workdir, workdir.parent / "cache"))
    return workdir


def test_killed_and_resumed_is_the_same_to_the_bit(straight: pathlib.Path, tmp_path: pathlib.Path) -> None:
    killed = tmp_path / "run"
    shutil.copytree(straight, killed)  # the stages before the generator are done
    for name in ("checkpoints/generator", "tensorboard/generator"):
        shutil.rmtree(killed / name)
    (killed / "result.json").unlink()
    rows = [row for row in read_metrics(killed) if row["stage"] != "generator"]
    (killed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    kill_after(
        killed, 13, straight.parent / "cache"
    )  # past the first save; before the annealing (20 to 30) and the end of the epoch (22.5)
    out = finish(start(killed))  # compiles again
    assert "tokenizer: up to date, skipped" in out and "generator: trained" in out

    ours, theirs = final_state(killed), final_state(straight)
    assert int(ours["step"]) == 40
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(a, b), jax.tree_util.keystr(path)

    def told(workdir: pathlib.Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir, "generator")]

    assert told(killed) == told(straight)  # every loss, gradient norm, validation and distance, none twice
    # Prefetched batches that no step took may follow; of every step that was, the same batch.
    streams = [digests(w) for w in (killed, straight)]
    assert len(streams[1]) >= 40 and all(streams[0][step] == streams[1][step] for step in range(40))
    results = [json.loads((w / "result.json").read_text())["fd_classifier"] for w in (killed, straight)]
    assert results[0] == results[1]
