"""What does not depend on the machine: a checkpoint, the stream of data, samples."""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from commands import ROOT, environment
from digests import batch_digest

from rar_jax.data.loader import batches
from rar_jax.data.sources import load_source
from rar_jax.parallel.processes import COORDINATOR, COUNT, INDEX

SCRIPT = ROOT / "tests" / "helpers" / "topologies.py"


def topologies(*words: str, processes: int = 1) -> Any:
    """What the script told, which has 8 devices in all."""
    place = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {COORDINATOR: f"127.0.0.1:{free.getsockname()[1]}", COUNT: str(processes)}
        place = [{**common, INDEX: str(k)} for k in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *words], env=environment(8 // processes) | where, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for where in place
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(err[-3000:] for _, err in told)
    # gloo tells of itself before; "save" answers nothing
    lines = {(out.splitlines() or ["null"])[-1] for out, _ in told}
    assert len(lines) == 1
    return json.loads(lines.pop())


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_on_eight(tmp_path: pathlib.Path, long: bool) -> None:
    meshes = ["1,8,1", "1,1,1", "2,1,1", "1,4,1", "2,4,1"] if long else ["1,8,1", "2,4,1"]
    topologies("save", str(tmp_path / "c"))
    losses = topologies("restore", str(tmp_path / "c"), *meshes)
    if long:
        losses += topologies("restore", str(tmp_path / "c"), "2,4,1", processes=2)
        meshes = [*meshes, "2,4,1 on 2 processes"]
    assert len(losses) == len(meshes) and 2 < losses[0] < 5
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_the_stream_of_any_hosts_and_workers() -> None:
    source = load_source("digits", "heldout", image_size=8, channels=1)
    size, steps = 40, 2 * 360 // 40  # two epochs
    common = {"global_batch": size, "seed": 3, "start_step": 0}
    whole = list(itertools.islice(batches(source, **common), steps))
    epochs = np.concatenate([batch["ids"] for batch in whole]).reshape(2, 360)
    assert all(len(set(epoch)) == 360 for epoch in epochs.tolist()) and (epochs[0] != epochs[1]).mean() > 0.9
    for hosts, workers in itertools.product((1, 2, 4), (0, 2)):
        parts = []
        for rows in np.arange(size).reshape(hosts, -1):
            with contextlib.closing(batches(source, **common, rows=rows, num_workers=workers)) as stream:
                parts.append(list(itertools.islice(stream, steps)))
        for k, expected in enumerate(whole):
            joined = {name: np.concatenate([part[k][name] for part in parts]) for name in expected}
            assert batch_digest(joined) == batch_digest(expected), (hosts, workers, k)


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(["8,1,1:8"], id="8"),
        pytest.param(["2,1,1:40", "1,8,1:40", "2,4,1:8", "1,1,1:1"], id="all", marks=pytest.mark.slow),
    ],
)
def test_samples_of_any_machine(ways: list[str]) -> None:
    counted = topologies("sample", *ways)
    assert counted["tokens"] == 640 * (len(ways) + 1)
