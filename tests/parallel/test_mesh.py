"""Meshes over the four fake devices of conftest."""

import dataclasses
import logging
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from rar_jax.errors import ConfigError
from rar_jax.generators import rar
from rar_jax.parallel.mesh import (
    AXES,
    MeshConfig,
    batch_divisor,
    find_devices,
    make_mesh,
    matmul_dtype,
    with_device_dtype,
)
from rar_jax.tokenizers import maskgit_vq


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (4, 1, 1)),
        (MeshConfig(-1, 2, 1), (2, 2, 1)),
        (MeshConfig(1, -1, 1), (1, 4, 1)),
        (MeshConfig(2, 1, -1), (2, 1, 2)),
        (MeshConfig(-1, 4, 1), (1, 4, 1)),
        (MeshConfig(2, 1, 2), (2, 1, 2)),
    ],
)
def test_sizes_and_the_one_that_is_left(config: MeshConfig, shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()} and mesh.size == 4
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert batch_divisor(mesh) == shape[0] * shape[1]


def test_other_threefry_numbers_are_refused() -> None:
    """A user's environment variable would change every draw."""
    assert find_devices() == jax.devices()
    with jax.threefry_partitionable(False), pytest.raises(ConfigError, match="JAX_THREEFRY_PARTITIONABLE is off"):
        find_devices()


def test_given_devices() -> None:
    chosen = jax.devices()[1:3]
    mesh = make_mesh(MeshConfig(fsdp=2), chosen)
    assert {d.id for d in np.ravel(mesh.devices)} == {1, 2} and dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "config", [MeshConfig(3, 1, 1), MeshConfig(2, 1, 1), MeshConfig(-1, 3, 1), MeshConfig(-1, 8, 1)]
)
def test_sizes_that_do_not_fit(config: MeshConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        make_mesh(config)
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    assert str(caught.value) == f"mesh {sizes} does not multiply to 4 devices: set one size to -1"


@pytest.mark.parametrize(
    "config", [MeshConfig(-1, -1, 1), MeshConfig(0, 1, 1), MeshConfig(1, -2, 1), MeshConfig(-2, -2, 1)]
)
def test_sizes_that_are_none(config: MeshConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        make_mesh(config)
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    assert str(caught.value) == f"mesh {sizes}: sizes are positive, and at most one is -1"


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("gpu", "7.5", "float32"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
        ("tpu", None, "bfloat16"),
    ],
)
def test_bfloat16_where_a_device_has_it(
    platform: str, capability: str | None, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = types.SimpleNamespace(platform=platform, device_kind="a chip")
    if capability is not None:
        device.compute_capability = capability
    with caplog.at_level(logging.WARNING):
        assert matmul_dtype("bfloat16", device) == dtype
        assert matmul_dtype("float32", device) == "float32"
    for config in (rar.Config(dtype="bfloat16"), maskgit_vq.Config(image_size=16, dtype="bfloat16")):
        assert with_device_dtype(config, device) == dataclasses.replace(config, dtype=dtype)
    assert with_device_dtype("has none", device) == "has none"
    told = ["a chip has no bfloat16 (compute capability 7.5): float32 instead"] * 3 if dtype == "float32" else []
    assert [record.getMessage() for record in caplog.records] == told
