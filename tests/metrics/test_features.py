"""Resizing, input range, sharding and errors of Inception features; tests/golden compares them with torch-fidelity's."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import ConfigError
from rar_jax.metrics import features as module
from rar_jax.metrics.features import extract_features, resize_half_pixel, resize_tf1
from rar_jax.weights import inception as interop

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "inception" / "inception_features.npz")


def _images() -> np.ndarray:
    return GOLDEN["images_nchw_64"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def params(inception_file):
    return jax.device_put(interop.load(inception_file))


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize(("size", "new"), [((64, 48), 299), ((300, 500), 299), ((5, 7), 5), ((1, 2), 3)])
def test_half_pixel_resize_is_jax_image_resize_without_antialias(size, new):
    x = jax.random.uniform(jax.random.key(0), (2, *size, 3), maxval=255)
    expected = jax.image.resize(x, (2, new, new, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_half_pixel(x, size=new), expected, atol=2e-3)


def test_tf1_resize_by_hand():
    ramp = jnp.asarray([0.0, 10.0, 30.0])
    x = jnp.broadcast_to(ramp[None, None, :, None], (1, 3, 3, 1))
    columns = np.asarray(resize_tf1(x, size=6))[0, :, :, 0]
    np.testing.assert_array_equal(columns, np.tile([0, 5, 10, 20, 30, 30], (6, 1)))  # read at 0, .5, 1, 1.5, 2, 2.5
    rows = np.asarray(resize_tf1(x.transpose(0, 2, 1, 3), size=6))[0, :, :, 0]
    np.testing.assert_array_equal(rows, columns.T)


@pytest.mark.parametrize("resize", [resize_tf1, resize_half_pixel])
def test_the_same_size_is_the_same_image(resize):
    x = jax.random.uniform(jax.random.key(0), (1, 299, 299, 3), maxval=255)
    np.testing.assert_array_equal(resize(x), x)


@pytest.fixture
def network_input(monkeypatch):
    """Function of the arguments of `extract_features` -> what the network would see."""
    monkeypatch.setattr(module, "_apply", lambda params, pixels: {"pixels": pixels})
    params = {"fc": {"kernel": jnp.zeros((1, 1))}}
    return lambda images, **kwargs: np.asarray(extract_features(params, images, **kwargs)["pixels"])


def test_the_range_of_either_protocol(network_input):
    images = np.zeros((1, 299, 299, 3), np.uint8)
    images[0, 0, :3, 0] = [0, 128, 255]
    np.testing.assert_array_equal(network_input(images)[0, 0, :3, 0], [-1, 0, 127 / 128])
    scaled = network_input(images, resize="pytorch_fid")[0, 0, :3, 0]
    np.testing.assert_allclose(scaled, [-1, 2 * 128 / 255 - 1, 1], atol=1e-6)


def test_protocols_place_pixels_differently(network_input):
    images = _images()
    np.testing.assert_allclose(
        network_input(images), (np.asarray(resize_tf1(jnp.asarray(images, jnp.float32))) - 128) / 128, atol=1e-6
    )
    expected = np.asarray(resize_half_pixel(jnp.asarray(images, jnp.float32))) * 2 / 255 - 1
    np.testing.assert_allclose(network_input(images, resize="pytorch_fid"), expected, atol=1e-6)


def test_grey_images_count_as_three_equal_channels(network_input):
    grey = _images()[..., :1]
    np.testing.assert_array_equal(network_input(grey), network_input(grey.repeat(3, axis=-1)))


# ---------------------------------------------------------------- in graph


def test_a_sharded_batch_needs_no_communication(params):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    over_data, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    images = np.concatenate([_images(), _images()[:1]])
    function = jax.jit(extract_features, in_shardings=(whole, over_data), out_shardings=over_data)
    sharded = function.lower(params, images).compile()
    text = sharded.as_text()
    assert not [word for word in ("all-", "collective-", "reduce-scatter") if word in text]
    out = sharded(jax.device_put(params, whole), jax.device_put(images, over_data))
    np.testing.assert_allclose(out["pool3"][:3], GOLDEN["pool3_f32_64"], atol=2e-3)
    np.testing.assert_allclose(out["pool3"][3], GOLDEN["pool3_f32_64"][0], atol=2e-3)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"float32 \(1, 8, 8, 3\).*give uint8"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\)"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"\(1, 3, 8, 8\).*1 or 3 channels"),
        (np.zeros((0, 8, 8, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((1, 0, 8, 3), np.uint8), r"uint8 \(1, 0, 8, 3\)"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        extract_features({"fc": {"kernel": np.zeros((1, 1), np.float32)}}, images)


@pytest.mark.parametrize(("dtype", "message"), [(jnp.bfloat16, "bfloat16"), (np.float64, "jax_enable_x64")])
def test_other_precisions_are_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        extract_features({"fc": {"kernel": np.zeros((1, 1), dtype)}}, np.zeros((1, 8, 8, 3), np.uint8))


def test_an_unknown_resize_is_refused():
    with pytest.raises(ConfigError, match=r"resize is 'tf_1'.*Did you mean 'tf1'"):
        extract_features({}, np.zeros((1, 8, 8, 3), np.uint8), resize="tf_1")


@pytest.mark.parametrize("resize", [resize_tf1, resize_half_pixel])
def test_integers_are_not_resized(resize):
    with pytest.raises(ValueError, match=r"uint8.*float32 or float64"):
        resize(jnp.zeros((1, 8, 8, 3), jnp.uint8))
