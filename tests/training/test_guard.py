"""The guard: what is bad, what it remembers, and that a bad update leaves every array as it was, on every shard."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.models import Aux
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, param_shardings, replicated
from rar_jax.sections import Recipe
from rar_jax.training import guard
from rar_jax.training.optimizer import make_optimizer
from rar_jax.training.step import make_init, make_train_step, state_shardings

judge = jax.jit(guard.judge, static_argnames="sigmas")


def judged(values: list[tuple[float, float]], sigmas: float = 6.0) -> tuple[list[bool], dict[str, Any]]:
    state, found = guard.init(), []
    for loss, norm in values:
        bad, state = judge(state, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}, sigmas=sigmas)
        found.append(bool(bad))
    return found, state


def calm(count: int, seed: int = 0) -> list[tuple[float, float]]:
    return [tuple(row) for row in 2 + 0.1 * np.random.default_rng(seed).standard_normal((count, 2))]


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_not_finite_is_bad_from_the_first_step_and_never_remembered(worst: float, which: int) -> None:
    value = (worst, 1.0) if which == 0 else (1.0, worst)
    found, state = judged([value, (1.0, 1.0), value, value, *calm(200)])
    assert (
        found == [True, False, True, True] + [False] * 200
    )  # the published rule would call all later ones bad, or none
    assert np.isfinite(state["history"]).all() and int(state["seen"]) == 201
    assert (int(state["skipped"]), int(state["consecutive"])) == (3, 0)


def test_a_spike_right_after_a_nan_is_seen() -> None:
    """When the history is full, a NaN in it would make NaN of the limit, above which nothing is."""
    assert judged([*calm(200), (np.nan, 2.0), (1e6, 2.0), (2.0, 2.0)])[0][200:] == [True, True, False]


def test_the_limit_is_the_mean_and_deviation_of_the_last_128() -> None:
    values = calm(300)
    last = np.array(values[-guard.WINDOW :], np.float64)
    limit = last.mean(axis=0) + 6 * last.std(axis=0)
    for which in (0, 1):
        for share, expected in ((0.999, False), (1.001, True)):
            value = list(last.mean(axis=0))
            value[which] = limit[which] * share
            assert judged([*values, tuple(value)])[0][-1] is expected, (which, share)
    assert not any(judged([*values, (1e9, 1e9)], sigmas=0.0)[0])
    assert not any(judged([*values[: guard.WINDOW // 2 - 1], (1e9, 1e9)])[0]), "too few to judge by"


def test_a_spike_enters_as_the_limit_and_a_new_level_is_accepted_in_the_end() -> None:
    found, _ = judged([*calm(128), (1e6, 2.0), *calm(10, 1), (3.5, 2.0)])
    assert found == [False] * 128 + [True] + [False] * 10 + [True], "one spike does not hide the next"
    found, _ = judged([*calm(128), *[(20.0, 2.0)] * 40])
    assert found[128] and not found[-1] and sum(found) < 30


def test_hardly_any_deviation_is_no_reason() -> None:
    found, _ = judged([(1.0, 1.0)] * 128 + [(1.0 + 1e-6, 1.0), (1.05, 1.0), (1.07, 1.0)])
    assert found == [False] * 130 + [True]


@pytest.mark.parametrize("config", [None, MeshConfig(2, 2, 1), MeshConfig(1, 2, 2)], ids=str)
def test_a_bad_update_changes_nothing_on_any_shard(config: MeshConfig | None) -> None:
    """A NaN in one row, which lies on one device, and a parameter whose gradient stays finite."""

    def loss(params: Any, batch: Any, **_: Any) -> Any:
        value = jnp.mean(jnp.square(batch["x"] @ params["a"]["kernel"] @ params["b"]["kernel"])) + params["c"].sum()
        return value, Aux({"loss": value})

    recipe = Recipe(steps=20, batch_size=8, ema_decay=0.9, learning_rate=0.01)
    mesh = make_mesh(config) if config else make_mesh(MeshConfig(), jax.devices()[:1])
    params = {"a": {"kernel": jnp.ones((8, 12))}, "b": {"kernel": jnp.ones((12, 8))}, "c": jnp.ones(4)}
    axes = {"a": {"kernel": ("width", "mlp")}, "b": {"kernel": ("mlp", "width")}, "c": (None,)}
    tx = make_optimizer(recipe, jax.tree.map(lambda _: True, params))
    init = make_init(lambda key: params, tx, recipe)
    shapes = jax.eval_shape(init, jax.random.key(0))
    at = state_shardings(shapes, param_shardings(axes, shapes["params"], mesh), replicated(mesh), tx)
    step = jax.jit(make_train_step(loss, tx, recipe), donate_argnums=0, out_shardings=(at, replicated(mesh)))
    state = jax.jit(init, out_shardings=at)(jax.random.key(0))
    rows = np.random.default_rng(0).standard_normal((6, 8, 8)).astype(np.float32)

    def shards(state: Any) -> list[bytes]:
        kept = {name: state[name] for name in ("params", "opt_state", "ema", "extra")}
        return [np.asarray(s.data).tobytes() for x in jax.tree.leaves(kept) for s in x.addressable_shards]

    before, told = shards(state), []
    for k, x in enumerate(rows):
        if k == 3:
            x = x.copy()
            x[5, 2] = np.nan
        state, metrics = step(state, {"x": jax.device_put(x, batch_sharding(mesh))}, jax.random.key(0))
        after = shards(state)
        assert (after == before) is (k == 3), k
        if k != 3:
            assert all(a != b for a, b in zip(after, before, strict=True) if len(a) > 4)  # every array moves
        before = after
        told.append((int(metrics["skipped"]), int(metrics["consecutive"])))
    assert told == [(0, 0), (0, 0), (0, 0), (1, 1), (1, 0), (1, 0)]
    assert int(state["step"]) == 6 and np.isfinite(np.asarray(state["params"]["c"])).all()
