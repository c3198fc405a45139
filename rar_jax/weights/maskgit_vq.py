"""MaskGIT-VQGAN's released weights to and from our parameters.

A name of ours becomes the released one by three facts: "_" around a number is ".", "kernel" and "scale" are
"weight", and the codebook is "quantize.embedding.weight". Kernels (y, x, in, out) are (out, in, y, x) there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rar_jax.errors import WeightsError
from rar_jax.tokenizers import maskgit_vq
from rar_jax.tokenizers.maskgit_vq import Config
from rar_jax.weights.mapping import Format, Mapped, State, flatten_params, get_tensor
from rar_jax.weights.registry import Released

FILES = {
    "maskgit-vqgan-imagenet-f16-256": Released(
        "fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", "Apache-2.0; weights: see the model card",
        config=Config(image_size=256), scores={"rFID": 2.28},
    ),
}  # fmt: skip
KEYS = ("quantize.embedding.weight", "encoder.mid.0.conv1.weight", "encoder.down.0.block.0.conv1.weight")
_CODEBOOK = "quantize.embedding.weight"


def _read_config(state: State, *, image_size: int) -> Config:
    """Read the architecture off names and shapes. It fits images of any size."""
    levels = blocks = 0
    while any(key.startswith(f"encoder.down.{levels}.") for key in state):
        levels += 1
    while any(key.startswith(f"encoder.down.0.block.{blocks}.") for key in state):
        blocks += 1
    conv_in = get_tensor(state, "encoder.conv_in.weight", 4)
    kernels = [get_tensor(state, f"encoder.down.{i}.block.0.conv1.weight", 4) for i in range(max(levels, 1))]
    codebook, base_width = get_tensor(state, _CODEBOOK, 2), conv_in.shape[0]
    if any(kernel.shape[0] % base_width for kernel in kernels):
        raise WeightsError(f"a level's width is not a multiple of {base_width}, that of encoder.conv_in")
    return Config(
        image_size=image_size,
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


FORMAT = Format(maskgit_vq, _read_config, make_table)
load: Callable[..., tuple[Config, dict[str, Any]]] = FORMAT.load
open_params: Callable[..., tuple[Config, dict[str, Any]]] = FORMAT.open_params
save: Callable[..., None] = FORMAT.save
