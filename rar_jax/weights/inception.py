"""The FID network's released weights: PyTorch copies of the TensorFlow graph of 2015-12-05.

Known files, with the same numbers: pt_inception-2015-12-05-6726825d.pth (pytorch-fid, release fid_weights) and
weights-inception-2015-12-05-6726825d.pth (torch-fidelity, release v0.2.0). A state dict of pytorch-fid's own module
numbers its blocks: "blocks.2.0.branch1x1.conv.weight" is "Mixed_5b.branch1x1.conv.weight".
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from rar_jax.errors import WeightsError
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.weights.lazy import check_finite
from rar_jax.weights.mapping import check_shapes
from rar_jax.weights.torch_file import StoredTensor, open_tensors

WHERE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
_BATCH_NORM_EPSILON = 1e-3
_BLOCKS = (  # of pytorch-fid's module
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
_NUMBERED = {name: f"blocks.{i}.{j}" for i, block in enumerate(_BLOCKS) for j, name in enumerate(block)}
_NOT_USED = re.compile(r"fc\.bias|AuxLogits\..*|.*\.bn\.num_batches_tracked")


def load(path: str | pathlib.Path, *, dtype: npt.DTypeLike = np.float32) -> dict[str, Any]:
    """Read parameters of `networks.inception.Inception` from a torch or .safetensors file.

    BatchNorm is folded into the convolutions: it only scales and shifts what they give.

    Args:
      dtype: float32, or float64 for exact comparisons.

    Returns: a nested dict of NumPy arrays of that dtype, without the bias of the classes: the Inception score has none.
    Raises: WeightsError for a damaged file, missing or surplus keys, wrong shapes, or values that are not finite;
      ValueError for another dtype.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"dtype is {dtype}: the Inception network computes in float32 or float64")
    if not pathlib.Path(path).exists():
        raise WeightsError(f"{path}: no such file. Inception's weights are at {WHERE}, or torch-fidelity's copy")
    images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    shapes: Any = jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
    state = {name: tensor for name, tensor in open_tensors(path).items() if not _NOT_USED.fullmatch(name)}
    expected, numbered = _released_shapes(shapes), any(name.startswith("blocks.") for name in state)
    names = {name: _numbered(name) if numbered else name for name in expected}
    _check(path, state, {names[name]: shape for name, shape in expected.items()})
    # float64, so that folding rounds once.
    values = {name: check_finite(path, key, state[key].read(), np.float64) for name, key in names.items()}
    for name, value in values.items():
        if name.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{path}: '{names[name]}' holds negative variances: download it again")
    return jax.tree_util.tree_map_with_path(lambda key_path, _: _fold(key_path, values).astype(dtype), shapes)


def _fold(key_path: Any, values: Mapping[str, np.ndarray]) -> npt.NDArray[np.float64]:
    """One parameter, with BatchNorm folded."""
    *modules, name = (entry.key for entry in key_path)
    module = ".".join(modules)
    if module == "fc":
        return np.ascontiguousarray(values["fc.weight"].T)
    scale = values[f"{module}.bn.weight"] / np.sqrt(values[f"{module}.bn.running_var"] + _BATCH_NORM_EPSILON)
    if name == "bias":
        return values[f"{module}.bn.bias"] - values[f"{module}.bn.running_mean"] * scale
    return np.ascontiguousarray(values[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * scale)


def _numbered(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"{_NUMBERED[module]}.{rest}" if module in _NUMBERED else name


def _check(
    path: str | pathlib.Path, state: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WeightsError unless the names and shapes are those of the network."""
    if not state.keys() & expected.keys():
        raise WeightsError(f"{path} holds no Inception network: give {WHERE}, or torch-fidelity's copy")
    if "fc.weight" not in state:
        raise WeightsError(f"{path}: 'fc.weight' is missing, as in pytorch-fid's module: give {WHERE}")
    if state["fc.weight"].shape == (1000, 2048):
        raise WeightsError(f"{path}: 'fc.weight' is torchvision's, whose network gives other features: give {WHERE}")
    check_shapes(path, state, expected)


def _released_shapes(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes in the released layout by torch-fidelity's name."""
    released: dict[str, tuple[int, ...]] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *modules, name = (entry.key for entry in key_path)
        module = ".".join(modules)
        if module == "fc":
            released["fc.weight"] = leaf.shape[::-1]
        elif name == "kernel":
            y, x, d_in, d_out = leaf.shape
            released[f"{module}.conv.weight"] = (d_out, d_in, y, x)
            released |= {f"{module}.bn.{part}": (d_out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return released
