"""Released Inception files in: folding, and what is said of a wrong file."""

import json
import pathlib
import struct

import jax
import numpy as np
import pytest

from rar_jax.errors import WeightsError
from rar_jax.networks.inception import Inception
from rar_jax.weights import inception as interop


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


def _without_classes(shapes):
    shapes.pop("fc.weight")


def _torchvision(shapes):
    shapes["fc.weight"] = (1000, 2048)
    shapes["AuxLogits.fc.weight"] = (1000, 768)


def _another_network(shapes):
    """Also a state dict of pytorch-fid's module, which numbers its blocks and has no classes."""
    shapes.clear()
    shapes["blocks.0.0.conv.weight"] = (32, 3, 3, 3)


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
        (_without_classes, r"'fc\.weight' is missing"),
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
