"""The recipe against the authors' training: schedules, decay mask, gradients and four whole steps (golden files)."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rar_jax.errors import ConfigError
from rar_jax.generators import rar
from rar_jax.sections import Recipe
from rar_jax.training.optimizer import make_optimizer, make_schedule
from rar_jax.training.step import make_init, make_train_step
from rar_jax.weights import rar as released
from rar_jax.weights.mapping import to_released

RELEASED = Recipe(steps=250_000, batch_size=2048, warmup=62_500)
TINY_RUN = Recipe(steps=10, batch_size=4, warmup=2)  # everything else is the default, which is the released recipe
TABLES = ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings")


def by_released_name(config: rar.Config, tree: Any) -> dict[str, np.ndarray]:
    """Under the released names; position tables cut to the rows that are used, as the golden files hold them."""
    out = to_released(released.TABLE, tree)
    return {name: x[:, : config.num_tokens + 2] if name in TABLES else x for name, x in out.items()}


def zero_in_exact_arithmetic(name: str) -> bool:
    """Softmax ignores a shift, so this gradient is rounding noise (golden/README.md)."""
    return name.endswith("attn.k_norm.bias")


@pytest.fixture(scope="module")
def tiny(golden: pathlib.Path) -> tuple[rar.Config, Any, Any]:
    config, params = released.load(golden / "rar_tiny.bin")
    return config, jax.tree.map(jnp.asarray, params), np.load(golden / "rar_tiny.npz")


def batch_of(g: Any, step: int) -> dict[str, jax.Array]:
    batch = {"tokens": g["tokens"], "labels": g["labels"], "orders": g[f"train_orders_{step}"]}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


# ---------------------------------------------------------------- schedules


def test_the_released_learning_rate(golden: pathlib.Path, parity: Any) -> None:
    g = np.load(golden / "rar_tiny.npz")
    assert len(g["lr_steps"]) == 11 and g["lr_steps"][-1] == RELEASED.steps
    ours = np.array([float(make_schedule(RELEASED)(int(s))) for s in g["lr_steps"]])
    # Float32 of a rate that is at most 4e-4: optax computes the warm-up as peak - peak * (share that is left).
    parity.check_close(
        "learning rates, difference over the peak's float32 step",
        ours / (4e-4 * 2**-23),
        g["lr_values"] / (4e-4 * 2**-23),
        1,
    )


def test_the_whole_schedule_by_its_formula() -> None:
    recipe = Recipe(steps=40, batch_size=1, warmup=10, learning_rate=3e-3, end_learning_rate=2e-4)
    k = np.arange(41)
    cosine = 2e-4 + (3e-3 - 2e-4) * (1 + np.cos(np.pi * (k - 10) / 30)) / 2
    ours = [float(make_schedule(recipe)(int(s))) for s in k]
    np.testing.assert_allclose(ours, np.where(k < 10, 3e-3 * k / 10, cosine), rtol=1e-5, atol=1e-9)
    assert float(make_schedule(recipe)(1000)) == pytest.approx(2e-4, rel=1e-5)


def test_schedules_at_their_limits() -> None:
    no_warmup = make_schedule(Recipe(steps=10, batch_size=1))
    assert float(no_warmup(0)) == pytest.approx(4e-4, rel=1e-6) and float(no_warmup(10)) == pytest.approx(
        1e-5, rel=1e-5
    )
    long_warmup = make_schedule(Recipe(steps=10, batch_size=1, warmup=9))
    np.testing.assert_allclose(
        [float(long_warmup(s)) for s in (0, 3, 9, 10)], [0, 4e-4 / 3, 4e-4, 1e-5], rtol=1e-5, atol=1e-10
    )


def test_the_released_random_ratio(golden: pathlib.Path, parity: Any) -> None:
    g = np.load(golden / "rar_tiny.npz")
    assert (rar.Config().anneal_start, rar.Config().anneal_end) == (125_000, 187_500)
    ours = [float(rar.random_ratio(rar.Config(), int(s))) for s in g["ratio_steps"]]
    parity.check_close("share of random orders", ours, g["ratio_values"], 1e-7)


# ---------------------------------------------------------------- decay


def test_the_released_decay_mask(tiny: Any, parity: Any) -> None:
    config, params, g = tiny
    mask = jax.tree.map(lambda decays, x: np.full(x.shape, decays), rar.decay_mask(config), params)
    decayed = {name for name, x in by_released_name(config, mask).items() if x.all()}
    parity.check("decayed parameters, names that differ", len(decayed ^ set(g["decayed_names"].tolist())), 0)
    assert not any(x.any() for name, x in by_released_name(config, mask).items() if name not in decayed)


def test_decay_is_decoupled_and_masked() -> None:
    """Without a gradient, the update is -lr * wd * p where the mask is True and nothing elsewhere."""
    recipe = Recipe(steps=10, batch_size=1, weight_decay=0.5)
    params = {"kernel": jnp.asarray([2.0, -4.0]), "bias": jnp.asarray([3.0])}
    tx = make_optimizer(recipe, {"kernel": True, "bias": False})
    updates: Any = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    np.testing.assert_allclose(updates["kernel"], [-4e-4 * 0.5 * 2.0, 4e-4 * 0.5 * 4.0], rtol=1e-6)
    assert float(updates["bias"][0]) == 0


# ---------------------------------------------------------------- gradients and steps


class FourSteps(NamedTuple):
    metrics: list[dict[str, float]]
    first_grads: Any
    params: Any


def recording() -> optax.GradientTransformation:
    """Passes gradients on and keeps them in its state: what the train step gives its optimizer, before any clipping."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )


@pytest.fixture(scope="module")
def four(tiny: Any) -> FourSteps:
    config, params, g = tiny
    tx = optax.chain(recording(), make_optimizer(TINY_RUN, rar.decay_mask(config)))
    state = make_init(lambda key: params, tx, TINY_RUN)(jax.random.key(0))
    step = jax.jit(make_train_step(functools.partial(rar.loss, config, train=True), tx, TINY_RUN))
    history, first_grads = [], None
    for k in range(4):
        state, metrics = step(state, batch_of(g, k), jax.random.key(0))
        history.append({name: float(value) for name, value in metrics.items()})
        first_grads = first_grads or state["opt_state"][0]
    assert int(state["step"]) == 4
    return FourSteps(history, first_grads, state["params"])


def test_gradients(tiny: Any, four: FourSteps, golden: pathlib.Path, parity: Any) -> None:
    ours, theirs = by_released_name(tiny[0], four.first_grads), np.load(golden / "rar_tiny_grads.npz")
    assert ours.keys() == set(theirs.files)
    for name, grad in ours.items():
        if zero_in_exact_arithmetic(name):
            assert np.abs(grad).max() < 1e-8 and np.abs(theirs[name]).max() < 1e-8, name
        else:
            error = np.linalg.norm(grad.astype(np.float64) - theirs[name])
            parity.check("gradients, over each tensor's norm", error / np.linalg.norm(theirs[name]), 1e-5)


def test_four_training_steps(tiny: Any, four: FourSteps, golden: pathlib.Path, parity: Any) -> None:
    config, params, g = tiny
    losses, norms, rates = ([m[name] for m in four.metrics] for name in ("loss", "grad_norm", "learning_rate"))
    parity.check_close("four optimizer steps, losses", losses, g["train_losses"], 1e-5)
    np.testing.assert_allclose(norms, g["train_grad_norms"], rtol=1e-5)
    np.testing.assert_allclose(rates, g["train_lrs"], rtol=1e-6)
    ours, theirs = by_released_name(config, four.params), np.load(golden / "rar_tiny_after4.npz")
    assert ours.keys() == set(theirs.files)
    start = by_released_name(config, params)
    for name, value in ours.items():
        if not zero_in_exact_arithmetic(name):
            parity.check_close("four optimizer steps, parameters", value, theirs[name], 1e-6)
            assert np.abs(value - start[name]).max() > 1e-5, name


# ---------------------------------------------------------------- impossible recipes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"log_every": 0}, "log_every is 0: it must be at least 1"),
        ({"eval_every": 0}, "eval_every is 0: it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0: it must be at least 1"),
        ({"accumulation": 3}, "batch_size 8 is not divisible by accumulation 3"),
        ({"warmup": 11}, "warmup is 11: it must be shorter than the 10 steps"),
        ({"warmup": 10}, "warmup is 10: it must be shorter than the 10 steps"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0: it must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: it must be in [0, 1)"),
        (
            {"keep_checkpoints": 1},
            "keep_checkpoints is 1: it must be at least 2",
        ),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(Recipe(steps=10, batch_size=8), **changes)
    assert str(caught.value) == problem
