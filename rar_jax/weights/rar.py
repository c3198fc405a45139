"""RAR's released weights (yucornetto/RAR: rar_b.bin ... rar_xxl.bin) to and from our parameters.

The released position tables are oversized (n + 1024, n + 1024 and n + 100 rows). The model uses the first n + 2 rows.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from rar_jax.config import nearest
from rar_jax.errors import ConfigError, WeightsError
from rar_jax.generators.rar import Config, init
from rar_jax.weights.lazy import read_arrays
from rar_jax.weights.mapping import Mapped, get_tensor, map_linear, map_norm, open_mapped, param_shapes, save_mapped
from rar_jax.weights.torch_file import StoredTensor, open_tensors

UNUSED_ROWS = {"pos_embed": 1022, "target_aware_pos_embed": 1022, "timesteps_embeddings": 98}

_BLOCK = {
    **map_norm("norm1", "norm1"),
    **map_linear("attn.qkv", "attn/qkv", kernel="i3hk -> 3hk i", bias="3hk -> 3hk"),
    **map_norm("attn.q_norm", "attn/q_norm"),
    **map_norm("attn.k_norm", "attn/k_norm"),
    **map_linear("attn.proj", "attn/proj", kernel="hko -> o hk"),
    **map_norm("norm2", "norm2"),
    **map_linear("mlp.fc1", "mlp/fc1"),
    **map_linear("mlp.fc2", "mlp/fc2"),
    **map_linear("adaLN_modulation.1", "adaln", kernel="i6d -> 6d i", bias="6d -> 6d"),
}
TABLE = {
    "cls_token": Mapped("cls_token", "nd -> 1 n d"),
    "embeddings.weight": Mapped("embeddings"),
    **{name: Mapped(name, "nd -> 1 n d", (0, unused, 0)) for name, unused in UNUSED_ROWS.items()},
    **map_linear("adaln_before_head.adaLN_modulation.1", "final_adaln", kernel="i2d -> 2d i", bias="2d -> 2d"),
    **map_linear("lm_head", "lm_head"),
    **{f"blocks.{{}}.{name}": m._replace(path=f"transformer/blocks/{m.path}") for name, m in _BLOCK.items()},
}


def load(path: str | pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """Read a released RAR file, torch (.bin, .pth) or safetensors, without torch.

    Returns: the Config read off the shapes (dropouts 0: the file does not hold the recipe) and float32 parameters.
    Raises: WeightsError for a file that is not RAR's, missing or surplus keys, wrong shapes, or non-finite numbers.
    """
    config, lazy = open_params(path)
    return config, read_arrays(lazy)


def open_params(path: str | pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """Like `load`, but the leaves are LazyArrays: only names and shapes are read and checked."""
    state = open_tensors(path)
    config = _read_config(path, state)
    return config, open_mapped(path, state, TABLE, param_shapes(init, config))


def save(path: str | pathlib.Path, config: Config, params: dict[str, Any]) -> None:
    """Write .safetensors with the released names and shapes, float32; unused rows of the tables are zeros.

    Raises: WeightsError for another suffix, or parameters that are not those of `init`.
    """
    if "layers" in params:
        raise WeightsError(f"{path}: these parameters are prepared for decoding; save those that they were made of")
    save_mapped(path, TABLE, param_shapes(init, config), params)


def _read_config(path: str | pathlib.Path, state: Mapping[str, StoredTensor]) -> Config:
    if "quantize.embedding.weight" in state:
        raise WeightsError(f"{path} is a tokenizer: it has no 'pos_embed'. Give it as --tokenizer, and RAR's file here")
    if "pos_embed" not in state:
        raise WeightsError(f"{path} is not RAR's: it has no 'pos_embed'.{nearest('pos_embed', state)}")
    codes, width = get_tensor(path, state, "lm_head.weight", 2).shape
    depth = 1
    while f"blocks.{depth}.attn.q_norm.weight" in state:
        depth += 1
    try:
        return Config(
            num_tokens=get_tensor(path, state, "pos_embed", 3).shape[1] - UNUSED_ROWS["pos_embed"] - 2,
            codebook_size=codes,
            num_classes=get_tensor(path, state, "embeddings.weight", 2).shape[0] - codes - 2,
            width=width,
            depth=depth,
            num_heads=width // get_tensor(path, state, "blocks.0.attn.q_norm.weight", 1).shape[0],
            mlp_width=get_tensor(path, state, "blocks.0.mlp.fc1.weight", 2).shape[0],
            dropout=0.0,
            attention_dropout=0.0,
            label_dropout=0.0,
        )
    except ConfigError as error:
        raise WeightsError(f"{path}: its shapes are not those of a RAR model: {error}") from None
