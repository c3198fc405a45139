"""The train state, a plain pytree of arrays, and the step that advances it.

    state = {"step": int32, "params": tree, "opt_state": optax state, "ema": tree or {},
             "extra": of the model's init_extra or {}, "guard": see guard.py}

A plain pytree, so that checkpoints can be opened without this package. The step also counts skipped updates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rar_jax.keys import fold_in_domain
from rar_jax.models import Aux, Model, draw_tokens, encode_tokens
from rar_jax.parallel.rules import param_shardings, replicated
from rar_jax.sections import Recipe
from rar_jax.training import guard
from rar_jax.training.optimizer import make_optimizer, make_schedule

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[..., tuple[jax.Array, Aux]]  # (params, batch, *, extra, key, step)


class Setup(NamedTuple):
    """The jitted functions of a training, sharded over a mesh.

    abstract_state: shapes and shardings. init: key -> state. step: (state, batch, root key, frozen) -> (state,
    metrics); it donates the state. frozen: the tokenizer's parameters, where batches hold images to encode.
    """

    abstract_state: State
    init: Callable[[jax.Array], State]
    step: Any


def compile_training(model: Any, config: Any, recipe: Recipe, mesh: Mesh, tokenizer: Model | None = None) -> Setup:
    """Set up the training of a contract module; its axes and rules.py say how the state is sharded.

    tokenizer: of a generator: it makes the tokens of a batch within the step, see `with_tokens`.

    Raises: ConfigError if a parameter does not divide over the mesh.
    """
    tx = make_optimizer(recipe, model.decay_mask(config))
    init_extra = functools.partial(model.init_extra, config) if hasattr(model, "init_extra") else None
    init_state = make_init(functools.partial(model.init, config), tx, recipe, init_extra)
    shapes = jax.eval_shape(init_state, jax.random.key(0))
    params_at = param_shardings(model.axes(config), shapes["params"], mesh)
    at = state_shardings(shapes, params_at, replicated(mesh), tx)

    def step(state: State, batch: Batch, root: jax.Array, frozen: Any = None) -> tuple[State, Metrics]:
        # Each function makes its own tokens: with accumulation only one part's activations exist at a time.
        def loss(params: Any, batch: Batch, *, key: jax.Array, **rest: Any) -> Any:
            batch = with_tokens(tokenizer, frozen, batch, key=key)
            return model.loss(config, params, batch, key=key, train=True, **rest)

        def after_step(params: Any, extra: Any, batch: Batch, *, key: jax.Array, **rest: Any) -> Any:
            batch = with_tokens(tokenizer, frozen, batch, key=key)
            return model.after_step(config, params, extra, batch, key=key, adversary_outputs=None, **rest)

        train_step = make_train_step(loss, tx, recipe, after_step if hasattr(model, "after_step") else None)
        return train_step(state, batch, root)

    return Setup(
        jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, at),
        jax.jit(init_state, out_shardings=at),
        jax.jit(step, donate_argnums=0, out_shardings=(at, replicated(mesh))),
    )


def with_tokens(tokenizer: Model | None, params: Any, batch: Batch, *, key: jax.Array | None = None) -> Batch:
    """Make the tokens of a generator's batch from its images, or from what a token store keeps. Traceable.

    key: the loss's; None draws nothing.
    """
    if tokenizer is None:
        return batch
    key = None if key is None else fold_in_domain(key, "draw")
    if "images" in batch:
        tokens = encode_tokens(tokenizer, params, batch["images"], key=key)
    else:
        tokens = draw_tokens(tokenizer, batch["tokens"], key=key)
    return {**{name: x for name, x in batch.items() if name != "images"}, "tokens": tokens}


def make_init(
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    init_extra: Callable[[jax.Array], Any] | None = None,
) -> Callable[[jax.Array], State]:
    """Make the function key -> initial state."""

    def init_state(key: jax.Array) -> State:
        params = init(key)
        extra = init_extra(fold_in_domain(key, "extra")) if init_extra else {}
        ema = params if recipe.ema_decay else {}
        trained = {"params": params, "opt_state": optimizer.init(params), "ema": ema, "extra": extra}
        return {"step": jnp.zeros((), jnp.int32), **trained, "guard": guard.init()}

    return init_state


def state_shardings(shapes: State, params: Any, replicated: Any, optimizer: optax.GradientTransformation) -> State:
    """Shard Adam's moments and the EMA of a state as its parameters are, and nothing else."""
    opt_state = optax.tree.map_params(
        optimizer, lambda _, at: at, shapes["opt_state"], params, transform_non_params=lambda _: replicated
    )
    return {
        "step": replicated,
        "params": params,
        "opt_state": opt_state,
        "ema": params if shapes["ema"] else {},
        **jax.tree.map(lambda _: replicated, {name: shapes[name] for name in ("extra", "guard")}),
    }


def evaluated_params(state: State) -> Any:
    """The parameters to validate, sample and ship: the EMA where there is one."""
    return state["ema"] or state["params"]


def make_train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    after_step: Callable[..., Any] | None = None,
) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Make the function (state, batch, root key) -> (state, metrics), to be jitted with the state donated.

    All randomness of step k comes from fold_in(root, k). A bad update (guard.py) leaves parameters, optimizer state,
    EMA and extra bitwise unchanged.

    after_step: (params, extra, batch, *, outputs, key, step) -> (params, extra), see docs/contracts.md.
    """
    learning_rate, gradients = make_schedule(recipe), jax.grad(loss, has_aux=True)

    def train_step(state: State, batch: Batch, root: jax.Array) -> tuple[State, Metrics]:
        step, params, extra, ema = state["step"], state["params"], state["extra"], state["ema"]
        key_loss, key_after = jax.random.split(jax.random.fold_in(root, step))
        given = {"extra": extra, "key": key_loss, "step": step}
        grads, aux = accumulate(gradients, params, batch, parts=recipe.accumulation, **given)
        metrics = aux.metrics | {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(learning_rate(step))}
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        params = optax.apply_updates(params, updates)
        if after_step is not None:
            params, extra = after_step(params, extra, batch, outputs=aux.outputs, key=key_after, step=step)
        if ema:
            decay = jnp.minimum(recipe.ema_decay, (1 + step) / (10 + step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        trained = {"params": params, "opt_state": opt_state, "ema": ema, "extra": extra}
        bad, guarded = guard.judge(state["guard"], metrics, sigmas=recipe.spike_sigmas)
        trained = guard.select_if(bad, {name: state[name] for name in trained}, trained)
        metrics = metrics | {name: guarded[name] for name in ("skipped", "consecutive")}
        return {"step": step + 1, **trained, "guard": guarded}, metrics

    return train_step


def accumulate(
    gradients: Callable[..., tuple[Any, Aux]], params: Any, batch: Batch, *, parts: int, key: jax.Array, **rest: Any
) -> tuple[Any, Aux]:
    """Compute mean gradients and metrics of a batch in equal parts, one after another, and all outputs. Traceable."""
    if parts == 1:
        return gradients(params, batch, key=key, **rest)
    # Every part takes rows from each device's share of the batch, so that no row changes its device.
    split = {k: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0) for k, x in batch.items()}

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
        grads, aux = gradients(params, part[0], key=part[1], **rest)
        return jax.tree.map(jnp.add, total, (grads, aux.metrics)), aux.outputs

    keys = jax.random.split(key, parts)
    first = {k: x[0] for k, x in split.items()}
    grads, aux = jax.eval_shape(lambda: gradients(params, first, key=keys[0], **rest))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, aux.metrics))
    total, outputs = jax.lax.scan(add, zeros, (split, keys))
    grads, metrics = jax.tree.map(lambda x: x / parts, total)
    return grads, Aux(metrics, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), outputs))
