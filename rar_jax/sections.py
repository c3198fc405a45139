"""The sections of an experiment that belong to no model: data, training recipes, evaluation."""

from __future__ import annotations

import dataclasses

from rar_jax.config import Steps, require, require_at_least
from rar_jax.data.image_source import Split, View
from rar_jax.data.mixing import period_shares


@dataclasses.dataclass(frozen=True)
class Data:
    """Images or tokens to train on.

    Attributes:
      source: images, as `data.sources.load_source` takes them: "digits", "tfds:NAME", "folder:PATH", ...
      image_size, channels: images are padded or cropped to this size; 1 (grey) or 3 channels.
      num_classes, train_records: counted in the source if omitted. Epochs are counted in train_records.
      class_names: default, the source's names if num_classes is omitted, else numbers; "imagenet" gives its 1000 names.
      workers: processes that decode images or read tokens; 0 is a thread.
      crop: "pad", "center", "ten" or "random"; default, the source's own. Validation replaces "random" by "center".
      on_the_fly: encode images in the training step instead of storing tokens. Slower, but "random" crops are possible.
      tokens, tokens_heldout: token stores to use instead of the work directory's.
      mix: several stores for training with weights, (("DIR1", 0.7), ("DIR2", 0.3)).
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
        require_at_least(self, 1, "image_size", "num_classes", "train_records")
        require_at_least(self, 0, "workers")
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(i) for i in range(self.num_classes)))
        names, classes = len(self.class_names), self.num_classes
        require(names == classes, f"class_names has {names} names for {classes} classes")
        require(not (self.tokens and self.mix), "tokens and mix exclude each other: give one of them")
        stores = [name for name in ("tokens", "tokens_heldout", "mix") if getattr(self, name)]
        require(not (self.on_the_fly and stores), f"on_the_fly and {', '.join(stores)} exclude each other: give one")
        if self.mix:
            period_shares([weight for _, weight in self.mix])

    def given_tokens(self, split: Split) -> tuple[tuple[str, float], ...]:
        """Return the configured token stores of a split with their weights; empty if images are tokenized."""
        if split == "train" and self.mix:
            return self.mix
        folder = self.tokens if split == "train" else self.tokens_heldout
        return ((folder, 1.0),) if folder else ()


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluation during and after training.

    Attributes:
      samples: images of the final report. live_samples: images of the distance while training; 0 is off.
      live_grid: images per class drawn at each evaluation while training; 0 is off.
      batch_size: images at a time.
      grid_per_class, grid_classes: size of samples.png.
      inception: file of Inception's weights, for Inception Score and FID.
      reference: file of statistics that the FID compares with.
    """

    samples: int = 1000
    live_samples: int = 200
    live_grid: int = 4
    batch_size: int = 200
    grid_per_class: int = 10
    grid_classes: int = 10
    inception: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "grid_per_class", "grid_classes")
        require_at_least(self, 2, "samples")  # a distance needs a covariance
        require_at_least(self, 0, "live_grid")
        live = self.live_samples
        require(live == 0 or live >= 2, f"live_samples is {live}: give 0, or at least 2")
        require(not self.reference or self.inception is not None, "reference needs inception, the network's weights")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training. The defaults are RAR's (arXiv 2411.00776, section 4.1) where it has one.

    Durations are numbers of updates; an experiment may write epochs ("400ep") or a share of the training ("5%").

    Attributes:
      steps, batch_size: updates, and global batch size. accumulation: microbatches per update.
      learning_rate: reached after `warmup` updates. end_learning_rate: at the end of the cosine schedule.
      beta1, beta2, eps, weight_decay: of AdamW. The model's mask says which parameters decay.
      clip_norm: largest global norm of a gradient.
      ema_decay: of the parameters that are evaluated and sampled, at most (1 + k) / (10 + k) after k updates; 0 is off.
      log_every, eval_every, checkpoint_every: updates between log rows, validations, checkpoints.
      eval_records: records per validation.
      keep_checkpoints: number of newest checkpoints to keep.
      keep_best: also keep the one with the best live distance (else the lowest validation loss).
      verify_saves: read each checkpoint back; stop the training if it differs.
      spike_sigmas: skip updates whose loss or gradient norm exceeds the mean of the last 128 by so many standard
        deviations. 0: skip only non-finite updates.
      max_consecutive_skips: roll back to the last good checkpoint, and skip the batches since, after so many.
      max_rollbacks: stop with a debug dump after so many.
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
        require_at_least(self, 1, "steps", "batch_size", "accumulation", "log_every", "eval_every", "checkpoint_every")
        require_at_least(self, 1, "eval_records", "max_consecutive_skips")
        require_at_least(self, 0, "end_learning_rate", "weight_decay", "spike_sigmas", "max_rollbacks")
        require_at_least(self, 2, "keep_checkpoints")  # one stays while another is written
        for name in ("eps", "learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("beta1", "beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        parts, size = self.accumulation, self.batch_size
        require(size % parts == 0, f"batch_size {size} is not divisible by accumulation {parts}")
        require(self.warmup < self.steps, f"warmup is {self.warmup}: it must be shorter than the {self.steps} steps")
