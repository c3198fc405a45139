"""The FID network's released weights in: PyTorch copies of the TensorFlow graph of 2015-12-05.

Known files, which hold the same numbers: pt_inception-2015-12-05-6726825d.pth (pytorch-fid, release fid_weights) and
weights-inception-2015-12-05-6726825d.pth (torch-fidelity, release v0.2.0). A state dict of pytorch-fid's own module
numbers its blocks ("blocks.2.0.branch1x1.conv.weight" is "Mixed_5b.branch1x1.conv.weight").

BatchNorm is folded: it only scales and shifts what each convolution gives. Kernels (out, in, y, x) become (y, x, in, out).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from rar_jax.config import nearest
from rar_jax.errors import WeightsError
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.weights.lazy import finite
from rar_jax.weights.torch_file import StoredTensor, open_tensors

WHERE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
_EPSILON = 1e-3  # of BatchNorm
_BLOCKS = (  # of pytorch-fid's module; a max pool ends the first two
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
_NOT_USED = re.compile(r"fc\.bias|AuxLogits\..*|.*\.bn\.num_batches_tracked")


def load(path: str | pathlib.Path, *, dtype: npt.DTypeLike = np.float32) -> dict[str, Any]:
    """Parameters of `networks.inception.Inception`, from a torch or .safetensors file.

    Args:
      dtype: float32, or float64 for exact comparisons.

    Returns: a nested dict of NumPy arrays of that dtype; no bias of the classes, which the Inception score leaves out.
    Raises: WeightsError for a damaged file, missing or surplus keys, wrong shapes, or values that are not finite;
      ValueError for another dtype.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"dtype is {dtype}: the Inception network computes in float32 or float64")
    if not pathlib.Path(path).exists():
        raise WeightsError(
            f"{path}: there is no such file. Inception's weights are at {WHERE}, or torch-fidelity's copy"
        )
    tree = _tree()
    state, known = _renamed(open_tensors(path)), _shapes(tree)
    _check(path, state, known)
    # float64, so that folding rounds once.
    values = {
        key: finite(path, stored_key, tensor.read(), np.float64)
        for key, (stored_key, tensor) in state.items()
        if key in known
    }
    for key, value in values.items():
        if key.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{path}: '{state[key][0]}' holds negative variances: download it again")
    return jax.tree_util.tree_map_with_path(lambda key_path, _: _leaf(key_path, values).astype(dtype), tree)


def _leaf(key_path: Any, values: Mapping[str, np.ndarray]) -> npt.NDArray[np.float64]:
    """One parameter, with BatchNorm folded."""
    *modules, name = (entry.key for entry in key_path)
    module = ".".join(modules)
    if module == "fc":
        return np.ascontiguousarray(values["fc.weight"].T)
    scale = values[f"{module}.bn.weight"] / np.sqrt(values[f"{module}.bn.running_var"] + _EPSILON)
    if name == "bias":
        return values[f"{module}.bn.bias"] - values[f"{module}.bn.running_mean"] * scale
    return np.ascontiguousarray(values[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * scale)


def _renamed(state: Mapping[str, StoredTensor]) -> dict[str, tuple[str, StoredTensor]]:
    """By torch-fidelity's names: the name in the file and the tensor."""

    def name(key: str) -> str:
        match = re.fullmatch(r"blocks\.(\d)\.(\d)\.(.+)", key)
        if match is None:
            return key
        block, place = int(match[1]), int(match[2])
        if block >= len(_BLOCKS) or place >= len(_BLOCKS[block]):
            return key
        return f"{_BLOCKS[block][place]}.{match[3]}"

    return {name(key): (key, tensor) for key, tensor in state.items()}


def _check(
    path: str | pathlib.Path, state: Mapping[str, tuple[str, StoredTensor]], known: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises: WeightsError unless the names and shapes are those of the network."""
    if not state.keys() & known.keys():
        raise WeightsError(
            f"{path} holds no Inception network but {len(state)} tensors such as '{min(state)}': give "
            f"what is at {WHERE}, or torch-fidelity's copy"
        )
    for key, (stored_key, _) in sorted(state.items()):
        if key not in known and not _NOT_USED.fullmatch(key):
            raise WeightsError(f"{path}: '{stored_key}' is not a name of the Inception network.{nearest(key, known)}")
    for key, shape in known.items():
        if key not in state:
            why = ": pytorch-fid's module leaves it out, give the file it is made from" if key == "fc.weight" else ""
            raise WeightsError(f"{path}: '{key}' is missing{why}")
        stored_key, tensor = state[key]
        if tensor.shape != shape:
            why = ": torchvision's network, which gives other features" if tensor.shape == (1000, 2048) else ""
            raise WeightsError(f"{path}: '{stored_key}' has shape {tensor.shape}, not {shape}{why}")


def _tree() -> dict[str, Any]:
    """The parameters' shapes."""
    images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    variables: Any = jax.eval_shape(Inception().init, jax.random.key(0), images)
    return variables["params"]


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes in the released layout by torch-fidelity's name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key_path, spec in jax.tree_util.tree_leaves_with_path(tree):
        *modules, name = (entry.key for entry in key_path)
        module = ".".join(modules)
        if module == "fc":
            shapes["fc.weight"] = spec.shape[::-1]
        elif name == "kernel":
            y, x, d_in, d_out = spec.shape
            shapes[f"{module}.conv.weight"] = (d_out, d_in, y, x)
            shapes |= {f"{module}.bn.{part}": (d_out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes
