"""The names of ImageNet's 1000 classes, in the order of their labels."""

from __future__ import annotations

import functools


@functools.cache
def class_names() -> tuple[str, ...]:
    """Return the names with synonyms ("tench, Tinca tinca"), of TFDS's SI-Score.

    Some synonyms are not unique: "cardigan" is a dog (264) and a garment (474).
    """
    from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST

    return tuple(IMAGENET_LABELS_LIST)
