"""The command with something wrong in it: a loss that some batches make NaN, or a function that takes minutes where it took moments."""

from __future__ import annotations

import importlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rar_jax.data.loader import batches
from rar_jax.data.sources import load_source
from rar_jax.networks import classifier


def poison(numbers: tuple[int, ...], patch: Callable[[Any, str, Any], None] = setattr, factor: float = np.nan) -> None:
    """From now on the loss of the first row of these batches (the first is 1) is NaN, or so many times itself; that row lies on one
    device."""
    stream = batches(load_source("digits", "train", image_size=8, channels=1), global_batch=64, seed=0, start_step=0)
    sums = [int(np.asarray(next(stream)["images"], np.int64).sum()) for _ in range(max(numbers))]
    bad, real = np.array([sums[k - 1] for k in numbers]), classifier.loss  # JAX may not have begun yet

    def loss(config: Any, params: Any, batch: Any, *, train: bool, **given: Any) -> Any:
        value, aux = real(config, params, batch, train=train, **given)
        found = (batch["images"].astype(jnp.int32).sum() == bad).any() & train
        rows = jnp.where(found & (jnp.arange(len(batch["labels"])) == 0), factor, 1.0)
        value = rows.mean() * value
        return value, aux._replace(metrics=aux.metrics | {"loss": value})

    patch(classifier, "loss", loss)


def stuck(marker: pathlib.Path, owner: str, name: str, *, after: bool = False) -> None:
    """From now on a function of a module, or of `module:Class`, takes 5 minutes when it is called, before its work or after it; the
    marker is there once it has come to that."""
    holder, real = _found(owner, name)

    def call(*args: Any, **rest: Any) -> Any:
        out = real(*args, **rest) if after else None
        marker.touch()
        time.sleep(300)
        return out if after else real(*args, **rest)

    setattr(holder, name, call)


def slow(owner: str, name: str, seconds: float) -> None:
    """From now on a function takes so much longer, so that there is time to stop what calls it, however fast the machine."""
    holder, real = _found(owner, name)

    def call(*args: Any, **rest: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **rest)

    setattr(holder, name, call)


def _found(owner: str, name: str) -> tuple[Any, Any]:
    module, _, kind = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, kind) if kind else holder
    return holder, getattr(holder, name)


def endless(marker: pathlib.Path, *, validation: bool = False) -> None:
    """From now on the compilation of the training step, or of the validation, takes 5 minutes; the marker is there once it has begun."""
    real = classifier.loss

    def loss(config: Any, params: Any, batch: Any, *, train: bool, **given: Any) -> Any:
        if train != validation:
            marker.touch()
            time.sleep(300)
        return real(config, params, batch, train=train, **given)

    classifier.loss = loss
