"""The names of ImageNet's 1000 classes, in the order of their labels (WNIDs sorted)."""

from __future__ import annotations

import functools


@functools.cache
def class_names() -> tuple[str, ...]:
    """Return the 1000 names with their synonyms ("tench, Tinca tinca"), from tensorflow_datasets' SI-Score.

    Some synonyms are not unique: "cardigan" is a dog (264) and a garment (474).
    """
    from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST

    return tuple(IMAGENET_LABELS_LIST)
