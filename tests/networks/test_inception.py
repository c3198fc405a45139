"""The FID network's pools and shapes; its numbers are in tests/metrics/test_features.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.networks import inception


def _windows(x: np.ndarray) -> np.ndarray:
    """(b, y, x, d) -> (b, y, x, d, 3, 3), with NaN where the window leaves the image."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))


@pytest.mark.parametrize("size", [(8, 8), (17, 5), (1, 2)])
def test_average_pool_counts_real_pixels_only(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)
    expected = np.nanmean(_windows(x), axis=(-2, -1))
    np.testing.assert_allclose(inception.average_pool(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (17, 5), (6, 9)])
def test_max_pool(size):
    x = np.random.default_rng(1).standard_normal((2, *size, 3), np.float32) - 9  # a padding of zeros would win
    expected = np.nanmax(_windows(x), axis=(-2, -1))
    np.testing.assert_array_equal(inception.max_pool(jnp.asarray(x), stride=1, padding=1), expected)
    y, x_ = (s - (s + 1) % 2 for s in size)  # windows of stride 2 that lie inside
    np.testing.assert_array_equal(
        inception.max_pool(jnp.asarray(x), stride=2), expected[:, 1 : y - 1 : 2, 1 : x_ - 1 : 2]
    )


def test_shapes_and_dtypes_follow_the_parameters():
    network = inception.Inception()
    images = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    out, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), images)
    assert {name: (x.shape, x.dtype) for name, x in out.items()} == {
        "pool3": ((2, inception.POOL3), jnp.float32),
        "spatial": ((2, inception.SPATIAL), jnp.float32),
        "logits": ((2, inception.CLASSES), jnp.float32),
    }
    assert set(variables) == {"params"}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 9), (8, 11)])
def test_valid_convolution_is_what_it_is_called(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    conv = inception.ConvNormRelu(5, (3, 3), stride=stride, valid=True)
    ours, variables = conv.init_with_output(jax.random.key(1), x)
    plain = jax.lax.conv_general_dilated(
        x, variables["params"]["kernel"], (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert ours.shape == plain.shape
    np.testing.assert_allclose(ours, np.maximum(plain, 0), atol=1e-5)
