"""What must be known with the numbers."""

import dataclasses
import pathlib

import numpy as np

from rar_jax.evaluation.image_sets import NpzImages
from rar_jax.evaluation.reference import Reference
from rar_jax.evaluation.results import make_remarks


def test_remarks(tmp_path: pathlib.Path) -> None:
    def reference(n: int | None) -> Reference:
        return Reference(pathlib.Path("r"), "", np.zeros(1), np.eye(1), None, None, None, n, None, None, None)

    assert make_remarks(50_000, 1000, reference(10_000), "sha") == [] == make_remarks(2048, None, None, "sha")
    assert make_remarks(50_000, 1000, reference(None), "sha") == []
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((2, 256, 256, 3), np.uint8))
    with_images = dataclasses.replace(reference(None), images=NpzImages(tmp_path / "r.npz"))
    assert make_remarks(50_000, 1000, with_images, "sha", (256, 256)) == []
    (sizes,) = make_remarks(50_000, 1000, with_images, "sha", (64, 256))
    assert sizes.startswith(
        "the reference's images have 256 x 256 pixels, these 64 x 256, which changes the distance: rar-jax"
    )
    (small,) = make_remarks(2047, None, None, "sha")
    assert small.startswith("n is 2047, below 2048: the covariance is singular")
    (uneven,) = make_remarks(2500, 1000, None, "sha")
    assert uneven == "n is 2500, not a multiple of the 1000 classes: some have more samples than others"
    (other,) = make_remarks(50_000, 1000, reference(2000), "sha")
    assert other.startswith("the reference is of 2000 images, below 2048")
    assert len(make_remarks(15, 10, reference(3), "sha")) == 3
    made_with_another = Reference(
        pathlib.Path("r"), "", np.zeros(1), np.eye(1), None, None, None, None, None, "other", None
    )
    (weights,) = make_remarks(50_000, 1000, made_with_another, "sha")
    assert weights.startswith("the reference was made with another file of Inception's weights")
