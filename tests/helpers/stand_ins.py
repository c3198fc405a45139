"""Stand-ins for Inception, which takes half a minute to compile; a tokenizer file for the digits, experiments that use it,
and a store that it made."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rar_jax.config import load_experiment
from rar_jax.evaluation import program
from rar_jax.evaluation.program import Network
from rar_jax.evaluation.reference import read_reference
from rar_jax.experiment import Experiment, resolve
from rar_jax.metrics import sums
from rar_jax.parallel.mesh import make_mesh
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.tokens.tokenize import tokenize_source
from rar_jax.training import live
from rar_jax.weights import maskgit_vq

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"

WIDTHS = {"pool3": ("POOL3", 12), "spatial": ("SPATIAL", 8), "logits": ("CLASSES", 10)}


# ---------------------------------------------------------------- Inception


def projection(params: Any, images: jax.Array, *, resize: str) -> dict[str, jax.Array]:
    """16 averages of the pixels times random numbers."""
    b, y, x, c = images.shape
    pixels = images.astype(jnp.float32).reshape(b, 4, y // 4, 4, x // 4, c).mean(axis=(2, 4, 5)).reshape(b, 16) / 255
    random = np.random.default_rng(5)
    out = {}
    for name, (_, width) in WIDTHS.items():
        weights = jnp.asarray(random.standard_normal((16, width), np.float32))
        out[name] = jnp.matmul(pixels, weights, precision=jax.lax.Precision.HIGHEST)
    return out


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Few features instead of Inception's, fewer than images: everything else is as it is. The function that makes them."""
    for constant, width in WIDTHS.values():
        monkeypatch.setattr(sums, constant, width)
    monkeypatch.setattr(program, "extract_features", projection)
    network = Network({"fc": {"kernel": jnp.zeros((1, 1))}}, "0" * 64)
    for module in (program, live):
        monkeypatch.setattr(
            module, "read_reference", lambda path: read_reference(path, feature_dims=12, spatial_dims=8)
        )
        monkeypatch.setattr(module, "load_inception", lambda path, mesh, settings: network)
    return projection


# ---------------------------------------------------------------- tokens


class TinyTokens(NamedTuple):
    """A tokenizer of 8x8 grey images on 4x4 tokens of 32 codes, random weights, and its file."""

    config: tokenizer.Config
    weights: pathlib.Path

    def experiment(self, **data: Any) -> Experiment:
        """The tiny experiment with this tokenizer, four steps of training and no classifier; `data` changes that section."""
        config: ConfigDict = load_experiment(str(TINY), ["train.steps=4", "train.warmup=1"])
        with config.unlocked():
            del config["tokenizer_train"], config["classifier"]
            config.tokenizer = {k: v for k, v in config.tokenizer.items() if not k.startswith("restart")}
            config.tokenizer.weights = str(self.weights)
            config.data = {**config.data, **data}
        return resolve(config, "tiny")

    def make(self, out: pathlib.Path, **changes: Any) -> None:
        """Tokenizes the held-out digits into `out`, 8 shards of up to 50."""
        experiment = self.experiment()
        keywords = {"source": "digits", "split": "heldout", "shard_records": 50, "batch_size": 16, "quiet": True}
        keywords |= {"weights": str(self.weights), "out": out, **changes}
        tokenize_source(experiment, make_mesh(experiment.mesh), **keywords)

    def card(self) -> dict[str, Any]:
        """For a TokenStoreWriter, of a store whose tokenizer is not known."""
        card = {
            "spec": {"shape": [16], "dtype": "uint16", "vocab": 32},
            "num_classes": 10,
            "class_names": [str(i) for i in range(10)],
        }
        return {**card, "crops": ["whole image"], "source": "digits", "tokenizer_sha256": None}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    """See TinyTokens."""
    config = tokenizer.Config(
        image_size=8, channels=1, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8,
        codebook_size=32,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("weights") / "vq.safetensors"
    maskgit_vq.save(path, config, tokenizer.init(config, jax.random.key(0)))
    return TinyTokens(config, path)


@pytest.fixture(scope="module")
def straight(tiny: TinyTokens, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The held-out digits, tokenized without an interruption. Not to be written to."""
    out = tmp_path_factory.mktemp("straight") / "store"
    tiny.make(out)
    return out
