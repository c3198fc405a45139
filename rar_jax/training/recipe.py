"""How something is trained: the numbers, the optimizer and its schedule."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from rar_jax.config import Steps, require


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training. The defaults are RAR's (arXiv 2411.00776, section 4.1) where it has one.

    Durations are whole numbers of updates, or in an experiment epochs ("400ep") or a share of the training ("5%").

    steps: updates. batch_size: global. accumulation: each batch is computed in so many parts.
    learning_rate, end_learning_rate: reached after `warmup` updates from 0, and at the end of a cosine (`schedule`). beta1, beta2, eps,
    weight_decay: AdamW's (decay is learning_rate * weight_decay * parameter where the model's mask says so). clip_norm: the
    largest global norm of a gradient. log_every, eval_every, checkpoint_every: updates between two rows, validations, saves.
    ema_decay: of the parameters that are evaluated and sampled; 0 is none. After k updates at most (1 + k) / (10 + k), so that a
    short training does not average over its random start. eval_records: held-out records a validation. keep_checkpoints: the newest
    ones. verify_saves: each is read again from the disk, and a difference stops the training. keep_best: also the
    one with the best live distance (where none is measured, the lowest held-out loss).
    spike_sigmas: an update is left out if its loss or gradient norm is so many standard deviations above the mean of the last 128
    (guard.py), 0: only if it is not finite. most_skips: after so many in a row the training goes back to its last good checkpoint
    and passes over the batches in between; most_rewinds: so often, and then it stops with a dump.

    Raises: ConfigError for numbers that cannot be.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    learning_rate: float = 4e-4
    end_learning_rate: float = 1e-5
    warmup: Steps = 0
    beta1: float = 0.9
    beta2: float = 0.96
    eps: float = 1e-8
    weight_decay: float = 0.03
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    log_every: Steps = 10
    eval_every: Steps = 1000
    eval_records: int = 1024
    checkpoint_every: Steps = 1000
    keep_checkpoints: int = 2
    verify_saves: bool = False
    keep_best: bool = False
    spike_sigmas: float = 10.0
    most_skips: int = 10
    most_rewinds: int = 2

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "eval_records",
            "most_skips",
        ):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}",
        )
        require(
            self.warmup < self.steps, f"warmup is {self.warmup} steps, not shorter than the training of {self.steps}"
        )
        for name in ("end_learning_rate", "weight_decay", "spike_sigmas", "most_rewinds"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: it cannot be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        require(self.eps > 0, f"eps is {self.eps}: it must be above 0")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}: it must be above 0")
        require(self.clip_norm > 0, f"clip_norm is {self.clip_norm}: it must be above 0")
        require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}: it must be in [0, 1)")
        require(
            self.keep_checkpoints >= 2,
            f"keep_checkpoints is {self.keep_checkpoints}: at least 2, so that one good step stays while another is written",
        )


def schedule(recipe: Recipe) -> optax.Schedule:
    """Learning rate of update k (0-based): linear from 0 over the warm-up, then a cosine to the end value."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if recipe.warmup else recipe.learning_rate,
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        decay_steps=recipe.steps,
        end_value=recipe.end_learning_rate,
    )


def optimizer(recipe: Recipe, decay_mask: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled decay (lr * wd * p) where the mask is True."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(
            schedule(recipe),
            b1=recipe.beta1,
            b2=recipe.beta2,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            mask=decay_mask,
        ),
    )
