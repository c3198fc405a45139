import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.metrics.reconstruction import compare_images, psnr, ssim

_reconstruction = jax.jit(compare_images)


def _images() -> tuple[np.ndarray, np.ndarray]:
    """Two pairs: noise of full contrast, and a bright image of little contrast."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    a[1] = a[1] // 16 + 235
    b = np.clip(a.astype(int) + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    return a, b


def _ssim64(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 13 of Wang et al. window by window, in float64, of images (y, x, c)."""
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(axis, axis) / axis.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            for c in range(a.shape[2]):
                p, q = (image[y : y + 11, x : x + 11, c].astype(np.float64) for image in (a, b))
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_equals_scikit_image() -> None:
    # scikit-image 0.26.0 on these images: structural_similarity(gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, channel_axis=-1, data_range=255) and peak_signal_noise_ratio(data_range=255).
    result = _reconstruction(*(jnp.asarray(x) for x in _images()))
    assert result["ssim"].shape == result["psnr"].shape == (2,)
    assert result["ssim"].dtype == result["psnr"].dtype == jnp.float32
    np.testing.assert_allclose(result["ssim"], [0.9617820541959086, 0.2454859103129895], atol=2e-6)
    np.testing.assert_allclose(result["psnr"], [21.291660132439397, 22.762644566662154], atol=2e-5)


def test_equals_numpy_window_by_window() -> None:
    a, b = _images()
    a, b = a[:, :13, :14].copy(), b[:, :13, :14].copy()
    # A bright sky: moments that are not taken about the image's mean lose 1e-4 here.
    a[1] = 253
    b[1] = a[1] + b[1] % 3 - 1
    expected = [_ssim64(*pair) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(_reconstruction(jnp.asarray(a), jnp.asarray(b))["ssim"], expected, atol=2e-6)


def test_data_range_is_a_unit() -> None:
    a, b = (jnp.asarray(x) for x in _images())
    whole, unit = compare_images(a, b), (a / 255.0, b / 255.0)
    np.testing.assert_allclose(ssim(*unit, data_range=1.0), whole["ssim"], atol=1e-5)
    np.testing.assert_allclose(psnr(*unit, data_range=1.0), whole["psnr"], atol=1e-4)


def test_an_image_and_itself() -> None:
    image = jnp.asarray(_images()[0])
    result = _reconstruction(image, image)
    np.testing.assert_allclose(result["ssim"], 1.0, atol=1e-6)
    assert np.all(np.isposinf(result["psnr"]))


def test_known_values() -> None:
    flat = jnp.full((1, 11, 12, 1), 100, jnp.uint8)
    result = compare_images(flat, flat + 10)
    assert result["psnr"] == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    # Without variance only the luminance term is left.
    assert result["ssim"] == pytest.approx((2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025), abs=1e-5)


def test_each_image_by_itself() -> None:
    a, b = (jnp.asarray(x) for x in _images())
    together = compare_images(a, b)
    for i in range(2):
        alone = compare_images(a[i : i + 1], b[i : i + 1])
        for key in ("psnr", "ssim"):
            np.testing.assert_allclose(together[key][i], alone[key][0], atol=1e-5)


def test_bad_arguments_are_named() -> None:
    image = jnp.zeros((1, 12, 12, 3), jnp.uint8)
    with pytest.raises(ValueError, match="images are uint8 and float32: both must be uint8"):
        compare_images(image, image.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"images are \(1, 12, 12, 3\) and \(1, 12, 12, 1\)"):
        compare_images(image, image[..., :1])
    small = image[:, :10]
    with pytest.raises(ValueError, match="10 x 12 pixels are smaller than SSIM's window, 11"):
        ssim(small, small, data_range=255.0)
    assert compare_images(small, small).keys() == {"psnr"} and compare_images(image, image).keys() == {"psnr", "ssim"}
