"""RAR's released weights to and from our parameters.

The released position tables are oversized (n + 1024, n + 1024 and n + 100 rows). The model uses the first n + 2 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rar_jax.generators import rar
from rar_jax.generators.rar import Config
from rar_jax.weights.mapping import Format, Mapped, State, get_tensor, map_linear, map_norm
from rar_jax.weights.registry import Released

KEYS = ("target_aware_pos_embed", "timesteps_embeddings")


def _describe(
    size: str, sizes: tuple[int, int, int], sampling: tuple[float, ...], scores: tuple[float, ...]
) -> Released:
    """Sizes are (width, depth, mlp_width); settings and scores are those of arXiv 2411.00776 and its code."""
    width, depth, mlp_width = sizes
    return Released(
        "yucornetto/RAR", f"rar_{size}.bin", "Apache-2.0; weights for research",
        config=Config(
            width=width, depth=depth, mlp_width=mlp_width, dropout=0.0, attention_dropout=0.0, label_dropout=0.0
        ),
        tokenizer="maskgit-vqgan-imagenet-f16-256",
        sampling=dict(zip(("scale", "power", "temperature"), sampling, strict=True)),
        scores=dict(zip(("FID", "IS", "precision", "recall"), scores, strict=True)),
        rounding="truncate", labels="balanced",
    )  # fmt: skip


FILES = {
    "rar_b": _describe("b", (768, 24, 3072), (16.0, 2.75, 1.0), (1.95, 290.5, 0.82, 0.58)),
    "rar_l": _describe("l", (1024, 24, 4096), (15.5, 2.5, 1.02), (1.70, 299.5, 0.81, 0.60)),
    "rar_xl": _describe("xl", (1280, 32, 5120), (6.9, 1.5, 1.02), (1.50, 306.9, 0.80, 0.62)),
    "rar_xxl": _describe("xxl", (1408, 40, 6144), (8.0, 1.2, 1.02), (1.48, 326.0, 0.80, 0.63)),
}

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


def _read_config(state: State) -> Config:
    """Read the Config off the shapes. Dropouts are 0: the file does not hold the recipe."""
    codes, width = get_tensor(state, "lm_head.weight", 2).shape
    depth = 1
    while f"blocks.{depth}.attn.q_norm.weight" in state:
        depth += 1
    return Config(
        num_tokens=get_tensor(state, "pos_embed", 3).shape[1] - UNUSED_ROWS["pos_embed"] - 2,
        codebook_size=codes,
        num_classes=get_tensor(state, "embeddings.weight", 2).shape[0] - codes - 2,
        width=width,
        depth=depth,
        num_heads=width // get_tensor(state, "blocks.0.attn.q_norm.weight", 1).shape[0],
        mlp_width=get_tensor(state, "blocks.0.mlp.fc1.weight", 2).shape[0],
        dropout=0.0,
        attention_dropout=0.0,
        label_dropout=0.0,
    )


FORMAT = Format(rar, _read_config, lambda shapes: TABLE)
load: Callable[..., tuple[Config, dict[str, Any]]] = FORMAT.load
open_params: Callable[..., tuple[Config, dict[str, Any]]] = FORMAT.open_params
save: Callable[..., None] = FORMAT.save
