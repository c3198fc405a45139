"""The guidance schedule at its limits, and what is traced and what is static in a Guidance."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import ConfigError
from rar_jax.sampling import ROUNDINGS, Guidance, to_uint8


def test_small_steps_do_not_cancel() -> None:
    """1 - cos(x) in float32 is 0 for x < 3e-4; the rise over w = 1 is still right, seen through a huge scale."""
    scale, power, n = 1e9, 2.0, 256
    for s in (1, 2, 3):
        exact = (scale - 1) * (1 - math.cos(math.pi * (s / n) ** power)) / 2
        assert float(Guidance(scale, power).weight(s, n)) - 1 == pytest.approx(exact, rel=1e-5)


def test_power_zero_is_constant_from_the_first_step() -> None:
    """0 ** 0 is 1."""
    assert (np.asarray(Guidance(4.0, 0.0).weight(jnp.arange(8), 8)) == 4.0).all()
    traced = jax.jit(lambda g, s: g.weight(s, 8))(Guidance(4.0, 0.0), jnp.arange(8))
    assert (np.asarray(traced) == 4.0).all()


@pytest.mark.parametrize("scale", [0, 1, 0.0, 1.0])
@pytest.mark.parametrize("power", [0.0, 1.5])
def test_scales_zero_and_one_are_no_guidance(scale: float, power: float) -> None:
    guidance = Guidance(scale, power)
    assert guidance.enabled is False
    assert np.array_equal(guidance.weight(jnp.arange(5), 5), np.ones(5, np.float32))


@pytest.mark.parametrize("scale", [0.5, 1.0001, 2, 16.0])
def test_any_other_scale_is_guidance(scale: float) -> None:
    assert Guidance(scale).enabled is True
    assert float(Guidance(scale).weight(3, 8)) == np.float32(scale)


def test_enabled_is_static_and_the_numbers_are_traced() -> None:
    traces: list[bool] = []

    @jax.jit
    def weights(guidance: Guidance, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert isinstance(guidance.scale, jax.core.Tracer)
        traces.append(guidance.enabled)
        return guidance.weight(step, 16), guidance.temperature * jnp.ones(())

    step = jnp.arange(16)
    sweep = [Guidance(2.0), Guidance(4.0, 1.0), Guidance(7.5, 2.75, 1.02), Guidance(0.5, 0.0, 0.9)]
    for guidance in sweep:
        weight, temperature = weights(guidance, step)
        np.testing.assert_allclose(weight, guidance.weight(step, 16), rtol=1e-6)
        assert float(temperature) == np.float32(guidance.temperature)
    assert traces == [True]
    for guidance in (Guidance(0.0), Guidance(1.0, 2.0), Guidance(0.0, temperature=2.0)):
        assert np.array_equal(weights(guidance, step)[0], np.ones(16))
    assert traces == [True, False]


def test_it_passes_through_trees_unchanged() -> None:
    guidance = Guidance(3.0, 1.5, 0.9)
    leaves, structure = jax.tree.flatten(guidance)
    assert leaves == [3.0, 1.5, 0.9]
    again = structure.unflatten(leaves)
    assert again == guidance and again.enabled is True
    # Whether it is enabled was decided when it was taken apart: other numbers do not change the program.
    assert structure.unflatten([1.0, 0.0, 1.0]).enabled is True
    assert jax.tree.structure(Guidance(2.0)) == structure != jax.tree.structure(Guidance(1.0))
    assert jax.tree.structure(again) == structure


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"scale": -0.1}, "scale is -0.1: it must be 0 (no guidance) or more"),
        ({"scale": float("nan")}, "scale is nan: it must be a number of float32"),
        ({"scale": 2.0, "power": -1.0}, "power is -1.0: it must be 0 (constant guidance) or more"),
        ({"scale": 2.0, "temperature": 0.0}, "temperature is 0.0: it must be above 0; for argmax use greedy"),
        ({"scale": 2.0, "temperature": -1.0}, "temperature is -1.0: it must be above 0; for argmax use greedy"),
    ],
)
def test_impossible_numbers(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Guidance(**arguments)
    assert str(caught.value) == problem


@pytest.mark.parametrize("numbers", [(float("inf"),), (4.0, 1.0, float("inf")), (1e40,), (float("nan"),)])
def test_numbers_that_float32_does_not_have(numbers: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="it must be a number of float32"):
        Guidance(*numbers)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_images_are_clipped_and_rounded(rounding: str) -> None:
    """Without clipping, 1.2 became 50 and -0.1 became 231 on some machines."""
    values = jnp.array([-jnp.inf, -0.1, 0.0, 0.4999, 0.999, 1.0, 1.2, jnp.inf, jnp.nan])
    found = jax.jit(lambda x: to_uint8(x, rounding))(values)
    middle = [127, 254] if rounding == "truncate" else [127, 255]
    assert found.dtype == jnp.uint8 and found.tolist() == [0, 0, 0, *middle, 255, 255, 255, 0]
