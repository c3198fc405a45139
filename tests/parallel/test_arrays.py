"""Batches on their way to the devices: the same ones, in the same order, where they shall lie."""

import itertools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from rar_jax.parallel.arrays import prefetch_batches
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding


@pytest.mark.parametrize("ahead", [1, 2, 5, 20])
def test_on_devices(ahead: int) -> None:
    mesh, taken = make_mesh(MeshConfig(data=2, fsdp=2)), []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for k in range(12):
            taken.append(k)
            yield {"tokens": np.arange(24).reshape(8, 3) + 100 * k, "ids": np.arange(8), "bad": np.zeros(8, bool)}

    for k, batch in enumerate(prefetch_batches(stream(), mesh, ahead=ahead)):
        assert set(batch) == {"tokens"}  # what no loss reads stays on the host
        np.testing.assert_array_equal(batch["tokens"], np.arange(24).reshape(8, 3) + 100 * k)
        assert batch["tokens"].sharding == batch_sharding(mesh)
        assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
        assert len(taken) == min(12, k + 1 + ahead)
    assert k == 11


def test_an_endless_stream_is_not_read_to_its_end() -> None:
    mesh = make_mesh(MeshConfig())
    rows = ({"labels": np.full(4, k)} for k in itertools.count())
    got = [int(jax.device_get(batch["labels"])[0]) for batch in itertools.islice(prefetch_batches(rows, mesh), 5)]
    assert got == [0, 1, 2, 3, 4] and int(next(rows)["labels"][0]) == 7
