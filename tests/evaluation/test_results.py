"""What must be known with the numbers."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from rar_jax.evaluation.image_batches import ImageBatches
from rar_jax.evaluation.image_sets import NpzImages
from rar_jax.evaluation.program import Network, Program, Settings
from rar_jax.evaluation.reference import Reference
from rar_jax.evaluation.results import make_remarks
from rar_jax.parallel.mesh import MeshConfig, make_mesh

REFERENCE = Reference(pathlib.Path("r"), "", np.zeros(2048), np.eye(1), None, None, None)


def remarks(
    n: int, classes: int | None, reference: Reference | None, shape: tuple[int, ...] = (64, 64, 3)
) -> list[str]:
    made: Any = None
    batches = ImageBatches(n, shape, made, made, params=None, made_from={}, classes=classes)
    return make_remarks(Program(Network(None, "sha"), make_mesh(MeshConfig()), Settings(), reference), batches)


def test_remarks(tmp_path: pathlib.Path) -> None:
    def reference(**changes: Any) -> Reference:
        return dataclasses.replace(REFERENCE, **changes)

    assert remarks(50_000, 1000, reference(n=10_000)) == [] == remarks(2048, None, None)
    assert remarks(50_000, 1000, reference()) == []
    np.savez(tmp_path / "r.npz", arr_0=np.zeros((2, 256, 256, 3), np.uint8))
    with_images = reference(images=NpzImages(tmp_path / "r.npz"))
    assert remarks(50_000, 1000, with_images, (256, 256, 3)) == []
    (sizes,) = remarks(50_000, 1000, with_images, (64, 256, 3))
    assert sizes.startswith("the reference's images have 256 x 256 pixels, these 64 x 256, which changes the distance")
    (small,) = remarks(2047, None, None)
    assert small.startswith("n is 2047, below 2048: the covariance is singular")
    (uneven,) = remarks(2500, 1000, None)
    assert uneven == "n is 2500, not a multiple of the 1000 classes: some have more samples than others"
    (other,) = remarks(50_000, 1000, reference(n=2000))
    assert other.startswith("the reference is of 2000 images, below 2048")
    assert len(remarks(15, 10, reference(n=3))) == 3
    (weights,) = remarks(50_000, 1000, reference(weights_sha256="other"))
    assert weights.startswith("the reference was made with another file of Inception's weights")
