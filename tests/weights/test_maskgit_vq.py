"""Released tokenizer files in and out."""

import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from torch_files import read_tensors

from rar_jax.errors import WeightsError
from rar_jax.tokenizers import maskgit_vq
from rar_jax.weights import maskgit_vq as interop
from rar_jax.weights.mapping import param_shapes

TINY_FILE = pathlib.Path(__file__).parents[1] / "golden" / "maskgit_vq" / "maskgit_vq_tiny.bin"


def _write(path, state):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    return path

    assert interop.load(TINY_FILE, image_size=32)[0].image_size == 32


def test_the_released_names_of_the_released_architecture():
    names = set(interop.make_table(param_shapes(maskgit_vq.init, maskgit_vq.Config(image_size=256))))
    assert {
        "encoder.conv_in.weight",
        "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.mid.1.norm2.bias",
        "decoder.up.4.block.1.conv2.weight",
        "decoder.up.1.upsample_conv.bias",
        "decoder.conv_out.bias",
        "quantize.embedding.weight",
    } <= names
    assert not {"encoder.conv_in.bias", "decoder.up.0.upsample_conv.weight"} & names


def test_save_and_load_of_other_architectures(tmp_path):
    for multipliers, channels in [((1,), 1), ((1, 1, 2), 3), ((1, 1, 1, 1, 2), 3)]:
        config = maskgit_vq.Config(
            image_size=8 * 2 ** (len(multipliers) - 1) if len(multipliers) < 5 else 256,
            channels=channels,
            base_width=4,
            width_multipliers=multipliers,
            latent_width=3,
            codebook_size=5,
        )
        shapes = jax.eval_shape(lambda key, c=config: maskgit_vq.init(c, key), jax.random.key(0))
        params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
        interop.save(tmp_path / "w.safetensors", config, params)
        assert interop.load(tmp_path / "w.safetensors")[0] == config


def test_save_refuses_other_suffixes_and_other_parameters(tmp_path):
    config, params = interop.load(TINY_FILE, image_size=16)
    with pytest.raises(WeightsError, match=r"\.safetensors"):
        interop.save(tmp_path / "w.txt", config, params)
    with pytest.raises(WeightsError, match="'codebook' has shape"):
        interop.save(tmp_path / "w.safetensors", config, {**params, "codebook": params["codebook"][:5]})
    params.pop("codebook")
    with pytest.raises(WeightsError, match="'codebook' has shape"):
        interop.save(tmp_path / "w.safetensors", config, params)


def _renamed(state):
    state["encoder.mid.0.conv1.weights"] = state.pop("encoder.mid.0.conv1.weight")


def _lost(state):
    state.pop("decoder.up.1.upsample_conv.bias")


def _surplus(state):
    state["decoder.up.0.upsample_conv.bias"] = np.zeros(3, np.float32)


def _misshapen(state):
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :3]


def _not_finite(state):
    state["encoder.norm_out.bias"] = np.full_like(state["encoder.norm_out.bias"], np.nan)


def _odd_width(state):
    state["encoder.down.1.block.0.conv1.weight"] = state["encoder.down.1.block.0.conv1.weight"][:33]


def _flat(state):
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].reshape(-1)


def _no_levels(state):
    for key in [k for k in state if ".down." in k]:
        state.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_renamed, r"encoder\.mid\.0\.conv1\.weights.*Did you mean 'encoder\.mid\.0\.conv1\.weight'"),
        (_lost, r"'decoder\.up\.1\.upsample_conv\.bias' is missing"),
        (_surplus, r"unexpected tensor 'decoder\.up\.0\.upsample_conv\.bias'"),
        (_misshapen, r"'decoder\.conv_in\.weight' has shape \(64, 3, 3, 3\)"),
        (_not_finite, r"'encoder\.norm_out\.bias' holds numbers that are not finite"),
        (_odd_width, "multiple of 32"),
        (_flat, "not 4 dimensions"),
        (_no_levels, r"'encoder\.down\.0\.block\.0\.conv1\.weight' is missing"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, damage, message):
    state = dict(read_tensors(TINY_FILE))
    damage(state)
    path = _write(tmp_path / "w.safetensors", state)
    with pytest.raises(WeightsError, match=message) as error:
        interop.load(path, image_size=16)
    assert "w.safetensors" in str(error.value)


def test_an_image_size_that_does_not_fit_is_a_weights_error():
    with pytest.raises(WeightsError, match="multiple of 2"):
        interop.load(TINY_FILE, image_size=15)
