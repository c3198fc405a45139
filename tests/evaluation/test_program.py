"""The score of samples, in graph, against PNG files scored by a second implementation of everything behind them."""

import pathlib
from typing import Any, NamedTuple

import inception_numpy
import numpy as np
import pytest
from PIL import Image

from rar_jax.evaluation.image_sets import open_image_set
from rar_jax.evaluation.program import Settings, open_program
from rar_jax.evaluation.reference import read_reference
from rar_jax.evaluation.scores import make_reference, score_samples

NUM, REFERENCE_NUM = 20, 16
Features = dict[str, np.ndarray]


def distance_of_features(x_nd: np.ndarray, y_md: np.ndarray) -> float:
    """Exact for fewer images than features: no root of a singular covariance is taken (evaluation.md, numerics)."""
    n, m = len(x_nd), len(y_md)
    xc, yc = x_nd - x_nd.mean(axis=0)[None, :], y_md - y_md.mean(axis=0)[None, :]
    trace = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    spread = (xc**2).sum() / (n - 1) + (yc**2).sum() / (m - 1)
    return float(((x_nd.mean(axis=0) - y_md.mean(axis=0)) ** 2).sum() + spread - 2 * trace)


class Scored(NamedTuple):
    """What two commands gave, and the features of the images that they scored."""

    results: dict[str, dict[str, Any]]  # by "float32", "float64"
    reference: Features
    samples: Features


@pytest.fixture(scope="module")
def scored(
    released_pair: Any,
    inception_file: pathlib.Path,
    inception_state: dict[str, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> Scored:
    """Random weights; the reference is blocks of pixels, as different from the samples as photographs are from noise."""
    folder = tmp_path_factory.mktemp("scored")
    small = np.random.default_rng(0).integers(0, 256, (REFERENCE_NUM, 4, 4, 3), np.uint8)
    reference_images = small.repeat(4, axis=1).repeat(4, axis=2)
    np.savez(folder / "images.npz", arr_0=reference_images)
    results = {}
    for precision in ("float32", "float64"):
        # 20 is 8 + 8 + 4: the last batch is filled up.
        settings = Settings(seed=3, batch_size=8, chunk=20, neighbours=False, features=precision)
        path = folder / f"reference_{precision}.npz"
        whole = Settings(batch_size=REFERENCE_NUM, features=precision)
        made = make_reference(
            open_program(inception_file, whole), open_image_set(str(folder / "images.npz")), path, quiet=True
        )
        assert made["n"] == made["images_kept"] == REFERENCE_NUM
        results[precision] = score_samples(
            open_program(inception_file, settings, reference_path=path), str(released_pair.generator),
            folder / precision, samples=NUM, tokenizer=str(released_pair.tokenizer), samples_npz=True, quiet=True,
        )  # fmt: skip
    images = []
    for precision in results:
        (folder / f"png_{precision}").mkdir()
        with np.load(folder / precision / "samples.npz") as file:
            for i, image in enumerate(file["arr_0"]):
                Image.fromarray(image).save(folder / f"png_{precision}" / f"{i:03}.png")
        paths = sorted((folder / f"png_{precision}").glob("*.png"))
        images.append(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))
    np.testing.assert_array_equal(images[0], images[1], "the mode of the features changed what is drawn")
    return Scored(
        results,
        inception_numpy.features(inception_state, reference_images),
        inception_numpy.features(inception_state, images[0]),
    )


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("float64", 1e-6)])
def test_distances_are_those_of_png_files(scored: Scored, precision: str, bound: float, parity: Any) -> None:
    for name, features in (("fid", "pool3"), ("sfid", "spatial")):
        ours = scored.results[precision][name]
        theirs = distance_of_features(scored.reference[features], scored.samples[features])
        assert theirs > 1, "the two sets are too alike to tell"
        parity.check(f"end to end, {name} of {precision} sums against PNG files", abs(ours - theirs) / theirs, bound)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_inception_score_is_that_of_png_files(scored: Scored, precision: str, bound: float, parity: Any) -> None:
    logits = scored.samples["logits"] - scored.samples["logits"].max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    information = p * (np.log(p + 1e-300) - np.log(p.mean(axis=0) + 1e-300)[None, :])
    theirs = np.exp(information.sum(axis=1).mean())
    ours = scored.results[precision]["inception_score"]
    parity.check(
        f"end to end, Inception Score of {precision} sums against PNG files", abs(ours - theirs) / theirs, bound
    )


def test_the_record_names_what_it_was_made_of(scored: Scored) -> None:
    for precision, result in scored.results.items():
        path = pathlib.Path(result["reference"])
        reference = read_reference(path)
        assert (reference.n, reference.protocol) == (REFERENCE_NUM, "adm")
        assert result["made_from"]["reference_sha256"] == reference.sha256
        assert (result["n"], result["made_from"]["features"]) == (NUM, precision)


def test_the_second_implementation_is_that_of_the_golden_features(
    inception_state: dict[str, np.ndarray], golden: pathlib.Path
) -> None:
    """It was not made from ours: torch-fidelity's network gave the golden numbers."""
    known = np.load(golden / "inception" / "inception_features.npz")
    ours = inception_numpy.features(inception_state, known["images_nchw_64"][:1].transpose(0, 2, 3, 1))
    for name, expected in (("pool3", "pool3"), ("spatial", "spatial"), ("logits", "logits_unbiased")):
        expected = known[f"{expected}_f64_64"][:1]
        assert np.abs(ours[name] - expected).max() < 1e-9 * np.abs(expected).max(), name
