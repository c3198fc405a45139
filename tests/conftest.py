"""Four fake CPU devices for every test, and rank promotion is an error. Set before JAX starts its backend."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests compile thousands of tiny programs and run each a few times: without LLVM's optimizations they take half the
# time. What the numbers mean does not change; tests/faults runs the real command, optimized.
jax.config.update("jax_disable_most_optimizations", True)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the reference outputs."""
    return GOLDEN
