"""The FID network's released weights: PyTorch copies of the TensorFlow graph of 2015-12-05.

weights-inception-2015-12-05-6726825d.pth (torch-fidelity, release v0.2.0) holds the same numbers.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from flax.traverse_util import unflatten_dict

from rar_jax.errors import WeightsError
from rar_jax.networks.inception import IMAGE_SIZE, Inception
from rar_jax.weights.lazy import check_finite
from rar_jax.weights.mapping import check_shapes, flatten_params
from rar_jax.weights.registry import Released, check_system
from rar_jax.weights.torch_file import open_tensors

FILES = {
    "inception": Released(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        "pt_inception-2015-12-05-6726825d.pth", "Apache-2.0; weights: none stated",
    ),
}  # fmt: skip
WHERE = FILES["inception"].url
KEYS = ("Mixed_5b.branch1x1.conv.weight",)
_BATCH_NORM_EPSILON = 1e-3
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
    images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    shapes: Any = jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
    state = {name: tensor for name, tensor in open_tensors(path).items() if not _NOT_USED.fullmatch(name)}
    expected = _released_shapes(shapes)
    try:
        check_system(state, "networks", "inception")
        if not state.keys() & expected.keys():
            raise WeightsError("holds no Inception network")
        if "fc.weight" in state and state["fc.weight"].shape == (1000, 2048):
            raise WeightsError("'fc.weight' is torchvision's, whose network gives other features")
        check_shapes(state, expected)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}: give {WHERE}, or torch-fidelity's copy") from error
    # float64, so that folding rounds once.
    values = {name: check_finite(path, name, state[name].read(), np.float64) for name in expected}
    for name, value in values.items():
        if name.endswith("running_var") and (value < 0).any():
            raise WeightsError(f"{path}: '{name}' holds negative variances: download it again")
    folded = {path: _fold(path, values).astype(dtype) for path in flatten_params(shapes)}
    return unflatten_dict(folded, sep="/")


def _fold(path: str, values: Mapping[str, np.ndarray]) -> npt.NDArray[np.float64]:
    """One parameter, with BatchNorm folded."""
    *modules, name = path.split("/")
    module = ".".join(modules)
    if module == "fc":
        return np.ascontiguousarray(values["fc.weight"].T)
    scale = values[f"{module}.bn.weight"] / np.sqrt(values[f"{module}.bn.running_var"] + _BATCH_NORM_EPSILON)
    if name == "bias":
        return values[f"{module}.bn.bias"] - values[f"{module}.bn.running_mean"] * scale
    return np.ascontiguousarray(values[f"{module}.conv.weight"].transpose(2, 3, 1, 0) * scale)


def _released_shapes(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes in the released layout by torch-fidelity's name."""
    released: dict[str, tuple[int, ...]] = {}
    for path, leaf in flatten_params(shapes).items():
        module = path.removesuffix("/kernel").replace("/", ".")
        if path == "fc/kernel":
            released["fc.weight"] = leaf.shape[::-1]
        elif path.endswith("/kernel"):
            y, x, d_in, d_out = leaf.shape
            released[f"{module}.conv.weight"] = (d_out, d_in, y, x)
            released |= {f"{module}.bn.{part}": (d_out,) for part in ("weight", "bias", "running_mean", "running_var")}
    return released
