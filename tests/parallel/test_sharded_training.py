"""The same training on one device and on four, whatever the mesh; and each device holds only what sharding promises."""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.models import Model, find_module
from rar_jax.parallel.arrays import make_global_batch
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import param_shardings, sharded
from rar_jax.sections import Recipe
from rar_jax.training.step import compile_training

RECIPE = Recipe(steps=4, batch_size=8, accumulation=1, learning_rate=1e-2, ema_decay=0.9)
GUARD_BYTES = 4 * (2 * 128 + 5)  # training/guard.py: two histories of 128, and five counts, on every device
MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "data and tensor": (2, 1, 2)}
MODULES = {"rar": ("generators", "rar"), "maskgit_vq": ("tokenizers", "maskgit_vq")}


def batches(module: ModuleType) -> list[dict[str, np.ndarray]]:
    rng, config = np.random.default_rng(0), module.TINY
    labels = np.arange(8, dtype=np.int32)
    if hasattr(module, "encode"):
        shape = (8, *module.image_spec(config).shape)
        return [{"images": rng.integers(0, 256, shape).astype(np.uint8), "labels": labels} for _ in range(3)]
    tokens = [rng.integers(0, config.codebook_size, (8, config.num_tokens)).astype(np.int32) for _ in range(3)]
    return [{"tokens": t, "labels": labels} for t in tokens]


def train(module: ModuleType, sizes: tuple[int, int, int]) -> tuple[list[float], Any]:
    """Losses of three steps, with dropout on, and the state."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    setup = compile_training(module, module.TINY, RECIPE, mesh)
    with sharded(mesh):
        state, losses = setup.init(jax.random.key(0)), []
        for batch in batches(module):
            state, metrics = setup.step(state, make_global_batch(batch, mesh), jax.random.key(1))
            losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module", params=MODULES)
def module_and_single(request: pytest.FixtureRequest) -> tuple[ModuleType, tuple[list[float], Any]]:
    module = find_module(*MODULES[request.param])
    return module, train(module, (1, 1, 1))


@pytest.mark.parametrize("name", MESHES)
def test_losses_do_not_depend_on_the_mesh(module_and_single: Any, name: str) -> None:
    module, (losses, state) = module_and_single
    ours, sharded_state = train(module, MESHES[name])
    np.testing.assert_allclose(ours, losses, rtol=0, atol=1e-5)
    assert len(set(losses)) == 3  # it trains, and does not repeat itself
    held = bytes_on_device(sharded_state)
    assert held == promised_bytes(module, sharded_state, MESHES[name]) + GUARD_BYTES
    if MESHES[name][1] == 4:
        assert held < 0.6 * bytes_on_device(state)


def bytes_on_device(state: Any) -> int:
    device = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == device]
    return sum(s.data.nbytes for s in shards)


def promised_bytes(module: ModuleType, state: Any, sizes: tuple[int, int, int]) -> int:
    """From first principles: parameters, two moments and the EMA, each cut along the axes that are named for it."""
    _, fsdp, tensor = sizes
    cut = {"width": fsdp, "conv_out": fsdp, "heads": tensor, "mlp": tensor, "codes": tensor}
    names = jax.tree.leaves(module.axes(module.TINY), is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree.leaves(state["params"])
    one_copy = sum(
        x.nbytes // int(np.prod([cut.get(n, 1) for n in axes])) for x, axes in zip(leaves, names, strict=True)
    )
    counters = [x for x in jax.tree.leaves((state["step"], state["opt_state"])) if jnp.ndim(x) == 0]
    return 4 * one_copy + sum(x.nbytes for x in counters)


# ---------------------------------------------------------------- a tokenizer inside the step


def train_on_images(sizes: tuple[int, int, int]) -> tuple[list[float], Any, Any]:
    """Losses of three steps on images that a tokenizer encodes, in two parts a batch; the state; the tokenizer's parameters."""
    generator, tokenizer = find_module("generators", "rar"), find_module("tokenizers", "maskgit_vq")
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    recipe = dataclasses.replace(RECIPE, accumulation=2)
    setup = compile_training(generator, generator.TINY, recipe, mesh, Model(tokenizer, tokenizer.TINY))
    frozen = tokenizer.init(tokenizer.TINY, jax.random.key(5))
    frozen = jax.device_put(frozen, param_shardings(tokenizer.axes(tokenizer.TINY), frozen, mesh))
    with sharded(mesh):
        state, losses = setup.init(jax.random.key(0)), []
        for batch in batches(tokenizer):
            state, metrics = setup.step(state, make_global_batch(batch, mesh), jax.random.key(1), frozen)
            losses.append(float(metrics["loss"]))
    return losses, state, frozen


@pytest.fixture(scope="module")
def on_one_device() -> tuple[list[float], Any, Any]:
    return train_on_images((1, 1, 1))


@pytest.mark.parametrize("name", MESHES)
def test_encoding_inside_the_step_does_not_depend_on_the_mesh(on_one_device: Any, name: str) -> None:
    losses, state, frozen = train_on_images(MESHES[name])
    np.testing.assert_allclose(losses, on_one_device[0], rtol=0, atol=1e-5)
    assert bytes_on_device(state) == promised_bytes(find_module("generators", "rar"), state, MESHES[name]) + GUARD_BYTES
    # Neither donated nor trained, and a share of it on each device where rules.py says so.
    jax.tree.map(np.testing.assert_array_equal, frozen, on_one_device[2])
    assert (bytes_on_device(frozen) < 0.6 * bytes_on_device(on_one_device[2])) == (MESHES[name][1] == 4)


def test_the_step_trains_on_the_tokens_of_its_argument(on_one_device: Any) -> None:
    """Against the same step fed with tokens; with another tokenizer's parameters, the same program gives another loss."""
    generator, tokenizer = find_module("generators", "rar"), find_module("tokenizers", "maskgit_vq")
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    recipe = dataclasses.replace(RECIPE, accumulation=2)
    plain = compile_training(generator, generator.TINY, recipe, mesh)
    direct = compile_training(generator, generator.TINY, recipe, mesh, Model(tokenizer, tokenizer.TINY))
    batch = batches(tokenizer)[0]
    losses = []
    for key in (5, 6):
        frozen = tokenizer.init(tokenizer.TINY, jax.random.key(key))
        tokens = tokenizer.encode(tokenizer.TINY, frozen, batch["images"])
        of_tokens = {"tokens": np.asarray(tokens), "labels": batch["labels"]}
        steps = ((plain, of_tokens, ()), (direct, batch, (frozen,)))
        with sharded(mesh):
            both = [
                setup.step(setup.init(jax.random.key(0)), make_global_batch(rows, mesh), jax.random.key(1), *extra)[1]
                for setup, rows, extra in steps
            ]
        np.testing.assert_allclose(*(float(metrics["loss"]) for metrics in both), rtol=1e-6)
        losses.append(float(both[1]["loss"]))
    assert losses[0] == on_one_device[0][0] != losses[1]
    assert direct.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
