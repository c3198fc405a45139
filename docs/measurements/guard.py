"""What the guard and the checksums cost: python docs/measurements/guard.py [EXPERIMENT]; ratios of one run, in turn.

The generator's training step with the guard and without it (a step that judges nothing and keeps all), and the time that
hashing a checkpoint takes against the steps between two of them.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import numpy as np

from rar_jax.config import load_experiment
from rar_jax.experiment import resolve
from rar_jax.parallel.mesh import make_mesh
from rar_jax.parallel.rules import sharded
from rar_jax.runs.checkpoint import Checkpointer
from rar_jax.runs.manifest import verify_from_disk, write_manifest
from rar_jax.training import guard
from rar_jax.training.step import compile_training

ROUNDS, STEPS = 15, 6


def main(name: str) -> None:
    """Prints the ratios."""
    experiment = resolve(load_experiment(name), name)
    model, recipe, mesh = experiment.generator, experiment.train, make_mesh(experiment.mesh)
    rng = np.random.default_rng(0)
    shape = model.module.token_spec(model.config).shape
    batch = {
        "tokens": rng.integers(0, model.config.codebook_size, (recipe.batch_size, *shape)).astype(np.int32),
        "labels": rng.integers(0, model.config.num_classes, recipe.batch_size).astype(np.int32),
    }
    steps: list[Any] = []
    for guarded in (True, False):
        free = mock.patch.multiple(
            guard, judge=lambda g, m, *, sigmas: (False, g), select_if=lambda bad, then, otherwise: otherwise
        )
        with sharded(mesh), mock.patch.dict({}) if guarded else free:
            setup = compile_training(model.module, model.config, recipe, mesh)
            state, _ = setup.step(setup.init(jax.random.key(0)), batch, jax.random.key(1))
        steps.append([setup, state])
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for which, (setup, state) in enumerate(steps):
            began = time.perf_counter()
            with sharded(mesh):
                for _ in range(STEPS):
                    state, _ = setup.step(state, batch, jax.random.key(1))
            jax.block_until_ready(state)
            seconds[which].append((time.perf_counter() - began) / STEPS)
            steps[which][1] = state
    with_guard, without = (statistics.median(s) for s in seconds)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    print(
        f"step of {name}: {1e3 * with_guard:.1f} ms with the guard, {1e3 * without:.1f} ms without; median ratio {ratio:.4f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(pathlib.Path(folder), keep=2)
        checkpointer.save(1, steps[0][1], {})
        checkpointer.close()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            write_manifest(pathlib.Path(folder) / "1")
            verify_from_disk(pathlib.Path(folder) / "1")  # as retention does before it lets go of an older one
            times.append(time.perf_counter() - began)
        size = sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*") if p.is_file())
    seconds_to_hash = statistics.median(times)
    share = seconds_to_hash / (recipe.checkpoint_every * with_guard)
    print(
        f"checksums of {size / 1e6:.1f} MB: {1e3 * seconds_to_hash:.1f} ms, {share:.3%} of the {recipe.checkpoint_every} steps between two saves"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "digits")
