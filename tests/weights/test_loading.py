"""Which module reads a file."""

import pathlib

import numpy as np
import pytest

from rar_jax.errors import WeightsError
from rar_jax.weights.loading import open_weights, recognize_file
from rar_jax.weights.mapping import write_safetensors


def test_a_file_is_recognized_by_its_keys(golden: pathlib.Path) -> None:
    assert recognize_file(golden / "rar" / "rar_tiny.bin") == ("generators", "rar")
    assert recognize_file(golden / "maskgit_vq" / "maskgit_vq_tiny.bin") == ("tokenizers", "maskgit_vq")


def test_a_file_of_no_known_model_names_the_keys(tmp_path: pathlib.Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"pos_embedding": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"w\.safetensors holds no known model: .*'pos_embed' \(rar\)"):
        open_weights(tmp_path / "w.safetensors", "generators")


def test_a_file_of_the_other_kind_is_refused(golden: pathlib.Path) -> None:
    with pytest.raises(WeightsError, match=r"is a tokenizer \(maskgit_vq\), not a generator"):
        open_weights(golden / "maskgit_vq" / "maskgit_vq_tiny.bin", "generators")
    with pytest.raises(WeightsError, match=r"is a generator \(rar\), not a tokenizer"):
        open_weights(golden / "rar" / "rar_tiny.bin", "tokenizers", num_tokens=16)
