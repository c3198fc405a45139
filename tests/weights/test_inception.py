"""Released Inception files in: both layouts, folding, and what is said of a wrong file."""

import json
import pathlib
import struct

import jax
import numpy as np
import pytest

from rar_jax.errors import WeightsError
from rar_jax.networks.inception import Inception
from rar_jax.weights import inception as interop
from rar_jax.weights.mapping import write_safetensors

BLOCKS = {  # pytorch-fid 0.3.0, inception.py: InceptionV3.blocks
    "Conv2d_1a_3x3": "blocks.0.0",
    "Conv2d_2a_3x3": "blocks.0.1",
    "Conv2d_2b_3x3": "blocks.0.2",
    "Conv2d_3b_1x1": "blocks.1.0",
    "Conv2d_4a_3x3": "blocks.1.1",
    **{f"Mixed_{name}": f"blocks.2.{i}" for i, name in enumerate(["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"])},
    **{f"Mixed_{name}": f"blocks.3.{i}" for i, name in enumerate(["7a", "7b", "7c"])},
}


def _in_blocks(key: str) -> str:
    module, _, rest = key.partition(".")
    return f"{BLOCKS[module]}.{rest}" if module in BLOCKS else key


def test_the_tree_is_the_networks_and_batch_norm_is_folded(inception_state, inception_file):
    params = interop.load(inception_file)
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    expected = jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    # The convolution's and BatchNorm's own formula on one patch of one layer.
    state = {k.removeprefix("Conv2d_1a_3x3."): v.astype(np.float64) for k, v in inception_state.items() if "1a" in k}
    patch_yxc = np.random.default_rng(0).standard_normal((3, 3, 3))
    plain = np.einsum("yxc,ocyx->o", patch_yxc, state["conv.weight"])
    normal = (plain - state["bn.running_mean"]) / np.sqrt(state["bn.running_var"] + 1e-3)
    folded = params["Conv2d_1a_3x3"]
    ours = np.einsum("yxc,yxco->o", patch_yxc, folded["kernel"]) + folded["bias"]
    np.testing.assert_allclose(ours, normal * state["bn.weight"] + state["bn.bias"], rtol=1e-5, atol=1e-5)


def test_float64_is_rounded_once(inception_file):
    exact, rounded = interop.load(inception_file, dtype=np.float64), interop.load(inception_file)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), exact, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {np.dtype(np.float64)}
    with pytest.raises(ValueError, match="bfloat16"):
        interop.load(inception_file, dtype=jax.numpy.bfloat16)


def test_both_layouts_give_the_same(inception_state, inception_file, tmp_path):
    path = tmp_path / "pytorch_fid.safetensors"
    state = {_in_blocks(key): value for key, value in inception_state.items() if key != "fc.bias"}
    state["blocks.2.0.branch1x1.bn.num_batches_tracked"] = np.zeros((), np.int64)
    assert len([key for key in state if key.startswith("blocks.")]) == len(inception_state) - 2 + 1
    write_safetensors(path, state)
    try:
        jax.tree.map(np.testing.assert_array_equal, interop.load(path), interop.load(inception_file))
    finally:
        path.unlink()  # pytest would keep 95 MB of each of its last runs


# ---------------------------------------------------------------- wrong files


def _write(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], values: dict[str, float]) -> pathlib.Path:
    """A .safetensors of float32 zeros, but for the first number of `values`, that takes no room on disk."""
    header, starts, end = {}, {}, 0
    for key, shape in shapes.items():
        starts[key], end = end, end + 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [starts[key], end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, value in values.items():
            file.seek(8 + len(text) + starts[key])
            file.write(struct.pack("<f", value))
        file.truncate(8 + len(text) + end)
    return path


def _renamed(shapes):
    shapes["Mixed_6d.branch1x1.conv.weights"] = shapes.pop("Mixed_6d.branch1x1.conv.weight")


def _surplus(shapes):
    shapes["Mixed_7d.branch1x1.bn.bias"] = (320,)


def _lost(shapes):
    shapes.pop("Mixed_5b.branch_pool.bn.running_mean")


def _misshapen(shapes):
    shapes["Mixed_6b.branch7x7_2.conv.weight"] = (128, 128, 7, 1)


def _misshapen_block(shapes):
    for key in list(shapes):
        shapes[_in_blocks(key)] = shapes.pop(key)
    shapes["blocks.2.6.branch1x1.bn.bias"] = (7,)


def _without_classes(shapes):
    shapes.pop("fc.weight")


def _torchvision(shapes):
    shapes["fc.weight"] = (1000, 2048)
    shapes["AuxLogits.fc.weight"] = (1000, 768)


def _another_network(shapes):
    shapes.clear()
    shapes["cls_token"] = (1, 1, 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_renamed, r"tensor 'Mixed_6d\.branch1x1\.conv\.weights' .* mean 'Mixed_6d\.branch1x1\.conv\.weight'\?"),
        (_surplus, r"tensor 'Mixed_7d\.branch1x1\.bn\.bias' .*Did you mean 'Mixed_7.\.branch1x1\.bn\.bias'"),
        (_lost, r"'Mixed_5b\.branch_pool\.bn\.running_mean' is missing"),
        (
            _misshapen,
            r"'Mixed_6b\.branch7x7_2\.conv\.weight' has shape \(128, 128, 7, 1\), expected \(128, 128, 1, 7\)",
        ),
        (_misshapen_block, r"'blocks\.2\.6\.branch1x1\.bn\.bias' has shape \(7,\), expected \(192,\)"),
        (_without_classes, r"'fc\.weight' is missing, as in pytorch-fid"),
        (_torchvision, r"'fc\.weight' is torchvision's"),
        (_another_network, "holds no Inception network"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(inception_state, tmp_path, damage, message):
    shapes = {key: value.shape for key, value in inception_state.items()}
    damage(shapes)
    with pytest.raises(WeightsError, match=message) as error:
        interop.load(_write(tmp_path / "w.safetensors", shapes, {}))
    assert str(error.value).count("w.safetensors") == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("Mixed_7c.branch_pool.conv.weight", np.nan, "holds numbers that are not finite"),
        ("fc.weight", np.inf, "holds numbers that are not finite"),
        ("Mixed_7c.branch_pool.bn.running_var", -1.0, "holds negative variances"),
    ],
)
def test_wrong_numbers_are_named(inception_state, tmp_path, key, value, message):
    shapes = {key: value.shape for key, value in inception_state.items()}
    path = _write(tmp_path / "w.safetensors", shapes, {key: value})
    with pytest.raises(WeightsError, match=rf"w\.safetensors: '{key}' {message}"):
        interop.load(path)


def test_what_is_not_used_may_be_there(inception_state, tmp_path):
    shapes = {key: value.shape for key, value in inception_state.items()}
    shapes |= {"AuxLogits.conv0.conv.weight": (128, 768, 1, 1), "Conv2d_1a_3x3.bn.num_batches_tracked": ()}
    path = _write(tmp_path / "w.safetensors", shapes, {"fc.bias": np.nan})
    assert interop.load(path).keys() == {key.partition(".")[0] for key in inception_state}


def test_a_damaged_or_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pth"):
        interop.load(tmp_path / "none.pth")
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=r"w\.pth is truncated or damaged"):
        interop.load(tmp_path / "w.pth")
