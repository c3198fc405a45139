"""The optimizer of a recipe and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import optax

from rar_jax.sections import Recipe


def make_schedule(recipe: Recipe) -> optax.Schedule:
    """Learning rate of update k (0-based): linear from 0 during the warm-up, then a cosine to the end value."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if recipe.warmup else recipe.learning_rate,
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        decay_steps=recipe.steps,
        end_value=recipe.end_learning_rate,
    )


def make_optimizer(recipe: Recipe, decay_mask: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled decay (lr * wd * p) where the mask is True."""
    adamw = optax.adamw(
        make_schedule(recipe),
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), adamw)
