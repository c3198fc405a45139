"""Schedules, decoupled weight decay, impossible recipes. tests/golden compares the recipe with the authors' training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import ConfigError
from rar_jax.sections import Recipe
from rar_jax.training.optimizer import make_optimizer, make_schedule

# ---------------------------------------------------------------- schedules


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


# ---------------------------------------------------------------- decay


def test_decay_is_decoupled_and_masked() -> None:
    """Without a gradient, the update is -lr * wd * p where the mask is True and nothing elsewhere."""
    recipe = Recipe(steps=10, batch_size=1, weight_decay=0.5)
    params = {"kernel": jnp.asarray([2.0, -4.0]), "bias": jnp.asarray([3.0])}
    tx = make_optimizer(recipe, {"kernel": True, "bias": False})
    updates: Any = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    np.testing.assert_allclose(updates["kernel"], [-4e-4 * 0.5 * 2.0, 4e-4 * 0.5 * 4.0], rtol=1e-6)
    assert float(updates["bias"][0]) == 0


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
