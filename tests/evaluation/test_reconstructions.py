"""What a tokenizer keeps of images: against its own encode and decode, SciPy-free NumPy for every number."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from image_files import ImageFiles
from PIL import Image

from rar_jax import cli
from rar_jax.errors import ConfigError
from rar_jax.evaluation.program import Settings
from rar_jax.evaluation.reconstructions import score_reconstructions
from rar_jax.evaluation.scores import make_reference
from rar_jax.metrics import frechet
from rar_jax.tokenizers import maskgit_vq
from rar_jax.weights import maskgit_vq as interop

SETTINGS = Settings(batch_size=8, chunk=20)


@pytest.fixture
def images(tmp_path: pathlib.Path) -> np.ndarray:
    """30 smooth images as PNG files in `tmp_path`/png and in an .npz."""
    small = np.random.default_rng(1).integers(0, 256, (30, 4, 4, 3), np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)
    np.savez(tmp_path / "images.npz", arr_0=images)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:02}.png")
    return images


def test_numbers_by_hand(cheap: Any, released_pair: Any, images: np.ndarray, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    arguments = str(released_pair.tokenizer), str(tmp_path / "png"), pathlib.Path("inception"), out
    result = score_reconstructions(*arguments, settings=SETTINGS, quiet=True)

    config, params = interop.load(released_pair.tokenizer)
    tokens = np.asarray(maskgit_vq.encode(config, params, jnp.asarray(images)))
    decoded = np.asarray(maskgit_vq.decode(config, params, jnp.asarray(tokens)))
    theirs = (decoded * 255).astype(np.uint8)
    error = ((theirs / 255.0 - images / 255.0) ** 2).mean(axis=(1, 2, 3))
    assert result["psnr"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-4)
    p = np.bincount(tokens.reshape(-1), minlength=32) / tokens.size
    assert result["codebook_usage"] == (p > 0).mean()
    assert result["perplexity"] == pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-12)
    a, b = (np.asarray(cheap(None, x, resize="tf1")["pool3"], np.float64) for x in (images, theirs))
    gaussians = [x for y in (a, b) for x in (y.mean(axis=0), np.cov(y, rowvar=False))]
    assert result["rfid"] == pytest.approx(frechet.frechet_distance(*gaussians), rel=1e-4)
    assert 0 < result["ssim"] < 1 and result["n"] == 30
    assert "rfid is to the images themselves" in result["remarks"]

    # The same statistics from a file, and from where it was stopped.
    path = tmp_path / "reference.npz"
    make_reference(str(tmp_path / "images.npz"), pathlib.Path("i"), path, settings=SETTINGS, quiet=True)
    compared = score_reconstructions(*arguments, settings=SETTINGS, reference_path=path, quiet=True)
    assert compared["rfid"] == pytest.approx(result["rfid"], rel=1e-5)
    assert compared["made_from"]["reference_sha256"] and not result["made_from"]["reference_sha256"]
    again = score_reconstructions(*arguments, settings=SETTINGS, quiet=True)
    assert [again[k] for k in ("rfid", "psnr", "ssim")] == [result[k] for k in ("rfid", "psnr", "ssim")]


@pytest.mark.usefixtures("cheap")
def test_images_of_another_size_are_refused(released_pair: Any, tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((3, 20, 20, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"has images \[20, 20, 3\], the tokenizer takes \[16, 16, 3\]"):
        score_reconstructions(
            str(released_pair.tokenizer), str(tmp_path / "large.npz"), pathlib.Path("i"), tmp_path, settings=SETTINGS
        )


@pytest.mark.usefixtures("cheap", "images")
def test_a_reference_of_another_protocol_is_refused(released_pair: Any, tmp_path: pathlib.Path) -> None:
    path, other = tmp_path / "reference.npz", Settings(protocol="pytorch_fid", batch_size=8)
    make_reference(str(tmp_path / "images.npz"), pathlib.Path("i"), path, settings=other, quiet=True)
    with pytest.raises(ConfigError, match="was made with protocol pytorch_fid, not adm: they do not compare"):
        score_reconstructions(
            str(released_pair.tokenizer), str(tmp_path / "images.npz"), pathlib.Path("i"), tmp_path / "out",
            settings=SETTINGS, reference_path=path,
        )  # fmt: skip


@pytest.mark.usefixtures("cheap")
def test_the_command(
    released_pair: Any, images: np.ndarray, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--reconstruction", "--inception", "i", "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*command, "--images", str(tmp_path / "png")]) == 2
    assert "--reconstruction needs a tokenizer" in capsys.readouterr().err
    arguments = ["--images", str(tmp_path / "png"), "--tokenizer", str(released_pair.tokenizer)]
    assert cli.main([*command, *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("rfid", "psnr", "ssim", "codebook_usage", "perplexity", "n 30"))
    files = ImageFiles()
    files.write_folder(tmp_path / "data" / "train", files.image_set())
    files.write_folder(tmp_path / "data" / "val", files.image_set((1, 0, 0)))
    arguments = ["--images", f"folder:{tmp_path}/data", "--tokenizer", str(released_pair.tokenizer)]
    assert cli.main([*command, *arguments, "--image-size", "16"]) == 0
    assert "n 18" in capsys.readouterr().out
    assert cli.main([*command, *arguments, "--image-size", "20"]) == 2
    assert "the tokenizer takes [16, 16, 3]" in capsys.readouterr().err
