"""The sections of an experiment file that belong to no model: data, training recipes and evaluation."""

from __future__ import annotations

import dataclasses

from rar_jax.config import Steps, require
from rar_jax.data.image_source import Split, View
from rar_jax.data.mixing import period_shares


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what they are.

    source: as `data.sources.load_source` takes it: "digits", "tfds:NAME", "folder:PATH", ... image_size: what images
    are padded or cropped to; channels: 1 (grey) or 3. workers: processes that decode images or read tokens, 0 is a thread. crop: "pad", "center", "ten" or "random"; default, the source's own. What is held out is
    cropped at the centre where training images are at random.
    num_classes, train_records: left out or None, as many as the source has (`resolve` counts them). train_records:
    images of an epoch (with ten crops, too); checked against the source. class_names: default, the source's if
    num_classes is left out, else the numbers; "imagenet" stands for its 1000 names.
    on_the_fly: the generator is trained on images, which the training step encodes, and not on tokens that were made
    before: slower steps, but nothing to store, and crops may be "random". Otherwise the same training, but for images
    that cannot be decoded: those are replaced by others of their class, where a token store leaves them out.
    tokens, tokens_heldout: token stores made elsewhere, used instead of the work directory's; mix: several for training,
    each with its weight (("DIR1", 0.7), ("DIR2", 0.3)).
    """

    source: str
    image_size: int
    channels: int
    num_classes: int
    train_records: int
    class_names: tuple[str, ...] = ()
    workers: int = 0
    crop: str | None = None
    on_the_fly: bool = False
    tokens: str | None = None
    tokens_heldout: str | None = None
    mix: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        View(crop=self.crop)
        for name in ("image_size", "num_classes", "train_records"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(self.workers >= 0, f"workers is {self.workers}: it must be 0 (a thread) or more (processes)")
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(i) for i in range(self.num_classes)))
        require(
            len(self.class_names) == self.num_classes,
            f"class_names has {len(self.class_names)} names for {self.num_classes} classes",
        )
        require(not (self.tokens and self.mix), "tokens and mix both say what to train on: give one of them")
        for name in ("tokens", "tokens_heldout", "mix"):
            require(
                not (self.on_the_fly and getattr(self, name)),
                f"on_the_fly trains on images, {name} on tokens: give one of them",
            )
        if self.mix:
            period_shares([weight for _, weight in self.mix])

    def given_tokens(self, split: Split) -> tuple[tuple[str, float], ...]:
        """The token stores that are given for a split, with their weights; none where the images are tokenized."""
        if split == "train" and self.mix:
            return self.mix
        folder = self.tokens if split == "train" else self.tokens_heldout
        return ((folder, 1.0),) if folder else ()


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """samples: images of the final report. live_samples: of the distance while training; 0 is none.
    live_grid: pictures a class drawn at each evaluation while training, for `rar-jax report`; 0 is none.
    batch_size: images at a time. grid_per_class: pictures a class in samples.png, of grid_classes classes.
    inception: file of Inception's weights, for curves of the Inception Score and, against the statistics in `reference`,
    of the FID; they also give the final report."""

    samples: int = 1000
    live_samples: int = 200
    live_grid: int = 4
    batch_size: int = 200
    grid_per_class: int = 10
    grid_classes: int = 10
    inception: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "grid_per_class", "grid_classes"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(
            self.reference is None or self.inception is not None,
            "reference needs inception: the weights whose features it holds statistics of",
        )
        require(self.live_grid >= 0, f"live_grid is {self.live_grid}: it must be at least 0 (none)")
        require(self.samples >= 2, f"samples is {self.samples}: a distance needs at least 2")
        require(
            self.live_samples == 0 or self.live_samples >= 2, f"live_samples is {self.live_samples}: 0, or at least 2"
        )


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
    (guard.py), 0: only if it is not finite. max_consecutive_skips: after so many, training rolls back to its last good
    checkpoint and skips the batches in between. max_rollbacks: after so many, it stops with a dump.

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
    max_consecutive_skips: int = 10
    max_rollbacks: int = 2

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "eval_records",
            "max_consecutive_skips",
        ):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}",
        )
        require(
            self.warmup < self.steps, f"warmup is {self.warmup} steps, not shorter than the training of {self.steps}"
        )
        for name in ("end_learning_rate", "weight_decay", "spike_sigmas", "max_rollbacks"):
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
