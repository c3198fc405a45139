"""The train step on a small network of its own: accumulation, EMA, what follows the update, randomness, places."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rar_jax.models import Aux
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, param_shardings, replicated
from rar_jax.sections import Recipe
from rar_jax.training.optimizer import make_optimizer
from rar_jax.training.step import State, evaluated_params, make_init, make_train_step, state_shardings

AXES = {"first": {"kernel": ("width", "mlp"), "bias": ("mlp",)}, "last": {"kernel": ("mlp", "width")}}
MASK = {"first": {"kernel": True, "bias": False}, "last": {"kernel": True}}
ROOT = 7


def init(key: jax.Array) -> dict[str, Any]:
    first, last = jax.random.split(key)
    return {
        "first": {"kernel": jax.random.normal(first, (8, 12)), "bias": jnp.zeros((12,))},
        "last": {"kernel": jax.random.normal(last, (12, 8))},
    }


def loss(params: Any, batch: Any, *, key: jax.Array, step: jax.Array, extra: Any = None) -> tuple[jax.Array, Aux]:
    """Mean over rows of a regression: no randomness, so that parts of a batch add up to the whole."""
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    value = jnp.mean(jnp.square(hidden @ params["last"]["kernel"] - batch["y"]))
    return value, Aux({"loss": value, "mean_x": jnp.mean(batch["x"])}, outputs={"x": batch["x"]})


def batch_of(step: int, rows: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal((rows, 8)).astype(np.float32) for name in ("x", "y")}


def recipe_of(**changes: Any) -> Recipe:
    return Recipe(**{"steps": 10, "batch_size": 16, "learning_rate": 0.01, **changes})


class Run(NamedTuple):
    state: State
    metrics: list[dict[str, float]]  # of each step
    params: list[Any]  # after each step, on the host
    ema: list[Any]


def run(recipe: Recipe, steps: int, mesh: Any = None, **step_arguments: Any) -> Run:
    """Some steps from the same start, sharded and with the old state donated as training does it."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    tx = make_optimizer(recipe, MASK)
    init_extra = step_arguments.pop("init_extra", None)
    init_state = make_init(init, tx, recipe, init_extra and (lambda key: init_extra()))
    shapes = jax.eval_shape(init_state, jax.random.key(0))
    shardings = state_shardings(shapes, param_shardings(AXES, shapes["params"], mesh), replicated(mesh), tx)
    step_fn = make_train_step(step_arguments.pop("loss", loss), tx, recipe, **step_arguments)
    step = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    state = jax.jit(init_state, out_shardings=shardings)(jax.random.key(0))
    out = Run(state, [], [], [])
    for k in range(steps):
        state, metrics = step(state, jax.device_put(batch_of(k), batch_sharding(mesh)), jax.random.key(ROOT))
        out.metrics.append({name: float(value) for name, value in metrics.items()})
        out.params.append(jax.tree.map(np.array, state["params"]))
        out.ema.append(jax.tree.map(np.array, state["ema"]))
    assert int(state["step"]) == steps
    return out._replace(state=state)


@pytest.fixture(scope="module")
def plain() -> Run:
    return run(recipe_of(), 4)


@pytest.fixture(scope="module")
def averaged() -> Run:
    return run(recipe_of(ema_decay=0.75), 4, make_mesh(MeshConfig(1, 2, 2)))


def assert_close(a: Any, b: Any, atol: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("mesh", [None, MeshConfig(2, 2, 1), MeshConfig(2, 1, 2)], ids=str)
def test_accumulation_in_four_parts_is_the_whole_batch(plain: Run, mesh: MeshConfig | None) -> None:
    parts = run(recipe_of(accumulation=4), 2, mesh and make_mesh(mesh))
    assert_close(parts.params[1], plain.params[1], 1e-6)
    for a, b in zip(parts.metrics, plain.metrics, strict=False):
        assert a == pytest.approx(b, abs=1e-6, rel=1e-5)
    assert parts.metrics[0]["mean_x"] == pytest.approx(float(batch_of(0)["x"].mean()), abs=1e-6)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), plain.params[1], init(jax.random.key(0)))
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_parts_of_a_batch_draw_different_numbers() -> None:
    """Each part reports its own draw: with one key for all, the mean of four would be the draw itself."""

    def drawing(params: Any, batch: Any, *, key: jax.Array, **rest: Any) -> tuple[jax.Array, Aux]:
        value, aux = loss(params, batch, key=key, **rest)
        draw = jax.random.uniform(key)
        return value, Aux(aux.metrics | {"draw": draw, "square": draw**2})

    first, second = run(recipe_of(accumulation=4), 2, loss=drawing).metrics
    for metrics in (first, second):
        assert metrics["square"] - metrics["draw"] ** 2 > 1e-3  # the variance over the parts
    assert first["draw"] != second["draw"]


def test_the_step_reports_the_norm_of_the_gradient_before_clipping(plain: Run) -> None:
    """Which recipe.clip_norm 1 would have cut."""
    grads = jax.grad(lambda p: loss(p, batch_of(0), key=jax.random.key(0), step=jnp.int32(0))[0])(
        init(jax.random.key(0))
    )
    norm = np.sqrt(sum(float(np.square(np.asarray(g, np.float64)).sum()) for g in jax.tree.leaves(grads)))
    assert plain.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 1.5


# ---------------------------------------------------------------- randomness


def test_randomness_is_a_function_of_root_and_step() -> None:
    def drawing(
        params: Any, batch: Any, *, key: jax.Array, step: jax.Array, extra: Any = None
    ) -> tuple[jax.Array, Aux]:
        value, aux = loss(params, batch, extra=extra, key=key, step=step)
        return value, Aux(aux.metrics | {"draw": jax.random.uniform(key), "step": step.astype(jnp.float32)})

    recipe = recipe_of()
    tx = make_optimizer(recipe, MASK)
    step = jax.jit(make_train_step(drawing, tx, recipe))
    state = make_init(init, tx, recipe)(jax.random.key(0))

    def draw(at: int, root: int) -> float:
        metrics = step({**state, "step": jnp.int32(at)}, batch_of(0), jax.random.key(root))[1]
        assert float(metrics["step"]) == at
        return float(metrics["draw"])

    assert draw(5, 1) == draw(5, 1)
    assert len({draw(at, root) for at in (0, 1, 5) for root in (1, 2)}) == 6


# ---------------------------------------------------------------- EMA, after_step


def test_ema_is_the_recurrence_in_float64(plain: Run, averaged: Run) -> None:
    ema = jax.tree.map(lambda x: np.asarray(x, np.float64), init(jax.random.key(0)))
    for k, (ours, params) in enumerate(zip(averaged.ema, averaged.params, strict=True)):
        decay = min(0.75, (1 + k) / (10 + k))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, ema, params)
        assert_close(ours, ema, 1e-6)
    assert float(np.abs(ema["first"]["kernel"] - averaged.params[-1]["first"]["kernel"]).max()) > 1e-3
    assert_close(averaged.params[-1], plain.params[-1], 1e-6)  # the EMA only watches


def test_evaluated_params(plain: Run, averaged: Run) -> None:
    assert evaluated_params(averaged.state) is averaged.state["ema"]
    assert plain.state["ema"] == {} and evaluated_params(plain.state) is plain.state["params"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_after_step_follows_the_update_and_the_ema_sees_it(plain: Run, accumulation: int) -> None:
    calls: list[Any] = []

    def after_step(params: Any, extra: Any, batch: Any, *, outputs: Any, key: jax.Array, step: jax.Array) -> Any:
        calls.append((key.shape, batch["x"].shape))
        bias = params["first"]["bias"] * 0 + 100.0 + step
        same = jnp.all(outputs["x"] == batch["x"])  # in the order of the batch, from two parts too
        return {**params, "first": {**params["first"], "bias": bias}}, {"calls": extra["calls"] + same}

    init_extra = functools.partial(dict, calls=jnp.zeros(()))
    after = run(recipe_of(ema_decay=0.5, accumulation=accumulation), 2, after_step=after_step, init_extra=init_extra)
    assert float(after.state["extra"]["calls"]) == 2
    np.testing.assert_array_equal(after.params[0]["first"]["bias"], np.full(12, 100.0))
    np.testing.assert_array_equal(after.params[1]["first"]["bias"], np.full(12, 101.0))
    np.testing.assert_allclose(
        after.ema[1]["first"]["bias"], np.full(12, 2 / 11 * (0.9 * 100) + 9 / 11 * 101), rtol=1e-6
    )
    assert calls == [((), (16, 8))]
    assert_close(after.params[0]["last"], plain.params[0]["last"], 1e-7)


# ---------------------------------------------------------------- where the state lies


def test_moments_and_ema_lie_as_the_parameters_do(averaged: Run) -> None:
    """Bytes a device: (8 * 12 * 2 kernel elements) / 4 + 12 / 2 of bias, four times over (params, EMA, two moments);
    and the guard's history of 2 * 128."""
    mesh, state = make_mesh(MeshConfig(1, 2, 2)), averaged.state
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        if leaf.ndim:
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.size
    assert set(held.values()) == {4 * (2 * 8 * 12 // 4 + 12 // 2) + 256}
    kernel = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    adam = [x for x in jax.tree.leaves(state["opt_state"]) if x.shape == (8, 12)]
    assert len(adam) == 2 and all(x.sharding == kernel for x in [*adam, state["ema"]["first"]["kernel"]])
    assert state["step"].sharding.is_fully_replicated
