"""The MaskGIT-VQGAN tokenizer against 1d-tokenizer: released files, latents, tokens, decoded images."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rar_jax.tokenizers import maskgit_vq
from rar_jax.weights import maskgit_vq as weights
from tests.golden import (
    Arrays,
    Check,
    count_different,
    count_other_dtypes,
    max_difference,
    measure_config,
    measure_round_trip,
    to_nhwc,
)

FILES = ("config.json", "maskgit_vq_tiny.bin", "maskgit_vq_tiny.npz")


def measure(folder: pathlib.Path) -> Iterator[Check]:
    """Yield the checks of one folder."""
    facts, arrays = json.loads((folder / "config.json").read_text()), Arrays(folder / "maskgit_vq_tiny.npz")
    path = folder / "maskgit_vq_tiny.bin"
    config, params = weights.load(path, image_size=facts["res"])
    yield from _measure_outputs(config, params, arrays)
    yield measure_config(
        config,
        image_size=facts["res"],
        channels=arrays["images_nchw"].shape[1],
        base_width=facts["hc"],
        width_multipliers=tuple(facts["mult"]),
        blocks_per_level=facts["rb"],
        latent_width=facts["z"],
        codebook_size=facts["codes"],
    )
    yield from measure_round_trip(weights, maskgit_vq.init, path, used={}, image_size=facts["res"])


def _measure_outputs(config: maskgit_vq.Config, params: Any, arrays: Arrays) -> Iterator[Check]:
    latents, encode, decode, decode_unclipped = (
        jax.jit(functools.partial(function, config))
        for function in (maskgit_vq.latents, maskgit_vq.encode, maskgit_vq.decode, maskgit_vq.decode_unclipped)
    )
    images = to_nhwc(arrays["images_nchw"])
    yield Check("latents", 1e-4, max_difference(latents(params, images), to_nhwc(arrays["latents_nchw"])))
    ours = encode(params, images)
    yield Check("tokens that differ", 0, count_different(ours, arrays["tokens"]))
    yield Check("tokens that are not int32", 0, count_other_dtypes(np.int32, ours))
    for name in ("", "random_"):
        tokens, expected = arrays[f"{name}tokens"].astype(np.int32), to_nhwc(arrays[f"{name}decoded_nchw"])
        unclipped = max_difference(decode_unclipped(params, tokens), expected)
        yield Check("decoded images before clipping", 1e-4, unclipped)
        yield Check("decoded images", 1e-4, max_difference(decode(params, tokens), expected.clip(0, 1)))
