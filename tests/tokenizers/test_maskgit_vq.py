"""The MaskGIT-VQGAN tokenizer: golden parity, the training objective, the restart of dead codes."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import ConfigError
from rar_jax.tokenizers import maskgit_vq
from rar_jax.tokenizers.maskgit_vq import TINY
from rar_jax.weights import maskgit_vq as interop

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def params():
    return maskgit_vq.init(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, *maskgit_vq.image_spec(TINY).shape))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "maskgit_vq_tiny.npz") as file:
        return dict(file), *interop.load(GOLDEN / "maskgit_vq_tiny.bin", image_size=16)


def _nhwc(x):
    return np.moveaxis(x, 1, -1)


# ---------------------------------------------------------------- golden


def test_golden_latents_and_tokens(golden, parity):
    expected, config, params = golden
    images = _nhwc(expected["images_nchw"])
    latents = maskgit_vq.latents(config, params, images)
    parity.check_close("tokenizer, latents", latents, _nhwc(expected["latents_nchw"]), 1e-4)
    tokens = maskgit_vq.encode(config, params, images)
    assert tokens.dtype == jnp.int32
    parity.check_same("tokenizer, tokens that differ", tokens, expected["tokens"])


@pytest.mark.parametrize(("tokens", "decoded"), [("tokens", "decoded_nchw"), ("random_tokens", "random_decoded_nchw")])
def test_golden_decoded_images(golden, tokens, decoded, parity):
    expected, config, params = golden
    tokens, images = expected[tokens].astype(np.int32), _nhwc(expected[decoded])
    parity.check_close(
        "tokenizer, decoded images before clipping", maskgit_vq.decode_unclipped(config, params, tokens), images, 1e-4
    )
    parity.check_close("tokenizer, decoded images", maskgit_vq.decode(config, params, tokens), images.clip(0, 1), 1e-4)


# ---------------------------------------------------------------- contract


def test_specs_and_trees_agree(params, images):
    tokens = maskgit_vq.encode(TINY, params, images)
    assert tokens.shape[1:] == maskgit_vq.token_spec(TINY).shape == (16,)
    assert maskgit_vq.decode(TINY, params, tokens).shape == images.shape
    axes = maskgit_vq.axes(TINY)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(params)
    for leaf, names in zip(
        jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True
    ):
        assert leaf.ndim == len(names)
    assert axes["codebook"] == (None, None)
    decay = maskgit_vq.decay_mask(TINY)
    assert jax.tree.map(lambda p: p.ndim == 4, params) == decay


def test_released_configuration_has_the_released_shapes():
    config = maskgit_vq.Config(image_size=256)
    shapes = jax.eval_shape(lambda key: maskgit_vq.init(config, key), jax.random.key(0))
    assert maskgit_vq.token_spec(config).shape == (256,)
    assert shapes["codebook"].shape == (1024, 256)
    assert shapes["encoder"]["down_4_block_0"]["nin_shortcut"]["kernel"].shape == (1, 1, 512, 512)
    assert shapes["decoder"]["up_1_upsample_conv"]["kernel"].shape == (3, 3, 128, 128)


def test_a_token_outside_the_codebook_is_seen(params):
    tokens = jnp.full((1, 16), TINY.codebook_size)
    assert np.isnan(maskgit_vq.decode(TINY, params, tokens)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "multiple of 2"),
        ({"channels": 2}, "channels is 2"),
        ({"width_multipliers": ()}, "width_multipliers"),
        ({"width_multipliers": (1, 5)}, "multiple of 32"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"l1_weight": -1.0}, "l1_weight is -1.0"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_an_impossible_configuration_is_one_clear_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- objective


def test_loss_metrics_and_uint8(params):
    raw = jax.random.randint(jax.random.key(2), (2, 8, 8, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.zeros((2,), jnp.int32)
    run = jax.jit(lambda images: maskgit_vq.loss(TINY, params, {"images": images, "labels": labels}, key=None, step=0))
    loss, metrics = run(raw)
    same, _ = run(raw / 255.0)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    assert set(metrics) >= {"loss", "l1", "l2", "psnr", "codebook_usage", "perplexity"}

    images = np.asarray(raw) / 255.0
    tokens = np.asarray(maskgit_vq.encode(TINY, params, images))
    output = np.asarray(maskgit_vq.decode_unclipped(TINY, params, tokens))
    latents = np.asarray(maskgit_vq.latents(TINY, params, images)).reshape(2, 16, -1)
    distance = np.square(latents - np.asarray(params["codebook"])[tokens]).mean()
    l1, l2 = np.abs(output - images).mean(), np.square(output - images).mean()
    np.testing.assert_allclose(loss, l1 + l2 + 1.25 * distance, rtol=1e-5)
    clipped = np.square(output.clip(0, 1) - images).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["psnr"], (-10 * np.log10(clipped)).mean(), rtol=1e-5)
    shares = np.bincount(tokens.ravel(), minlength=TINY.codebook_size) / tokens.size
    np.testing.assert_allclose(metrics["codebook_usage"], (shares > 0).mean())
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    np.testing.assert_allclose(metrics["perplexity"], np.exp(entropy), rtol=1e-5)


def _gradient(config, params, images):
    def objective(params):
        return maskgit_vq.loss(config, params, {"images": images}, key=jax.random.key(0), step=0)[0]

    return jax.jit(jax.grad(objective))(params)


def test_gradient_reaches_every_leaf(params, images):
    for path, leaf in jax.tree_util.tree_leaves_with_path(_gradient(TINY, params, images)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_the_encoder_learns_from_pixels_straight_through(params, images):
    """Without the codebook terms the encoder's gradient is that of the reconstruction, and the codes have none."""
    config = dataclasses.replace(TINY, l1_weight=0.0, codebook_weight=0.0, commitment_weight=0.0)
    gradient = _gradient(config, params, images)

    tokens = maskgit_vq.encode(config, params, images)
    codes = params["codebook"][tokens]

    def by_hand(encoder):
        latents = maskgit_vq.latents(config, {**params, "encoder": encoder}, images).reshape(codes.shape)
        shifted = latents + (codes - latents_now)
        decoded = maskgit_vq._reconstruct(config, params, shifted)
        return jnp.mean(jnp.square(decoded - images))

    latents_now = maskgit_vq.latents(config, params, images).reshape(codes.shape)
    expected = jax.jit(jax.grad(by_hand))(params["encoder"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient["encoder"], expected)
    assert np.abs(gradient["encoder"]["conv_in"]["kernel"]).max() > 1e-3
    assert not np.any(gradient["codebook"])


def test_each_codebook_term_teaches_only_its_side(params, images):
    none = {"l1_weight": 0.0, "l2_weight": 0.0, "codebook_weight": 0.0, "commitment_weight": 0.0}
    codebook = _gradient(dataclasses.replace(TINY, **none | {"codebook_weight": 1.0}), params, images)
    commitment = _gradient(dataclasses.replace(TINY, **none | {"commitment_weight": 1.0}), params, images)
    assert np.any(codebook["codebook"]) and not any(np.any(x) for x in jax.tree.leaves(codebook["encoder"]))
    assert not np.any(commitment["codebook"]) and np.any(commitment["encoder"]["conv_in"]["kernel"])


# ---------------------------------------------------------------- restart


def _after_step(config, params, images, step):
    run = jax.jit(lambda p, s: maskgit_vq.after_step(config, p, {"images": images}, key=jax.random.key(3), step=s))
    return run(params, step)


def test_restart_replaces_exactly_the_unused_codes_by_latents(params, images):
    used = np.isin(np.arange(TINY.codebook_size), np.asarray(maskgit_vq.encode(TINY, params, images)))
    assert used.any() and not used.all()
    after = _after_step(TINY, params, images, 0)
    before, codes = np.asarray(params["codebook"]), np.asarray(after["codebook"])
    np.testing.assert_array_equal(codes[used], before[used])
    latents = np.asarray(maskgit_vq.latents(TINY, params, images)).reshape(-1, TINY.latent_width)
    nearest = np.abs(codes[~used][:, None] - latents[None]).max(-1)
    assert nearest.min(1).max() < 1e-5  # each new code is a latent,
    assert len(set(nearest.argmin(1))) == (~used).sum()  # and no two are the same one
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], params["encoder"])


@pytest.mark.parametrize(("step", "due"), [(0, True), (1, False), (2, True), (8, True), (9, False), (10, False)])
def test_restart_keeps_its_schedule(params, images, step, due):
    after = _after_step(TINY, params, images, step)
    assert np.any(np.asarray(after["codebook"]) != np.asarray(params["codebook"])) == due


def test_restart_can_be_off_and_copes_with_fewer_latents_than_codes(params, images):
    off = dataclasses.replace(TINY, restart_every=0)
    assert maskgit_vq.after_step(off, params, {"images": images}, key=jax.random.key(0), step=0) is params
    large = dataclasses.replace(TINY, codebook_size=100)
    params = maskgit_vq.init(large, jax.random.key(0))
    assert _after_step(large, params, images[:1], 0)["codebook"].shape == (100, TINY.latent_width)
