"""RAR's released weights (yucornetto/RAR: rar_b.bin ... rar_xxl.bin) to and from our parameters.

The released position tables are oversized (n + 1024, n + 1024 and n + 100 rows); the first n + 2 rows are used and kept.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rar_jax.config import nearest
from rar_jax.errors import ConfigError, WeightsError
from rar_jax.generators.rar import Config, init
from rar_jax.weights.lazy import LazyArray, finite, materialize
from rar_jax.weights.saving import write
from rar_jax.weights.torch_file import StoredTensor, open_tensors

# Surplus rows of the released tables beyond n, of which n + 2 are used.
TABLE_ROWS = {"pos_embed": 1024, "target_aware_pos_embed": 1024, "timesteps_embeddings": 100}

_Q_NORM, _FC1 = "blocks.{}.attn.q_norm.weight", "blocks.0.mlp.fc1.weight"


def _linear(released: str, path: str) -> dict[str, tuple[str, str]]:
    return {f"{released}.weight": (f"{path}/kernel", "transpose"), f"{released}.bias": (f"{path}/bias", "same")}


def _norm(released: str, path: str) -> dict[str, tuple[str, str]]:
    return {f"{released}.weight": (f"{path}/scale", "same"), f"{released}.bias": (f"{path}/bias", "same")}


# released name -> (our path, what is done to the array)
_OUTER = {
    "cls_token": ("cls_token", "row"),
    "embeddings.weight": ("embeddings", "same"),
    **{name: (name, "row") for name in TABLE_ROWS},
    **_linear("adaln_before_head.adaLN_modulation.1", "final_adaln"),
    **_linear("lm_head", "lm_head"),
}
_BLOCK = {
    **_norm("norm1", "norm1"),
    **_linear("attn.qkv", "attn/qkv"),
    **_norm("attn.q_norm", "attn/q_norm"),
    **_norm("attn.k_norm", "attn/k_norm"),
    **_linear("attn.proj", "attn/proj"),
    **_norm("norm2", "norm2"),
    **_linear("mlp.fc1", "mlp/fc1"),
    **_linear("mlp.fc2", "mlp/fc2"),
    **_linear("adaLN_modulation.1", "adaln"),
}


def load(path: str | pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """Reads a released RAR file, torch (.bin, .pth) or safetensors; torch is not needed and nothing is executed.

    Returns: the Config read off the shapes (dropouts 0: the file does not hold the recipe) and float32 parameters.
    Raises: WeightsError for a file that is not RAR's, missing or surplus keys, wrong shapes, or non-finite numbers.
    """
    config, lazy = open_params(path)
    return config, materialize(lazy)


def open_params(path: str | pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """As `load`, but the leaves are LazyArrays: only names and shapes are read yet. For `lazy.place`.

    Raises: WeightsError if it is not a RAR generator's file: a key is missing or surplus, or a shape another.
    """
    state = open_tensors(path)
    config = _read_config(state, path)
    shapes = released_shapes(config)
    if missing := sorted(shapes.keys() - state.keys()):
        raise WeightsError(
            f"{path}: key '{missing[0]}' is missing ({len(missing)} in all).{nearest(missing[0], state)}"
        )
    if surplus := sorted(state.keys() - shapes.keys()):
        raise WeightsError(f"{path}: surplus key '{surplus[0]}' ({len(surplus)} in all).{nearest(surplus[0], shapes)}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise WeightsError(f"{path}: '{name}' has shape {state[name].shape}, expected {shape}")

    def part(name: str, ours: str, how: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            value = _to_ours(finite(path, name, state[name].read()), how)
            return _split(config, ours, value[: config.num_tokens + 2] if name in TABLE_ROWS else value)

        return read

    shape_of = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    params: dict[str, Any] = {}
    for name, (ours, how) in _OUTER.items():
        _put(params, ours, LazyArray(_get(shape_of, ours).shape, [part(name, ours, how)], stacked=False))
    for name, (ours, how) in _BLOCK.items():
        ours = f"transformer/blocks/{ours}"
        layers = [part(f"blocks.{i}.{name}", ours, how) for i in range(config.depth)]
        _put(params, ours, LazyArray(_get(shape_of, ours).shape, layers, stacked=True))
    return config, params


def save(path: str | pathlib.Path, config: Config, params: dict[str, Any]) -> None:
    """Writes .safetensors, or a torch file (.bin, .pth), with the released names and shapes, float32; tables are padded with zeros.

    Raises: WeightsError for another suffix, or parameters that `prepare` has laid out for decoding.
    """
    if "layers" in params:
        raise WeightsError(f"{path}: these parameters are prepared for decoding; save those that they were made of")
    write(path, {name: np.asarray(value, np.float32) for name, value in to_released(config, params).items()})


def to_released(config: Config, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Any tree of the parameters' structure (parameters, gradients, masks) under the released names and shapes."""
    state: dict[str, np.ndarray] = {}
    shapes = released_shapes(config)
    for name, (ours, how) in _OUTER.items():
        value = _to_theirs(_join(config, ours, _get(params, ours)), how)
        if name in TABLE_ROWS:
            value = np.pad(value, ((0, 0), (0, shapes[name][1] - value.shape[1]), (0, 0)))
        state[name] = value
    for name, (ours, how) in _BLOCK.items():
        stacked = np.asarray(_get(params, f"transformer/blocks/{ours}"))
        for i in range(config.depth):
            state[f"blocks.{i}.{name}"] = _to_theirs(_join(config, ours, stacked[i]), how)
    return state


def released_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file of this config."""
    d, f, v, k = config.width, config.mlp_width, config.codebook_size, config.width // config.num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "embeddings.weight": (v + 1 + config.num_classes + 1, d),
        "adaln_before_head.adaLN_modulation.1.weight": (2 * d, d),
        "adaln_before_head.adaLN_modulation.1.bias": (2 * d,),
        "lm_head.weight": (v, d),
        "lm_head.bias": (v,),
        **{name: (1, config.num_tokens + extra, d) for name, extra in TABLE_ROWS.items()},
    }
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    linears["adaLN_modulation.1"] = (6 * d, d)
    norms = {"norm1": d, "norm2": d, "attn.q_norm": k, "attn.k_norm": k}
    for i in range(config.depth):
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name, size in norms.items():
            shapes |= {f"blocks.{i}.{name}.weight": (size,), f"blocks.{i}.{name}.bias": (size,)}
    return shapes


def _read_config(state: dict[str, StoredTensor], path: str | pathlib.Path) -> Config:
    dimensions = {"pos_embed": 3, "embeddings.weight": 2, "lm_head.weight": 2, _Q_NORM.format(0): 1, _FC1: 2}
    for name, ndim in dimensions.items():
        if name not in state:
            if "quantize.embedding.weight" in state:
                raise WeightsError(
                    f"{path} is a tokenizer: it has no '{name}'. Give it as --tokenizer, and RAR's file here"
                )
            raise WeightsError(f"{path} is not RAR's: it has no '{name}'.{nearest(name, state)}")
        if state[name].ndim != ndim or 0 in state[name].shape:
            raise WeightsError(f"{path}: '{name}' has shape {state[name].shape}, not {ndim} dimensions")
    codes, width = state["lm_head.weight"].shape
    depth = 1
    while _Q_NORM.format(depth) in state:
        depth += 1
    try:
        return Config(
            num_tokens=state["pos_embed"].shape[1] - TABLE_ROWS["pos_embed"],
            codebook_size=codes,
            num_classes=state["embeddings.weight"].shape[0] - codes - 2,
            width=width,
            depth=depth,
            num_heads=width // state[_Q_NORM.format(0)].shape[0],
            mlp_width=state[_FC1].shape[0],
            dropout=0.0,
            attention_dropout=0.0,
            label_dropout=0.0,
        )
    except ConfigError as error:
        raise WeightsError(f"{path}: its shapes are not those of a RAR model: {error}") from None


def _parts(config: Config, ours: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Inputs and outputs, as we shape them, of the linear layers that are fused matrices in the released file."""
    d, heads = config.width, (config.num_heads, config.width // config.num_heads)
    shapes = {
        "attn/qkv": ((d,), (3, *heads)),
        "attn/proj": (heads, (d,)),
        "adaln": ((d,), (6, d)),
        "final_adaln": ((d,), (2, d)),
    }
    return shapes.get(ours.rpartition("/")[0].removeprefix("transformer/blocks/"))


def _split(config: Config, ours: str, value: np.ndarray) -> np.ndarray:
    if (parts := _parts(config, ours)) is None:
        return value
    return value.reshape((*parts[0], *parts[1]) if ours.endswith("kernel") else parts[1])


def _join(config: Config, ours: str, value: Any) -> np.ndarray:
    value = np.asarray(value)
    if (parts := _parts(config, ours)) is None:
        return value
    return value.reshape((math.prod(parts[0]), math.prod(parts[1])) if ours.endswith("kernel") else -1)


def _to_ours(value: np.ndarray, how: str) -> np.ndarray:
    return {"same": lambda x: x, "transpose": np.transpose, "row": lambda x: x[0]}[how](value)


def _to_theirs(value: Any, how: str) -> np.ndarray:
    value = np.asarray(value)
    return {"same": lambda x: x, "transpose": np.transpose, "row": lambda x: x[None]}[how](value)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _get(tree: dict[str, Any], path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
