"""The train state, a plain tree of arrays, and the step that advances it.

    state = {"step": int32, "params": tree, "opt_state": optax state, "extra": {"ema": tree} or {}, "guard": see guard.py}

It is plain so that a checkpoint opens without this code. `extra` is the place for an EMA or, later, a discriminator. The step
counts the updates that were left out as bad, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rar_jax.sections import Recipe
from rar_jax.training import guard
from rar_jax.training.optimizer import schedule

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Metrics]]  # (params, batch, *, key, step)


def make_init(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, recipe: Recipe
) -> Callable[[jax.Array], State]:
    """Function key -> fresh state."""

    def init_state(key: jax.Array) -> State:
        params = init(key)
        extra = {"ema": params} if recipe.ema_decay else {}
        trained = {"params": params, "opt_state": optimizer.init(params), "extra": extra}
        return {"step": jnp.zeros((), jnp.int32), **trained, "guard": guard.init()}

    return init_state


def state_shardings(shapes: State, params: Any, replicated: Any, optimizer: optax.GradientTransformation) -> State:
    """Shardings of a whole state from those of its parameters: Adam's moments and the EMA lie as the parameters do."""
    return {
        "step": replicated,
        "params": params,
        "opt_state": optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes["opt_state"],
            params,
            transform_non_params=lambda _: replicated,
        ),
        "extra": {name: params for name in shapes["extra"]},
        "guard": jax.tree.map(lambda _: replicated, shapes["guard"]),
    }


def evaluated_params(state: State) -> Any:
    """The parameters to validate, sample and ship: the EMA where there is one."""
    return state["extra"].get("ema", state["params"])


def make_train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    after_step: Callable[..., Any] | None = None,
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Function (state, batch, root key) -> (state, metrics), to be jitted with the state donated.

    All randomness of step k comes from fold_in(root, k), so a resumed run draws what the first one would have. An update that
    the guard calls bad is left out: parameters, optimizer state and extra stay what they were, to the bit.
    """
    learning_rate = schedule(recipe)

    gradients = jax.grad(loss, has_aux=True)

    def accumulated(params: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[Any, Metrics]:
        parts = recipe.accumulation
        if parts == 1:
            return gradients(params, batch, key=key, step=step)
        # Every part takes rows from each device's share of the batch, so that no row changes its device.
        split = {k: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0) for k, x in batch.items()}

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part[0], key=part[1], step=step)), None

        keys = jax.random.split(key, parts)
        first = {k: x[0] for k, x in split.items()}
        shapes = jax.eval_shape(lambda: gradients(params, first, key=keys[0], step=step))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (split, keys))
        return jax.tree.map(lambda x: x / parts, total)

    def train_step(state: State, batch: Batch, root: jax.Array) -> tuple[State, Metrics]:
        step, params = state["step"], state["params"]
        key_loss, key_after = jax.random.split(jax.random.fold_in(root, step))
        grads, metrics = accumulated(params, batch, key_loss, step)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(learning_rate(step))}
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        if after_step is not None:
            params = after_step(params, batch, key=key_after, step=step)
        extra = state["extra"]
        if "ema" in extra:
            decay = jnp.minimum(recipe.ema_decay, (1 + step) / (10 + step))
            extra = {"ema": jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, extra["ema"], params)}
        trained = {"params": params, "opt_state": opt_state, "extra": extra}
        bad, guarded = guard.judge(state["guard"], metrics, sigmas=recipe.spike_sigmas)
        trained = guard.unless(bad, trained, {name: state[name] for name in trained})
        metrics = metrics | {name: guarded[name] for name in ("skipped", "in_a_row")}
        return {"step": step + 1, **trained, "guard": guarded}, metrics

    return train_step
