"""The VQGAN's networks: shapes, logical axes, and the released quirk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from scipy import ndimage

from rar_jax.networks import vqgan
from rar_jax.weights import maskgit_vq as weights


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


def _correlate(x_byxd, kernel):
    """The convolution of neural networks, zeros around the image, in float64 by SciPy."""
    x_byxd, kernel = np.asarray(x_byxd, np.float64), np.asarray(kernel, np.float64)
    return np.stack(
        [
            np.stack(
                [
                    sum(ndimage.correlate(x[..., i], kernel[..., i, o], mode="constant") for i in range(x.shape[-1]))
                    for o in range(kernel.shape[-1])
                ],
                axis=-1,
            )
            for x in x_byxd
        ]
    )


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 128, 6, 2)], ids=["small", "of a large image"])
def test_a_convolution_keeps_the_size(shape):
    layer = vqgan.Conv(4, 3, jnp.float32)
    x = jax.random.normal(jax.random.key(0), shape)
    params = meta.unbox(layer.init(jax.random.key(1), x)["params"]) | {"bias": jnp.arange(4.0)}
    expected = _correlate(x, params["kernel"]) + np.arange(4)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=3e-6)


def test_doubling_repeats_pixels_before_the_convolution():
    layer = vqgan.Conv(3, 3, jnp.float32, double=True)
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 2))
    params = meta.unbox(layer.init(jax.random.key(1), x)["params"])
    expected = _correlate(np.asarray(x).repeat(2, 1).repeat(2, 2), params["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=3e-6)


@pytest.mark.parametrize("width", [6, 64], ids=["a group a channel", "groups of two"])
def test_group_norm_and_silu(width):
    """Against float64, with a mean a thousand times the spread, at which a variance by E[x^2]-E[x]^2 is lost."""
    layer = vqgan.NormSilu(jnp.float32)
    x = 1000 + jax.random.normal(jax.random.key(0), (2, 8, 4, width))
    scale, bias = jax.random.normal(jax.random.key(1), (2, width))
    groups = np.asarray(x, np.float64).reshape(2, 32, min(32, width), -1)
    centred = groups - groups.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)
    normed = normed * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)
    expected = normed / (1 + np.exp(-normed))
    np.testing.assert_allclose(layer.apply({"params": {"scale": scale, "bias": bias}}, x), expected, atol=1e-3)


@pytest.mark.parametrize("size", [1024, vqgan.CODES_AT_A_TIME, 3 * vqgan.CODES_AT_A_TIME - 5])
def test_the_nearest_code_is_that_of_all_distances(size):
    """In float64, and of equal codes in several chunks the first; a latent that is not a number has code 0."""
    codes, latents = jax.random.normal(jax.random.key(0), (size, 8)), jax.random.normal(jax.random.key(1), (2, 50, 8))
    codes = codes.at[-1].set(codes[3])
    latents = latents.at[0, 0].set(codes[3]).at[1, 1].set(jnp.nan)
    ours = np.asarray(vqgan.nearest_codes(codes, latents))
    x, e = (np.asarray(a, np.float64) for a in (latents, codes))
    distances = (e**2).sum(1) - 2 * x @ e.T
    assert ours.dtype == np.int32 and (ours[0, 0], ours[1, 1]) == (3, 0)
    found = np.take_along_axis(distances, ours[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, np.where(np.isnan(found), found, distances.min(-1)), atol=1e-5)
    assert (ours == distances.argmin(-1)).mean() > 0.98


def test_golden_tokens_from_distances_in_parts(golden, monkeypatch):
    files = golden / "maskgit_vq"
    expected, (_, params) = (
        np.load(files / "maskgit_vq_tiny.npz"),
        weights.load(files / "maskgit_vq_tiny.bin", image_size=16),
    )
    latents_byxz = np.moveaxis(expected["latents_nchw"], 1, -1)
    latents_bnz = jnp.asarray(latents_byxz.reshape(len(latents_byxz), -1, latents_byxz.shape[-1]))
    monkeypatch.setattr(vqgan, "CODES_AT_A_TIME", len(params["codebook"]) // 3)
    np.testing.assert_array_equal(vqgan.nearest_codes(params["codebook"], latents_bnz), expected["tokens"])


@pytest.mark.parametrize("differentiated", [False, True])
def test_distances_to_a_large_codebook_need_little_memory(differentiated):
    """Temporary memory for 2**18 codes and 1024 latents, all of whose distances take 1 GiB."""
    codes, latents = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2**18, 8), (4, 256, 8)))

    def straight_through(codes, latents):
        return jnp.sum(jnp.take(codes, vqgan.nearest_codes(codes, latents), axis=0) * latents)

    function = jax.value_and_grad(straight_through, argnums=(0, 1)) if differentiated else vqgan.nearest_codes
    memory = jax.jit(function).lower(codes, latents).compile().memory_analysis()
    # Distances, and minima by XLA's CPU reductions, of one chunk; the codebook once more, in chunks.
    assert memory.temp_size_in_bytes < 4 * 1024 * vqgan.CODES_AT_A_TIME * 2 + 2 * 4 * 8 * 2**18


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
