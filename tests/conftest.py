"""Four fake CPU devices for every test, and rank promotion is an error. Set before JAX starts its backend."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests compile thousands of tiny programs and run each a few times: without LLVM's optimizations they take half the
# time. What the numbers mean does not change; tests/faults runs the real command, optimized.
jax.config.update("jax_disable_most_optimizations", True)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the reference outputs."""
    return GOLDEN


class Pair(NamedTuple):
    """Files of a generator and a tokenizer that fit, in the released layout."""

    generator: pathlib.Path
    tokenizer: pathlib.Path


@pytest.fixture(scope="session")
def released_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny RAR of 64 tokens and 10 classes, and a tokenizer of 16x16 pixels: random weights, nothing trained."""
    from rar_jax.generators import rar
    from rar_jax.interop import maskgit_vq as interop_vq
    from rar_jax.interop import rar as interop_rar
    from rar_jax.tokenizers import maskgit_vq

    folder = tmp_path_factory.mktemp("released")
    pair = Pair(folder / "rar_mini.bin", folder / "vq_mini.safetensors")
    rar_config = dataclasses.replace(rar.TINY, num_tokens=64)  # 8 x 8
    params = rar.init(rar_config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    interop_rar.save(pair.generator, rar_config, params)
    vq_config = maskgit_vq.Config(
        image_size=16, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8, codebook_size=32
    )
    interop_vq.save(pair.tokenizer, vq_config, maskgit_vq.init(vq_config, jax.random.key(1)))
    return pair
