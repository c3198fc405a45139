"""The score of samples, in graph, against PNG files scored by a plain loop and an exact distance."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rar_jax.evaluation import frechet, sums
from rar_jax.evaluation.features import features
from rar_jax.evaluation.reference import read_reference
from rar_jax.interop import inception
from rar_jax.programs import evaluate
from rar_jax.programs.scoring import Settings

SETTINGS = Settings(seed=3, batch_size=8, chunk=20)  # 20 is 8 + 8 + 4: the last batch of a chunk is filled up
NUM, REFERENCE_NUM = 40, 30


# ---------------------------------------------------------------- end to end, with Inception


def in_plain_loop(params: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Features, 10 images at a time on one device, float64."""
    step = jax.jit(features)
    parts = [jax.device_get(step(params, jnp.asarray(images[i : i + 10]))) for i in range(0, len(images), 10)]
    return {key: np.concatenate([p[key] for p in parts]).astype(np.float64) for key in parts[0]}


def distance_of_features(x_nd: np.ndarray, y_md: np.ndarray) -> float:
    """Exact for fewer images than features: no root of a singular covariance is taken (evaluation.md, numerics)."""
    n, m = len(x_nd), len(y_md)
    xc, yc = x_nd - x_nd.mean(axis=0)[None, :], y_md - y_md.mean(axis=0)[None, :]
    trace = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    spread = (xc**2).sum() / (n - 1) + (yc**2).sum() / (m - 1)
    return float(((x_nd.mean(axis=0) - y_md.mean(axis=0)) ** 2).sum() + spread - 2 * trace)


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True, reason="measured 1.3e-5 of the FID at n = 40; not mended yet (float32 sums of a singular covariance?)"
)
def test_scores_in_graph_are_those_of_png_files(
    released_pair: Any,
    inception_file: pathlib.Path,
    parity: Any,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pictures through files, the network in a plain loop, moments and distance by NumPy: nothing of the in-graph program."""
    # Blocks of 4 x 4 pixels: as different from the samples as photographs are from noise.
    small = np.random.default_rng(0).integers(0, 256, (REFERENCE_NUM, 4, 4, 3), np.uint8)
    theirs_images = small.repeat(4, axis=1).repeat(4, axis=2)
    np.savez(tmp_path / "images.npz", arr_0=theirs_images)
    made = evaluate.reference_of(
        str(tmp_path / "images.npz"), inception_file, tmp_path / "reference.npz", settings=SETTINGS, quiet=True
    )
    assert made["n"] == made["images_kept"] == REFERENCE_NUM

    # One distance of such width is 10 s: the other two have their own tests, here only what they are given is looked at.
    given: dict[str, tuple[np.ndarray, ...]] = {}
    distance = frechet.distance

    def only_fid(*moments: Any) -> float:
        given["fid" if len(moments[0]) == sums.POOL3 else "sfid"] = moments
        return distance(*moments) if len(moments[0]) == sums.POOL3 else 0.0

    monkeypatch.setattr(frechet, "distance", only_fid)
    monkeypatch.setattr(frechet, "distance_in_graph", lambda *moments: jnp.zeros(()))
    settings = Settings(seed=3, batch_size=8, chunk=20, neighbours=False)
    result = evaluate.score_samples(
        str(released_pair.generator), inception_file, tmp_path / "out", samples=NUM, settings=settings,
        reference_path=tmp_path / "reference.npz", tokenizer=str(released_pair.tokenizer), samples_npz=True,
        quiet=True,
    )  # fmt: skip

    # The very images that were scored: another program may truncate a pixel to the level below, and random weights amplify it.
    (tmp_path / "png").mkdir()
    with np.load(tmp_path / "out" / "samples.npz") as file:
        for i, image in enumerate(file["arr_0"]):
            Image.fromarray(image).save(tmp_path / "png" / f"{i:03}.png")
    paths = sorted((tmp_path / "png").glob("*.png"))
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    params = inception.load(inception_file)
    theirs, ours = in_plain_loop(params, theirs_images), in_plain_loop(params, pictures)

    fid = distance_of_features(theirs["pool3"], ours["pool3"])
    difference = abs(result["fid"] - fid)
    print(f"fid {fid}, in graph {result['fid']}")
    parity.check("end to end, in-graph FID against PNG files, over the FID", difference / fid, 1e-5)
    assert difference <= max(1e-3, 1e-5 * fid) and fid > 1
    for key, name in (("pool3", "fid"), ("spatial", "sfid")):
        for (mean, cov), x_nd in zip((given[name][:2], given[name][2:]), (theirs[key], ours[key]), strict=True):
            expected_cov = np.cov(x_nd, rowvar=False)
            assert np.abs(mean - x_nd.mean(axis=0)).max() < 1e-4 * np.abs(x_nd).max(), name
            assert np.abs(cov - expected_cov).max() < 1e-3 * np.abs(expected_cov).max(), name
    logits = ours["logits"] - ours["logits"].max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    information = p * (np.log(p + 1e-300) - np.log(p.mean(axis=0) + 1e-300)[None, :])
    assert result["inception_score"] == pytest.approx(np.exp(information.sum(axis=1).mean()), rel=1e-5)
    reference = read_reference(tmp_path / "reference.npz")
    assert (reference.n, reference.protocol) == (REFERENCE_NUM, "adm")
    assert result["made_from"]["reference_sha256"] == reference.sha256 and result["n"] == NUM
