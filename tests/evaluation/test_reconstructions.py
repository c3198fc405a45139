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
from rar_jax.evaluation.image_sets import open_image_set
from rar_jax.evaluation.program import Settings, open_program
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
    arguments = str(released_pair.tokenizer), open_image_set(str(tmp_path / "png")), out
    program = open_program(pathlib.Path("inception"), SETTINGS)
    result = score_reconstructions(program, *arguments, quiet=True)

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
    make_reference(program, open_image_set(str(tmp_path / "images.npz")), path, quiet=True)
    with_reference = open_program(pathlib.Path("inception"), SETTINGS, reference_path=path)
    compared = score_reconstructions(with_reference, *arguments, quiet=True)
    assert compared["rfid"] == pytest.approx(result["rfid"], rel=1e-5)
    assert compared["made_from"]["reference_sha256"] and not result["made_from"]["reference_sha256"]
    again = score_reconstructions(program, *arguments, quiet=True)
    assert [again[k] for k in ("rfid", "psnr", "ssim")] == [result[k] for k in ("rfid", "psnr", "ssim")]


@pytest.mark.usefixtures("cheap")
def test_images_of_another_size_are_refused(released_pair: Any, tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((3, 20, 20, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"has images \[20, 20, 3\], the tokenizer takes \[16, 16, 3\]"):
        program, images = open_program(pathlib.Path("i"), SETTINGS), open_image_set(str(tmp_path / "large.npz"))
        score_reconstructions(program, str(released_pair.tokenizer), images, tmp_path)


@pytest.mark.usefixtures("cheap", "images")
def test_a_reference_of_another_protocol_is_refused(tmp_path: pathlib.Path) -> None:
    path, other = tmp_path / "reference.npz", Settings(protocol="pytorch_fid", batch_size=8)
    program, images = open_program(pathlib.Path("i"), other), open_image_set(str(tmp_path / "images.npz"))
    make_reference(program, images, path, quiet=True)
    with pytest.raises(ConfigError, match="was made with protocol pytorch_fid, not adm: they do not compare"):
        open_program(pathlib.Path("i"), SETTINGS, reference_path=path)


@pytest.mark.usefixtures("cheap")
def test_the_command(
    released_pair: Any,
    images: np.ndarray,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["evaluate", "--reconstruction", "--inception", "i", "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*command, "--images", str(tmp_path / "png")]) == 2
    assert "--reconstruction needs a tokenizer" in capsys.readouterr().err
    arguments = ["--images", str(tmp_path / "png"), "--tokenizer", str(released_pair.tokenizer)]
    assert cli.main([*command, *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("rfid", "psnr", "ssim", "codebook_usage", "perplexity", "n 30"))
    encode = maskgit_vq.encode
    with monkeypatch.context() as patch:
        patch.setattr(maskgit_vq, "encode", lambda *args: jnp.where(encode(*args) == 3, 32, encode(*args)))
        assert cli.main([*command, *arguments, "--out", str(tmp_path / "other")]) == 1
    tokens = encode(*interop.load(released_pair.tokenizer), images)
    expected = int((np.asarray(tokens) == 3).any(axis=1).sum())
    assert f"{expected} of 30 images have non-finite pixels" in capsys.readouterr().err and expected > 0
    files = ImageFiles()
    files.write_folder(tmp_path / "data" / "train", files.image_set())
    files.write_folder(tmp_path / "data" / "val", files.image_set((1, 0, 0)))
    arguments = ["--images", f"folder:{tmp_path}/data", "--tokenizer", str(released_pair.tokenizer)]
    assert cli.main([*command, *arguments, "--image-size", "16"]) == 0
    assert "n 18" in capsys.readouterr().out
    assert cli.main([*command, *arguments, "--image-size", "20"]) == 2
    assert "the tokenizer takes [16, 16, 3]" in capsys.readouterr().err
