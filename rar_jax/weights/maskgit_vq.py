"""MaskGIT-VQGAN's released weights to and from our parameters.

A name of ours becomes the released one by three facts: "_" around a number is ".", "kernel" and "scale" are
"weight", and the codebook is "quantize.embedding.weight". Kernels (y, x, in, out) are (out, in, y, x) there.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from rar_jax.errors import ConfigError, WeightsError
from rar_jax.tokenizers.maskgit_vq import Config, init
from rar_jax.weights.lazy import read_arrays
from rar_jax.weights.mapping import Mapped, flatten_params, get_tensor, open_mapped, param_shapes, save_mapped
from rar_jax.weights.torch_file import StoredTensor, open_tensors

_CODEBOOK = "quantize.embedding.weight"
_OF_RAR = ("cls_token", "lm_head.weight", "target_aware_pos_embed", "blocks.0.attn.qkv.weight")


def load(
    path: str | pathlib.Path, *, image_size: int | None = None, num_tokens: int | None = None
) -> tuple[Config, dict[str, Any]]:
    """Read a tokenizer file with the released names, torch or safetensors.

    Args:
      image_size, num_tokens: of an image, which the weights do not tell; either gives the other. The default is 256
        pixels for five levels as in the released file, else 8 tokens a side.

    Returns: Config, and float32 NumPy arrays in the tree of `maskgit_vq.init`.
    Raises: WeightsError for a damaged file, missing or surplus keys, wrong shapes, or values that are not finite.
    """
    config, lazy = open_params(path, image_size=image_size, num_tokens=num_tokens)
    return config, read_arrays(lazy)


def open_params(
    path: str | pathlib.Path, *, image_size: int | None = None, num_tokens: int | None = None
) -> tuple[Config, dict[str, Any]]:
    """Like `load`, but the leaves are LazyArrays: only names and shapes are read and checked."""
    state = open_tensors(path)
    if any(key in state for key in _OF_RAR):
        raise WeightsError(f"{path} holds a RAR generator, not a tokenizer: give the MaskGIT-VQGAN file here")
    try:
        config = _read_config(path, state, image_size, num_tokens)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    shapes = param_shapes(init, config)
    return config, open_mapped(path, state, make_table(shapes), shapes)


def save(path: str | pathlib.Path, config: Config, params: dict[str, Any]) -> None:
    """Write .safetensors with the released names and shapes, float32. The image size is not part of it.

    Raises: WeightsError for another suffix, or parameters that are not those of `config`.
    """
    shapes = param_shapes(init, config)
    save_mapped(path, make_table(shapes), shapes, params)


def _read_config(
    path: str | pathlib.Path, state: Mapping[str, StoredTensor], image_size: int | None, num_tokens: int | None
) -> Config:
    """Read the architecture off names and shapes. Raises: WeightsError, ConfigError."""
    levels = blocks = 0
    while any(key.startswith(f"encoder.down.{levels}.") for key in state):
        levels += 1
    while any(key.startswith(f"encoder.down.0.block.{blocks}.") for key in state):
        blocks += 1
    conv_in = get_tensor(path, state, "encoder.conv_in.weight", 4)
    kernels = [get_tensor(path, state, f"encoder.down.{i}.block.0.conv1.weight", 4) for i in range(max(levels, 1))]
    codebook, base_width = get_tensor(path, state, _CODEBOOK, 2), conv_in.shape[0]
    if any(kernel.shape[0] % base_width for kernel in kernels):
        raise WeightsError(f"{path}: a level's width is not a multiple of {base_width}, that of encoder.conv_in")
    if num_tokens is not None and math.isqrt(num_tokens) ** 2 == num_tokens:
        image_size = math.isqrt(num_tokens) * 2 ** (levels - 1)
    return Config(
        image_size=image_size or (256 if levels == 5 else 8 * 2 ** (levels - 1)),
        channels=conv_in.shape[1],
        base_width=base_width,
        width_multipliers=tuple(kernel.shape[0] // base_width for kernel in kernels),
        blocks_per_level=blocks,
        latent_width=codebook.shape[1],
        codebook_size=codebook.shape[0],
    )


def make_table(shapes: Any) -> dict[str, Mapped]:
    """Map released names to paths of parameters with these shapes."""
    return {
        _released_name(path): Mapped(path, "yxio -> o i y x" if leaf.ndim == 4 else "")
        for path, leaf in flatten_params(shapes).items()
    }


def _released_name(path: str) -> str:
    *modules, last = path.split("/")
    if path == "codebook":
        return _CODEBOOK
    name = ".".join([*modules, {"kernel": "weight", "scale": "weight"}.get(last, last)])
    return re.sub(r"_(?=\d)|(?<=\d)_", ".", name)
