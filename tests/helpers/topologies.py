"""What tests/faults/test_machines.py runs in processes of their own: JAX fixes the number of devices when it starts.

python topologies.py save FOLDER                  a state, random in every array, from all devices of this process
python topologies.py restore FOLDER 1,1,1 2,4,1   on these meshes: every shard is what was saved; prints the next loss on each
python topologies.py sample 8,1,1:40 1,1,1:8      tokens on one device, against those on these meshes in batches of such sizes, and
                                                  against the network without a cache; prints what was counted
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rar_jax.generators import rar
from rar_jax.generators.rar import Sampling
from rar_jax.keys import sample_keys
from rar_jax.parallel import processes
from rar_jax.parallel.arrays import put_on_mesh
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, param_shardings, replicated, sharded
from rar_jax.runs.checkpoint import Checkpointer
from rar_jax.sampling import weigh_guidance
from rar_jax.sections import Recipe
from rar_jax.training.step import compile_training

RECIPE, CONFIG = Recipe(steps=10, batch_size=8, ema_decay=0.9), rar.TINY
TIE = 1e-5


def mesh_of(sizes: str) -> Any:
    config = MeshConfig(*map(int, sizes.split(",")))
    return make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config))])


def random_values(tree: Any) -> Any:
    """NumPy arrays of a tree's shapes, the same in every process."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: (0.05 * rng.standard_normal(x.shape)).astype(x.dtype), tree)


def save(folder: pathlib.Path) -> None:
    mesh = make_mesh(MeshConfig(1, -1, 1))
    abstract = compile_training(rar, CONFIG, RECIPE, mesh).abstract_state
    values = random_values(abstract)
    checkpointer = Checkpointer(folder, keep=2)
    checkpointer.save(1, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), values, abstract), {})
    checkpointer.close()


def restore(folder: pathlib.Path, meshes: list[str]) -> list[float]:
    rng, losses = np.random.default_rng(0), []
    tokens = rng.integers(0, CONFIG.codebook_size, (8, CONFIG.num_tokens)).astype(np.int32)
    labels = rng.integers(0, CONFIG.num_classes, 8).astype(np.int32)
    for mesh in map(mesh_of, meshes):
        checkpointer = Checkpointer(folder, keep=2)
        state = checkpointer.restore(compile_training(rar, CONFIG, RECIPE, mesh).abstract_state)
        checkpointer.close()
        assert state is not None
        for (path, x), expected in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(random_values(state)), strict=True
        ):
            for shard in x.addressable_shards:
                assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes(), (mesh.shape, path)
        loss = jax.jit(
            lambda params, batch: rar.loss(CONFIG, params, batch, key=jax.random.key(1), step=1, train=True)[0],
            out_shardings=replicated(mesh),
        )
        with sharded(mesh):
            losses.append(
                float(loss(state["params"], put_on_mesh({"tokens": tokens, "labels": labels}, batch_sharding(mesh))))
            )
    return losses


def sample(ways: list[str], count: int = 40) -> dict[str, int]:
    sampling = Sampling(3.0, 1.5, 0.9)
    params = random_values(jax.eval_shape(lambda key: rar.init(CONFIG, key), jax.random.key(0)))
    params = jax.tree.map(lambda x: 4 * x, params)  # so that logits differ
    labels, ids = np.arange(count) % CONFIG.num_classes, np.arange(count)

    def drawn(sizes: str, rows: str) -> np.ndarray:
        mesh, batch = mesh_of(sizes), int(rows)
        at = batch_sharding(mesh)
        lain = place_params(params, mesh)
        draw = jax.jit(
            lambda params, labels, ids: rar.sample(CONFIG, params, labels, keys=sample_keys(7, ids), sampling=sampling),
            out_shardings=replicated(mesh),
        )
        with sharded(mesh):
            parts = [
                draw(lain, put_on_mesh(labels[i : i + batch], at), put_on_mesh(ids[i : i + batch], at))
                for i in range(0, count, batch)
            ]
        return np.concatenate(parts)

    first = drawn("1,1,1", str(count))
    # What each draw chose among: the network without a cache, the same noise, in float64.
    order = np.broadcast_to(np.arange(CONFIG.num_tokens), first.shape)
    logits = jax.jit(functools.partial(rar.logits, CONFIG))
    null = np.full(count, CONFIG.num_classes)
    class_bnv, null_bnv = (np.asarray(logits(params, first, x, order), np.float64) for x in (labels, null))
    w_n = np.asarray(
        weigh_guidance(3.0, np.arange(CONFIG.num_tokens) / CONFIG.num_tokens, schedule="power-cosine", power=1.5)
    )
    noise = jax.vmap(
        lambda key: jax.vmap(lambda s: jax.random.gumbel(jax.random.fold_in(key, s), (CONFIG.codebook_size,)))(
            jnp.arange(CONFIG.num_tokens)
        )
    )(sample_keys(7, jnp.asarray(ids)))
    perturbed = (null_bnv + w_n[:, None] * (class_bnv - null_bnv)) / sampling.temperature + np.asarray(noise)
    best = np.sort(perturbed, axis=-1)
    tie = best[..., -1] - best[..., -2] < TIE
    counted = {"tokens": 0, "differing": 0}
    uncached = np.argmax(perturbed, axis=-1)
    for other in [uncached, *(drawn(*way.split(":")) for way in ways)]:
        for i, s in zip(*np.nonzero(other != first), strict=True):
            # After the first difference the two images have other contexts. Uncached, each place has that of `first`.
            if other is uncached or (other[i, :s] == first[i, :s]).all():
                assert tie[i, s], (i, s)
                counted["differing"] += 1
        counted["tokens"] += other.size
    assert len(np.unique(first)) > 20, "hardly anything is drawn"
    return counted


def place_params(params: Any, mesh: Any) -> Any:
    return jax.tree.map(put_on_mesh, params, param_shardings(rar.axes(CONFIG), params, mesh))


if __name__ == "__main__":
    processes.join_processes()
    what, *rest = sys.argv[1:]
    if what == "save":
        save(pathlib.Path(rest[0]))
    elif what == "restore":
        print(json.dumps(restore(pathlib.Path(rest[0]), rest[1:])))
    else:
        print(json.dumps(sample(rest)))
    sys.stdout.flush()
    processes.barrier("end")
    os._exit(0)
