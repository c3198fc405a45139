"""Chips by their data sheets, collectives by hand, and meshes over several slices."""

import dataclasses
import os
import sys
import types
from typing import Any

import numpy as np
import pytest
from jax.experimental import topologies

from rar_jax.errors import ConfigError
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.tools.plan.hlo import Collective
from rar_jax.tools.plan.topology import (
    CHIPS,
    COMPILER_STACK,
    Topology,
    count_sent_bytes,
    estimate_traffic,
    find_topology_devices,
    list_coordinates,
    parse_topology,
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a TPU's device."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def slices_of(count: int, x: int, y: int, z: int = 1, *, kind: str = "TPU v5 lite") -> list[Any]:
    """Devices of so many slices of x by y by z chips."""
    places = [(s, i, j, k) for s in range(count) for k in range(z) for j in range(y) for i in range(x)]
    return [Device(number, (i, j, k), s, device_kind=kind) for number, (s, i, j, k) in enumerate(places)]


def coordinates(topology: Topology) -> np.ndarray:
    x, y = topology.shape
    return list_coordinates(topology, slices_of(topology.slices, x, y))


def test_what_can_be_written() -> None:
    v5p = parse_topology("v5p:4x4x4")
    assert (v5p.chips, str(v5p)) == (64, "v5p:4x4x4")
    assert parse_topology("v5e:16x16", 4).chips == 1024 and str(parse_topology("v5e:2x4", 2)) == "2 slices of v5e:2x4"
    # Peaks are those of the data sheets by the clock: multiply-adds of all units in a cycle.
    assert CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=0.01) and CHIPS["v6e"].clock == pytest.approx(
        1.75e9, rel=0.01
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v5x:4x4", "--topology v5x:4x4: write v5e:4x4, v6e:8x8 or v5p:4x4x4. Did you mean 'v5"),
        ("v5e", "--topology v5e: write"),
        ("v5e:4", "--topology v5e:4: write"),
        ("v5p:8x8", "--topology v5p:8x8: v5p is a torus of 3 dimensions"),
        ("gpu:8xH100", "--topology gpu:8xH100: write"),
    ],
)
def test_what_cannot(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_topology(text)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, COMPILER_STACK),
        ("--xla_a=1", f"--xla_a=1 {COMPILER_STACK}"),
        ("--fibers_default_thread_stack_size=9", "--fibers_default_thread_stack_size=9"),
    ],
)
def test_the_compiler_s_threads_get_a_larger_stack(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given or "")
    asked = what_libtpu_is_asked_for("v6e:2x2", monkeypatch)
    assert asked == {"topology_name": "v6e:2x2"} and os.environ["LIBTPU_INIT_ARGS"] == expected


@pytest.mark.parametrize(
    ("name", "host"), [("v5e:1x1", [1, 1, 1]), ("v6e:1x2", [1, 2, 1]), ("v5p:1x1x1", [1, 1, 1]), ("v5e:2x4", None)]
)
def test_less_than_a_host_s_chips(monkeypatch: pytest.MonkeyPatch, name: str, host: list[int] | None) -> None:
    asked = what_libtpu_is_asked_for(name, monkeypatch)
    assert asked.get("chips_per_host_bounds") == host


def what_libtpu_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    def described(platform: str, **options: Any) -> Any:
        asked.update(options)
        return types.SimpleNamespace(devices=[])

    monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    find_topology_devices(parse_topology(name))
    return asked


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]' in the checkout"):
        find_topology_devices(parse_topology("v5e:4x4"))


# ---------------------------------------------------------------- interconnect


def test_an_all_reduce_over_a_whole_slice_of_lines() -> None:
    """4 x 4 chips of v5e are no rings: one link each way along two axes, 100 GB/s; a chip sends 2 x 15/16 of the array."""
    topology = parse_topology("v5e:4x4")
    sent = estimate_traffic(
        topology, Collective("all-reduce", 16_000, (tuple(range(16)),), False), coordinates(topology)
    )
    assert (sent["sent_bytes"], sent["network_bytes"]) == (30_000, 0)
    assert sent["seconds"] == pytest.approx(30_000 / 100e9)


def test_rings_carry_twice_as_much() -> None:
    topology = parse_topology("v5e:16x16")
    row = tuple(range(16))  # along x alone
    sent = estimate_traffic(topology, Collective("all-gather", 16_000, (row,), False), coordinates(topology))
    assert sent["sent_bytes"] == 15_000 and sent["seconds"] == pytest.approx(15_000 / (2 * 50e9))
    half = estimate_traffic(topology, Collective("all-gather", 16_000, (row[:8],), False), coordinates(topology))
    assert half["sent_bytes"] == 14_000 and half["seconds"] == pytest.approx(14_000 / 50e9)


def test_between_slices_goes_only_a_chip_s_share() -> None:
    topology = parse_topology("v5e:4x4", 2)
    sent = estimate_traffic(
        topology, Collective("all-reduce", 16_000, (tuple(range(32)),), False), coordinates(topology)
    )
    assert (sent["sent_bytes"], sent["network_bytes"]) == (
        30_000,
        1000,
    )  # within the 16, then a sixteenth there and back between 2
    assert sent["seconds"] == pytest.approx(30_000 / 100e9 + 1000 / 3.125e9)
    share = estimate_traffic(
        topology, Collective("all-reduce", 1000, None, False, slices=2), coordinates(topology)
    )  # as a TPU's text has it
    assert (share["sent_bytes"], share["network_bytes"], share["seconds"]) == (0, 1000, pytest.approx(1000 / 3.125e9))
    pairs = estimate_traffic(topology, Collective("collective-permute", 500, None, True), coordinates(topology))
    assert (pairs["sent_bytes"], pairs["network_bytes"]) == (500, 0) and pairs["seconds"] == pytest.approx(500 / 50e9)


def test_bytes_sent_in_rings() -> None:
    assert count_sent_bytes("all-gather", 400, 4) == count_sent_bytes("reduce-scatter", 400, 4) == 300
    assert count_sent_bytes("all-reduce", 400, 4) == 600 and count_sent_bytes("all-to-all", 400, 4) == 300
    assert count_sent_bytes("collective-permute", 400, 2) == 400
    assert np.isclose(count_sent_bytes("all-reduce", 1, 10**6), 2)


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU v5 lite", "TPU v5"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 16), (2, 2, 4)])
@pytest.mark.parametrize("config", [MeshConfig(-1, 4, 1), MeshConfig(-1, 2, 2)])
def test_an_axis_may_be_a_part_of_one_of_the_torus(kind: str, shape: Any, config: MeshConfig) -> None:
    """Copies of the model over 4 chips, on 8 x 8 and more: each copy lies on chips next to each other."""
    mesh = make_mesh(config, slices_of(1, *shape, kind=kind))
    assert len({device.id for device in mesh.devices.flat}) == np.prod(shape)
    for copy in mesh.devices.reshape(-1, 4):
        spans = np.ptp([device.coords for device in copy], axis=0) + 1
        assert np.prod(spans) == 4, f"the copy lies in a box of {spans} chips"


@pytest.mark.parametrize("config", [MeshConfig(-1, 4, 1), MeshConfig(4, 2, 2), MeshConfig(2, 8, 1)])
def test_only_data_reaches_over_slices(config: MeshConfig) -> None:
    mesh = make_mesh(config, slices_of(2, 2, 4))
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.size == 16 and len({device.id for device in mesh.devices.flat}) == 16
    assert (index == index[:, :1, :1]).all(), "fsdp and tensor stay within a slice"
    first, second = np.split(index, 2)
    assert (first == 0).all() and (second == 1).all()


def test_copies_that_do_not_fit_a_slice() -> None:
    with pytest.raises(ConfigError, match="does not fit 2 slices of 8 devices: data must be a multiple of 2"):
        make_mesh(MeshConfig(1, 16, 1), slices_of(2, 2, 4))
