"""The tiny classifier's loss, made NaN by some batches, wherever and whenever they come; or one that takes minutes to compile."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rar_jax.data.loader import batches
from rar_jax.data.sources import load_source
from rar_jax.evaluation import classifier


def poison(numbers: tuple[int, ...], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on the loss of the first row of these batches (the first is 1) is NaN; that row lies on one device."""
    stream = batches(load_source("digits", "train", image_size=8, channels=1), global_batch=64, seed=0, start_step=0)
    sums = [int(np.asarray(next(stream)["images"], np.int64).sum()) for _ in range(max(numbers))]
    bad, real = jnp.array([sums[k - 1] for k in numbers]), classifier.loss

    def loss(config: Any, params: Any, batch: Any, *, key: Any, step: Any) -> Any:
        value, metrics = real(config, params, batch, key=key, step=step)
        found = (batch["images"].astype(jnp.int32).sum() == bad).any() & (key is not None)
        rows = jnp.where(found & (jnp.arange(len(batch["labels"])) == 0), jnp.nan, 1.0)
        value = rows.mean() * value
        return value, metrics | {"loss": value}

    patch(classifier, "loss", loss)


def endless(marker: pathlib.Path) -> None:
    """From now on the compilation of the training step takes 5 minutes; the marker is there once it has begun."""
    real = classifier.loss

    def loss(config: Any, params: Any, batch: Any, *, key: Any, step: Any) -> Any:
        if key is not None:
            marker.touch()
            time.sleep(300)
        return real(config, params, batch, key=key, step=step)

    classifier.loss = loss
