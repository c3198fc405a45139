"""Where the rules put parameters and batches on four fake devices."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rar_jax.errors import ConfigError
from rar_jax.models import find_module, module_names
from rar_jax.networks import classifier
from rar_jax.parallel.arrays import make_global_batch
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.processes import is_main
from rar_jax.parallel.rules import (
    RULES,
    batch_per_device,
    batch_sharding,
    param_shardings,
    partition_spec,
    replicated,
    sharded,
)

MODELS = {
    **{name: find_module("generators", name) for name in module_names("generators")},
    **{name: find_module("tokenizers", name) for name in module_names("tokenizers")},
    "classifier": classifier,
}
# Which logical axes are cut, and over what; written down a second time, so that a replicated model must be meant.
SPLIT = {"width": "fsdp", "conv_out": "fsdp", "heads": "tensor", "mlp": "tensor", "codes": "tensor"}
MESHES = [MeshConfig(4, 1, 1), MeshConfig(1, 4, 1), MeshConfig(2, 1, 2), MeshConfig(1, 2, 2)]


def is_names(x: Any) -> bool:
    return isinstance(x, tuple)


def shapes_of(model: ModuleType) -> Any:
    return jax.eval_shape(lambda: model.init(model.TINY, jax.random.key(0)))


def leaves_of(model: ModuleType) -> Iterator[tuple[str, tuple[str | None, ...], tuple[int, ...]]]:
    names = jax.tree_util.tree_leaves_with_path(model.axes(model.TINY), is_leaf=is_names)
    for (path, axes), shape in zip(names, jax.tree.leaves(shapes_of(model)), strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="."), axes, shape.shape


def test_each_logical_axis_has_one_rule() -> None:
    assert len(dict(RULES)) == len(RULES)
    assert {name: axis for name, axis in RULES if name != "batch" and axis is not None} == SPLIT
    assert partition_spec(("width", None, "conv_in", "mlp")) == PartitionSpec("fsdp", None, None, "tensor")
    assert partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)


def test_an_unknown_logical_axis_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"unknown logical axis 'widht'\. Did you mean 'width'"):
        partition_spec(("widht", None))
    with pytest.raises(ConfigError, match="unknown logical axis 'widht'"):
        param_shardings({"a": ("widht",)}, {"a": jax.ShapeDtypeStruct((8,), jnp.float32)}, make_mesh(MeshConfig()))


@pytest.mark.parametrize("name", MODELS)
def test_axes_match_the_parameters(name: str) -> None:
    model = MODELS[name]
    axes, shapes = model.axes(model.TINY), shapes_of(model)
    assert jax.tree.structure(jax.tree.map(len, axes, is_leaf=is_names)) == jax.tree.structure(shapes)
    for path, names, shape in leaves_of(model):
        assert len(names) == len(shape), path
        split = [SPLIT[n] for n in names if n in SPLIT]
        assert len(split) == len(set(split)), f"{path} is split twice over one mesh axis"


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_that_each_device_holds(name: str, config: MeshConfig) -> None:
    model, mesh = MODELS[name], make_mesh(config)
    shardings = param_shardings(model.axes(model.TINY), shapes_of(model), mesh)
    params = jax.device_put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes_of(model)), shardings)
    parts = {"fsdp": config.fsdp, "tensor": config.tensor}
    expected = 0
    for (path, names, shape), array in zip(leaves_of(model), jax.tree.leaves(params), strict=True):
        local = tuple(size // parts[SPLIT[n]] if n in SPLIT else size for size, n in zip(shape, names, strict=True))
        assert {s.data.shape for s in array.addressable_shards} == {local}, path
        expected += 4 * math.prod(local)
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(params):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {expected}


@pytest.mark.parametrize("name", module_names("generators"))
def test_a_generator_on_fsdp_keeps_only_tables_biases_and_norms_whole(name: str) -> None:
    """A replicated model must not pass: every kernel is split in four, and whole arrays are tables or vectors of a layer."""
    model, mesh = MODELS[name], make_mesh(MeshConfig(1, 4, 1))
    shardings = jax.tree.leaves(param_shardings(model.axes(model.TINY), shapes_of(model), mesh))
    kernels = 0
    for (path, _, shape), sharding in zip(leaves_of(model), shardings, strict=True):
        fraction = math.prod(shape) / math.prod(sharding.shard_shape(shape))
        if path.endswith("kernel"):
            kernels += 1
            assert fraction == 4, path
    assert kernels >= 5


def test_a_dimension_that_does_not_divide_names_parameter_and_axis() -> None:
    shapes = {"block": {"fc1": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}}
    axes = {"block": {"fc1": {"kernel": ("width", "mlp")}}}
    fits = param_shardings(axes, shapes, make_mesh(MeshConfig(2, 2, 1)))
    assert fits["block"]["fc1"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    with pytest.raises(ConfigError) as caught:
        param_shardings(axes, shapes, make_mesh(MeshConfig(1, 4, 1)))
    assert str(caught.value) == (
        "block.fc1.kernel has a dimension of 6, which 4 devices of mesh axis 'fsdp' do not divide: "
        "choose another size of that axis"
    )
    axes = {"block": {"fc1": {"kernel": (None, "mlp")}}}
    shapes["block"]["fc1"]["kernel"] = jax.ShapeDtypeStruct((6, 10), jnp.float32)
    with pytest.raises(
        ConfigError, match=r"block\.fc1\.kernel has a dimension of 10, .* 4 devices of mesh axis 'tensor'"
    ):
        param_shardings(axes, shapes, make_mesh(MeshConfig(1, 1, 4)))


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_rows_of_a_batch_are_on_the_right_devices(config: MeshConfig) -> None:
    """Device (d, f, t) holds part d * fsdp + f of the rows, whatever t."""
    mesh: Mesh = make_mesh(config)
    rows = {"tokens": np.arange(24).reshape(8, 3), "labels": np.arange(8)}
    batch = make_global_batch(rows, mesh)
    parts = config.data * config.fsdp
    for key, value in rows.items():
        assert batch[key].shape == value.shape and batch[key].sharding == batch_sharding(mesh)
        np.testing.assert_array_equal(batch[key], value)
        on = {shard.device: np.asarray(shard.data) for shard in batch[key].addressable_shards}
        for (d, f, _), device in np.ndenumerate(mesh.devices):
            np.testing.assert_array_equal(on[device], np.split(value, parts)[d * config.fsdp + f])
    assert is_main()


def test_replicated_and_the_context() -> None:
    mesh = make_mesh(MeshConfig(2, 1, 2))
    array = jax.device_put(np.arange(6.0), replicated(mesh))
    assert [s.data.shape for s in array.addressable_shards] == [(6,)] * 4
    assert batch_per_device(7) == 7
    with sharded(mesh):
        assert jax.sharding.get_abstract_mesh().axis_names == ("data", "fsdp", "tensor")
        assert [batch_per_device(batch) for batch in (1, 2, 7)] == [1, 1, 4]
    with sharded(make_mesh(MeshConfig(2, 2, 1))):
        assert batch_per_device(8) == 2
    assert jax.sharding.get_abstract_mesh().empty
