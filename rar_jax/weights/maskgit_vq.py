"""Released MaskGIT-VQGAN weights in and out: the tokenizer's tree against the released names and layout.

A name of ours becomes the released one by three facts: "_" around a number is ".", "kernel" and "scale" are
"weight", and the codebook is "quantize.embedding.weight". Kernels (y, x, in, out) are (out, in, y, x) there.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np

from rar_jax.config import nearest
from rar_jax.errors import ConfigError, WeightsError
from rar_jax.tokenizers import maskgit_vq
from rar_jax.weights.lazy import LazyArray, finite, materialize
from rar_jax.weights.saving import write
from rar_jax.weights.torch_file import StoredTensor, open_tensors

_CODEBOOK = "quantize.embedding.weight"
_OF_RAR = ("cls_token", "lm_head.weight", "target_aware_pos_embed", "blocks.0.attn.qkv.weight")


def load(path: str | pathlib.Path, *, image_size: int | None = None) -> tuple[maskgit_vq.Config, dict[str, Any]]:
    """Configuration and parameters of a tokenizer file (torch or .safetensors, released names).

    Args:
      image_size: pixels, which the weights do not tell; by default 256 for five levels as in the released file,
        else 8 tokens a side.

    Returns: Config, and float32 NumPy arrays in the tree of `maskgit_vq.init`.
    Raises: WeightsError for a damaged file, missing or surplus keys, wrong shapes, or values that are not finite.
    """
    config, lazy = open_params(path, image_size=image_size)
    return config, materialize(lazy)


def open_params(
    path: str | pathlib.Path, *, image_size: int | None = None, num_tokens: int | None = None
) -> tuple[maskgit_vq.Config, dict[str, Any]]:
    """As `load`, but the leaves are LazyArrays: only names and shapes are read yet. For `lazy.place`.

    Args:
      num_tokens: of an image, which tells the image size as well.

    Raises: WeightsError if it is not this tokenizer's file: a key is missing or surplus, or a shape another.
    """
    state = open_tensors(path)
    if any(key in state for key in _OF_RAR):
        raise WeightsError(f"{path} holds a RAR generator, not a tokenizer: give the MaskGIT-VQGAN file here")
    try:
        config = _config(state, image_size)
        if num_tokens is not None and math.isqrt(num_tokens) ** 2 == num_tokens:
            config = dataclasses.replace(config, image_size=math.isqrt(num_tokens) * config.downsampling)
        return config, _params(config, state, path)
    except (ConfigError, WeightsError) as error:
        raise WeightsError(f"{path}: {error}") from error


def save(path: str | pathlib.Path, config: maskgit_vq.Config, params: dict[str, Any]) -> None:
    """Writes parameters under the released names and layout, float32; the image size is not part of it.

    Raises: WeightsError for a suffix other than .safetensors, .bin and .pth, or parameters that are not those of `config`.
    """
    expected, state = _shapes(config), {}
    for key_path, value in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(value, np.float32)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        state[_released_name(key_path)] = np.ascontiguousarray(array)
    for key in sorted(expected.keys() ^ state.keys()):
        raise WeightsError(f"the parameters are not those of the configuration: they differ in '{key}'")
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise WeightsError(f"'{key}' has shape {state[key].shape}, and the configuration says {shape}")
    write(path, state)


def _config(state: dict[str, StoredTensor], image_size: int | None) -> maskgit_vq.Config:
    """Reads the architecture off names and shapes. Raises: WeightsError, ConfigError."""
    conv_in = _fetch(state, "encoder.conv_in.weight", ndim=4)
    levels = blocks = 0
    while any(key.startswith(f"encoder.down.{levels}.") for key in state):
        levels += 1
    while any(key.startswith(f"encoder.down.0.block.{blocks}.") for key in state):
        blocks += 1
    kernels = [_fetch(state, f"encoder.down.{i}.block.0.conv1.weight", ndim=4) for i in range(max(levels, 1))]
    base_width = conv_in.shape[0]
    if any(kernel.shape[0] % max(base_width, 1) for kernel in kernels):
        raise WeightsError(f"a level's width is no multiple of {base_width}, the width of 'encoder.conv_in.weight'")
    codebook = _fetch(state, _CODEBOOK, ndim=2)
    default_size = 256 if levels == 5 else 8 * 2 ** (levels - 1)
    return maskgit_vq.Config(
        image_size=default_size if image_size is None else image_size,
        channels=conv_in.shape[1],
        base_width=base_width,
        width_multipliers=tuple(kernel.shape[0] // max(base_width, 1) for kernel in kernels),
        blocks_per_level=blocks,
        latent_width=codebook.shape[1],
        codebook_size=codebook.shape[0],
    )


def _params(config: maskgit_vq.Config, state: dict[str, StoredTensor], path: str | pathlib.Path) -> dict[str, Any]:
    """The tree of `maskgit_vq.init` from a state dict of exactly its names. Raises: WeightsError."""
    known = _shapes(config)
    if surplus := sorted(state.keys() - known.keys()):
        raise WeightsError(f"'{surplus[0]}' is not a name of this tokenizer.{nearest(surplus[0], known)}")

    def leaf(key_path: Any, spec: jax.ShapeDtypeStruct) -> LazyArray:
        key = _released_name(key_path)
        stored = _fetch(state, key)
        if stored.shape != known[key]:
            raise WeightsError(f"'{key}' has shape {stored.shape}; the other tensors need {known[key]}")

        def read() -> np.ndarray:
            value = finite(path, key, stored.read())
            return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value

        return LazyArray(spec.shape, [read], stacked=False)

    return jax.tree_util.tree_map_with_path(leaf, _tree(config))


def _fetch(state: dict[str, StoredTensor], key: str, ndim: int | None = None) -> StoredTensor:
    if key not in state:
        raise WeightsError(f"'{key}' is missing.{nearest(key, list(state)[:1000])}")
    if ndim is not None and state[key].ndim != ndim:
        raise WeightsError(f"'{key}' has shape {state[key].shape}, not {ndim} dimensions")
    return state[key]


def _tree(config: maskgit_vq.Config) -> dict[str, Any]:
    return jax.eval_shape(lambda key: maskgit_vq.init(config, key), jax.random.key(0))


def _shapes(config: maskgit_vq.Config) -> dict[str, tuple[int, ...]]:
    """Shapes in the released layout by released name."""
    leaves = jax.tree_util.tree_leaves_with_path(_tree(config))
    return {_released_name(key_path): _torch_shape(spec.shape) for key_path, spec in leaves}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def _released_name(key_path: Any) -> str:
    names = [entry.key for entry in key_path]
    if names == ["codebook"]:
        return _CODEBOOK
    names[-1] = {"kernel": "weight", "scale": "weight"}.get(names[-1], names[-1])
    return re.sub(r"_(?=\d)|(?<=\d)_", ".", ".".join(names))
