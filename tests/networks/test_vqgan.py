"""The VQGAN's networks: shapes, logical axes, and the released quirk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from rar_jax.networks import vqgan


def _names(tree):
    return {
        jax.tree_util.keystr(path): leaf.names
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, meta.Partitioned))
        if isinstance(leaf, meta.Partitioned)
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("multipliers", [(1,), (2, 1), (1, 1, 2)])
def test_shapes_for_any_levels_widths_and_channels(channels, multipliers):
    factor = 2 ** (len(multipliers) - 1)
    encoder = vqgan.Encoder(8, multipliers, 2, latent_width=5)
    decoder = vqgan.Decoder(8, multipliers, 2, channels=channels)
    images = jax.ShapeDtypeStruct((2, 4 * factor, 8 * factor, channels), jnp.float32)
    latents, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), images)
    assert latents.shape == (2, 4, 8, 5)
    outputs, _ = jax.eval_shape(decoder.init_with_output, jax.random.key(0), latents)
    assert outputs.shape == images.shape


def test_a_change_of_width_shortcuts_the_transformed_activations():
    """`h + nin(h)`: with nin the identity the block is twice what it is with nin zero, whatever the input."""
    block = vqgan.ResidualBlock(6)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    params = meta.unbox(block.init(jax.random.key(1), x)["params"])
    assert params["nin_shortcut"]["kernel"].shape == (1, 1, 6, 6)

    def run(kernel):
        return block.apply({"params": {**params, "nin_shortcut": {"kernel": kernel[None, None]}}}, x)

    np.testing.assert_allclose(run(jnp.eye(6)), 2 * run(jnp.zeros((6, 6))), rtol=1e-5)


def test_the_same_width_is_a_residual():
    block = vqgan.ResidualBlock(4)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    params = jax.tree.map(jnp.zeros_like, meta.unbox(block.init(jax.random.key(1), x)["params"]))
    np.testing.assert_array_equal(block.apply({"params": params}, x), x)


def test_upsampling_repeats_pixels():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    expected = np.asarray(x).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(vqgan.upsample(x), expected)


def test_every_kernel_has_logical_axes():
    decoder = vqgan.Decoder(8, (1, 2), 1, channels=3)
    params = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1, 1, 4)))["params"]
    names = _names(params)
    kernels = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(meta.unbox(params))]
    assert set(names) == {k for k in kernels if "kernel" in k}
    assert names["['conv_in']['kernel']"] == ("kernel_y", "kernel_x", "conv_in", "conv_out")
    assert names["['conv_out']['kernel']"][-1] is None


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    encoder = vqgan.Encoder(8, (1, 2), 1, latent_width=4, dtype=jnp.bfloat16)
    output, variables = jax.eval_shape(encoder.init_with_output, jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
