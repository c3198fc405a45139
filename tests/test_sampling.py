"""What samplers share, against NumPy in float64; what is traced and what is static in settings."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rar_jax.errors import ConfigError
from rar_jax.generators import rar
from rar_jax.models import Model
from rar_jax.sampling import (
    ROUNDINGS,
    SamplingSettings,
    draw_ids,
    guide,
    keep_top_k,
    keep_top_p,
    make_sampling,
    to_uint8,
    weigh_guidance,
)

# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("schedule", "rise"),
    [
        ("constant", np.ones_like),
        ("linear", lambda x: x),
        ("cosine", lambda x: np.cos(np.pi / 2 * (1 - x))),
        ("power-cosine", lambda x: (1 - np.cos(np.pi * x**1.5)) / 2),
    ],
)
def test_schedules_in_float64(schedule: Any, rise: Any) -> None:
    share = np.linspace(0, 1, 17)
    found = jax.jit(lambda scale, x: weigh_guidance(scale, x, schedule=schedule, power=1.5))(7.0, share)
    np.testing.assert_allclose(found, 1 + 6 * rise(share), rtol=2e-6)
    # From 0, for c + w (c - u), and only within an interval.
    found = weigh_guidance(7.0, share, schedule=schedule, power=1.5, start=0.0, interval=(0.25, 0.5))
    inside = (share > 0.25) & (share <= 0.5)
    np.testing.assert_allclose(found, np.where(inside, 7 * rise(share), 0), rtol=2e-6, atol=2e-6)


def test_small_steps_do_not_cancel() -> None:
    """1 - cos(x) in float32 is 0 for x < 3e-4; the rise over w = 1 is still right, seen through a huge scale."""
    for s in (1, 2, 3):
        exact = (1e9 - 1) * (1 - math.cos(math.pi * (s / 256) ** 2)) / 2
        found = weigh_guidance(1e9, s / 256, schedule="power-cosine", power=2.0)
        assert float(found) - 1 == pytest.approx(exact, rel=1e-5)


def test_both_forms_of_guidance() -> None:
    c, u = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(guide(c, u, 3.0), u + 3 * (c - u), rtol=1e-6)
    np.testing.assert_allclose(guide(c, u, 2.0, origin="class"), guide(c, u, 3.0), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- draws


def test_top_k_keeps_equal_ones() -> None:
    logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    kept = np.isfinite(keep_top_k(logits, 2))
    np.testing.assert_array_equal(kept, [[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert keep_top_k(logits, None) is logits and keep_top_k(logits, 9) is logits


def test_top_p_keeps_the_first_above_the_line() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 32)).astype(np.float32) * 2
    for p in (0.05, 0.5, 0.9):
        kept = np.isfinite(jax.jit(keep_top_p)(logits, p))
        for row, found in zip(logits.astype(np.float64), kept, strict=True):
            order = np.argsort(-row)
            before = np.cumsum(np.concatenate([[0.0], scipy.special.softmax(row)[order]]))[:-1]
            expected = np.zeros(32, bool)
            expected[order[before <= p]] = True
            np.testing.assert_array_equal(found, expected)
    assert keep_top_p(jnp.asarray(logits), None) is not None and np.isfinite(keep_top_p(logits, None)).all()


def test_uniforms_draw_by_cumulative_probabilities() -> None:
    rng = np.random.default_rng(1)
    logits, uniforms = rng.standard_normal((200, 16)).astype(np.float32), rng.random(200, np.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    cumulative = np.cumsum(scipy.special.softmax(logits.astype(np.float64), axis=-1), axis=-1)
    expected = (cumulative <= uniforms[:, None]).sum(axis=-1)
    np.testing.assert_array_equal(draw_ids(jnp.asarray(logits), keys, jnp.asarray(uniforms)), expected)
    # Of probability 0, none is drawn, and the largest uniform draws the last that has any.
    masked = jnp.where(jnp.arange(16) < 5, logits, -jnp.inf)
    assert int(draw_ids(masked, keys, jnp.full(200, 1 - 2.0**-24)).max()) == 4
    drawn = draw_ids(jnp.broadcast_to(masked[:1], (200, 16)), keys)
    assert drawn.dtype == jnp.int32 and set(np.unique(drawn)) <= set(range(5)) and len(np.unique(drawn)) > 2


# ---------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Settings(SamplingSettings):
    """One field of each kind."""

    scale: float | None = None
    temperature: float = 1.0
    top_p: float | None = None
    num_steps: int = 8
    schedule: str = "linear"


def test_numbers_are_traced_and_the_rest_is_static() -> None:
    traced: list[Any] = []

    @jax.jit
    def use(settings: Settings) -> jax.Array:
        assert isinstance(settings.temperature, jax.core.Tracer) and isinstance(settings.num_steps, int)
        traced.append(settings)
        return settings.temperature * settings.num_steps + (0.0 if settings.scale is None else settings.scale)

    for settings in (Settings(), Settings(temperature=2.0), Settings(temperature=0.5)):
        assert float(use(settings)) == 8 * settings.temperature
    assert len(traced) == 1
    assert [float(use(Settings(scale=scale))) for scale in (2.0, 3.0)] == [10.0, 11.0] and len(traced) == 2
    use(Settings(num_steps=9)), use(Settings(schedule="cosine"))
    assert len(traced) == 4
    leaves, structure = jax.tree.flatten(Settings(scale=3.0))
    assert leaves == [3.0, 1.0] and structure.unflatten(leaves) == Settings(scale=3.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scale": -0.1}, "scale is -0.1: it must be 0 or more, or None for no guidance"),
        ({"scale": float("nan")}, "scale is nan: it must be a number of float32"),
        ({"scale": 1e40}, "scale is 1e+40: it must be a number of float32"),
        ({"power": -1.0}, "power is -1.0: it must be 0 (constant guidance) or more"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0; for argmax use greedy"),
        ({"scale": "high"}, "sampling of generator 'rar'.scale is 'high' (str): it must be float"),
        ({"num_steps": 4}, "sampling of generator 'rar' has no key 'num_steps'. It has: greedy, power, "),
    ],
)
def test_impossible_settings(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_sampling(Model(rar, rar.TINY), changes)
    assert problem in str(caught.value)


def test_changes_start_from_the_base() -> None:
    base = rar.Sampling(16.0, 2.75)
    made = make_sampling(Model(rar, rar.TINY), {"temperature": np.float32(2), "scale": 4}, base)
    assert made == rar.Sampling(4.0, 2.75, 2.0) and type(made.temperature) is type(made.scale) is float
    assert make_sampling(Model(rar, rar.TINY), {"scale": None}, base).scale is None


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_images_are_clipped_and_rounded(rounding: str) -> None:
    """Without clipping, 1.2 became 50 and -0.1 became 231 on some machines."""
    values = jnp.array([-jnp.inf, -0.1, 0.0, 0.4999, 0.999, 1.0, 1.2, jnp.inf, jnp.nan])
    found = jax.jit(lambda x: to_uint8(x, rounding))(values)
    middle = [127, 254] if rounding == "truncate" else [127, 255]
    assert found.dtype == jnp.uint8 and found.tolist() == [0, 0, 0, *middle, 255, 255, 255, 0]
