"""RAR against 1d-tokenizer: released files, logits, loss, greedy samples, schedules, gradients, four optimizer steps."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rar_jax.generators import rar
from rar_jax.sampling import weigh_guidance
from rar_jax.sections import Recipe
from rar_jax.training.optimizer import make_optimizer, make_schedule
from rar_jax.training.step import make_init, make_train_step
from rar_jax.weights import rar as weights
from rar_jax.weights.mapping import to_released
from tests.golden import (
    Arrays,
    Check,
    count_different,
    count_other_dtypes,
    max_difference,
    max_relative_difference,
    measure_config,
    measure_round_trip,
)

FILES = ("config.json", "rar_tiny.bin", "rar_tiny.npz", "rar_tiny_grads.npz", "rar_tiny_after4.npz")
RELEASED = Recipe(steps=250_000, batch_size=2048, warmup=62_500)
POSITION_TABLES = ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings")
Tree = Any


class System(NamedTuple):
    config: rar.Config
    params: Tree
    arrays: Arrays
    logits: Any  # jitted: (params, tokens, labels, orders)


def measure(folder: pathlib.Path) -> Iterator[Check]:
    """Yield the checks of one folder."""
    config, params = weights.load(folder / "rar_tiny.bin")
    logits = jax.jit(functools.partial(rar.logits, config))
    system = System(config, jax.tree.map(jnp.asarray, params), Arrays(folder / "rar_tiny.npz"), logits)
    yield from _measure_file(folder, config)
    yield from _measure_network(system)
    yield from _measure_samples(system)
    yield from _measure_schedules(system.arrays)
    yield from _measure_decay_mask(system)
    yield from _measure_training(system, Arrays(folder / "rar_tiny_grads.npz"), Arrays(folder / "rar_tiny_after4.npz"))


# ---------------------------------------------------------------- calls of the contract


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def _compute_loss(config: rar.Config, params: Tree, batch: dict[str, jax.Array], *, train: bool) -> tuple[Any, Any]:
    """Return loss and Aux. Nothing is random: the Config of a released file has no dropout."""
    return rar.loss(config, params, batch, key=jax.random.key(0), step=0, train=train)


def _make_sampling(scale: float, power: float, temperature: float = 1.0) -> rar.Sampling:
    """Make the settings of a sampler; the authors' scale 0 is no guidance."""
    return rar.Sampling(scale or None, power, temperature, greedy=True)


@functools.partial(jax.jit, static_argnums=0)
def _sample(config: rar.Config, params: Tree, labels: jax.Array, sampling: rar.Sampling) -> jax.Array:
    return rar.sample(config, params, labels, keys=jax.random.split(jax.random.key(0), len(labels)), sampling=sampling)


class TrainingRun(NamedTuple):
    metrics: list[dict[str, float]]
    first_grads: Tree
    params: Tree
    step: int


def _train(system: System, num_steps: int) -> TrainingRun:
    """Run the train step on the golden batches. Gradients are those given to the optimizer, before clipping."""
    config, params, arrays, _ = system
    recipe = Recipe(steps=10, batch_size=len(arrays["tokens"]), warmup=2)  # the rest is the released recipe
    recording = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )
    tx = optax.chain(recording, make_optimizer(recipe, rar.decay_mask(config)))
    state = make_init(lambda key: params, tx, recipe)(jax.random.key(0))
    train_step = jax.jit(make_train_step(functools.partial(rar.loss, config, train=True), tx, recipe))
    history, first_grads = [], None
    for k in range(num_steps):
        batch = {"tokens": arrays["tokens"], "labels": arrays["labels"], "orders": arrays[f"train_orders_{k}"]}
        batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
        state, metrics = train_step(state, batch, jax.random.key(0))
        history.append({name: float(value) for name, value in metrics.items()})
        first_grads = first_grads or state["opt_state"][0]
    return TrainingRun(history, first_grads, state["params"], int(state["step"]))


# ---------------------------------------------------------------- checks


def _measure_file(folder: pathlib.Path, config: rar.Config) -> Iterator[Check]:
    facts = json.loads((folder / "config.json").read_text())
    names = {
        "width": "D", "depth": "L", "num_heads": "H", "mlp_width": "F",
        "num_tokens": "N", "codebook_size": "V", "num_classes": "classes",
    }  # fmt: skip
    no_dropout = dict.fromkeys(("dropout", "attention_dropout", "label_dropout"), 0.0)
    yield measure_config(config, **no_dropout, **{ours: facts[theirs] for ours, theirs in names.items()})
    used = dict.fromkeys(POSITION_TABLES, np.s_[:, : config.num_tokens + 2])
    yield from measure_round_trip(weights, rar.init, folder / "rar_tiny.bin", used=used)


def _measure_network(system: System) -> Iterator[Check]:
    config, params, arrays, logits = system
    tokens, labels, orders = (arrays[name] for name in ("tokens", "labels", "orders"))
    ours = logits(params, tokens, labels, orders)
    yield Check("teacher-forced logits, class", 2e-5, max_difference(ours, arrays["teacher_logits"]))
    ours = logits(params, tokens, np.full_like(labels, config.num_classes), orders)
    yield Check("teacher-forced logits, null class", 2e-5, max_difference(ours, arrays["teacher_logits_null"]))
    batch = {name: jnp.asarray(arrays[name]) for name in ("tokens", "labels", "orders")}
    value, aux = _compute_loss(config, params, batch, train=False)
    yield Check("loss", 1e-5, max_difference(value, arrays["teacher_loss"]))
    yield Check("loss, difference of the metric", 0, max_difference(aux.metrics["loss"], value))
    in_training, _ = _compute_loss(config, params, batch, train=True)
    yield Check("loss, difference in training without dropout", 1e-6, max_difference(in_training, value))


def _measure_samples(system: System) -> Iterator[Check]:
    """Tokens, and the probabilities of every decoding step through the schedule, without and with the KV cache."""
    config, params, arrays, logits = system
    labels = jnp.asarray(arrays["labels"])
    null = jnp.full_like(labels, config.num_classes)
    raster = jnp.broadcast_to(jnp.arange(config.num_tokens), (len(labels), config.num_tokens))
    networks = {
        "": lambda ids, labels: logits(params, ids, labels, raster),
        ", with the cache": functools.partial(jax.jit(functools.partial(rar.cached_logits, config)), params),
    }
    for name, (scale, power, temperature) in zip(arrays["cfg_names"], arrays["cfg_values"].tolist(), strict=True):
        sampling = _make_sampling(scale, power, temperature)
        for scanned in (True, False):
            ids = _sample(config, rar.prepare(config, params, scanned=scanned), labels, sampling)
            differ = count_different(ids, arrays[f"greedy_{name}_ids"])
            yield Check(f"greedy samples{', scanned layers' * scanned}, tokens that differ", 0, differ)
        share_n = jnp.arange(config.num_tokens) / config.num_tokens
        weight_n = weigh_guidance(scale, share_n, schedule="power-cosine", power=power)
        for how, network in networks.items():
            guided = network(ids, labels)
            if scale:
                null_bnv = network(ids, null)
                guided = null_bnv + weight_n[None, :, None] * (guided - null_bnv)
            difference = max_difference(jax.nn.softmax(guided / temperature), arrays[f"greedy_{name}_probs"])
            yield Check(f"greedy samples, step probabilities{how}", 1e-5, difference)


def _measure_schedules(arrays: Arrays) -> Iterator[Check]:
    for name, expected in arrays.with_prefix("cfgscale_").items():
        (scale, power), n = map(float, name.split("_")), len(expected)
        weigh = functools.partial(weigh_guidance, scale, schedule="power-cosine", power=power)
        ours = weigh(jnp.arange(n) / n)
        yield Check("guidance weights, relative", 1e-6, max_relative_difference(ours, expected))
        yield Check("guidance weights, arrays that are not float32", 0, count_other_dtypes(np.float32, ours))
        some = [0, 1, n // 2, n - 1]
        ours = [float(weigh(s / n)) for s in some]
        yield Check("guidance weights of single steps, relative", 1e-6, max_relative_difference(ours, expected[some]))
    steps = arrays["lr_steps"].tolist()
    yield Check("learning rates, steps of the recipe after the last", 0, abs(RELEASED.steps - steps[-1]))
    schedule = make_schedule(RELEASED)
    difference = max_difference([float(schedule(s)) for s in steps], arrays["lr_values"])
    # Float32 of a rate that is at most 4e-4: optax computes the warm-up as peak - peak * (the remaining share).
    yield Check("learning rates, difference over the peak's float32 step", 1, difference / (4e-4 * 2**-23))
    ours = [float(rar.random_ratio(rar.Config(), s)) for s in arrays["ratio_steps"].tolist()]
    yield Check("share of random orders", 1e-7, max_difference(ours, arrays["ratio_values"]))


def _measure_decay_mask(system: System) -> Iterator[Check]:
    mask = jax.tree.map(lambda decays, x: np.full(x.shape, decays), rar.decay_mask(system.config), system.params)
    ours = _to_released(system.config, mask)
    decayed = {name for name, x in ours.items() if x.all()}
    partly = [name for name, x in ours.items() if x.any() and name not in decayed]
    differ = len(decayed ^ set(system.arrays["decayed_names"].tolist()))
    yield Check("decayed parameters, names that differ", 0, differ)
    yield Check("parameters that decay in part", 0, len(partly))


def _measure_training(system: System, grads: Arrays, after: Arrays) -> Iterator[Check]:
    config, params, arrays, _ = system
    run = _train(system, len(arrays["train_losses"]))
    yield Check("optimizer steps that were not counted", 0, abs(len(arrays["train_losses"]) - run.step))
    losses, norms, rates = ([m[name] for m in run.metrics] for name in ("loss", "grad_norm", "learning_rate"))
    yield Check("optimizer steps, losses", 1e-5, max_difference(losses, arrays["train_losses"]))
    norms_differ = max_relative_difference(norms, arrays["train_grad_norms"])
    yield Check("optimizer steps, gradient norms, relative", 1e-5, norms_differ)
    yield Check("optimizer steps, rates, relative", 1e-6, max_relative_difference(rates, arrays["train_lrs"]))

    ours, start, moved = (_to_released(config, tree) for tree in (run.first_grads, params, run.params))
    yield Check("gradients, names that differ", 0, len(ours.keys() ^ grads.keys()))
    yield Check("optimizer steps, names that differ", 0, len(moved.keys() ^ after.keys()))
    for name in ours:
        if name.endswith("attn.k_norm.bias"):  # softmax ignores a shift: rounding noise, and Adam's steps of it
            largest = max_difference([ours[name], grads[name]], np.zeros((2, *ours[name].shape)))
            yield Check("gradients of key biases, which are 0", 1e-8, largest)
            continue
        error = np.linalg.norm(ours[name].astype(np.float64) - grads[name]) / np.linalg.norm(grads[name])
        yield Check("gradients, over each tensor's norm", 1e-5, error)
        yield Check("optimizer steps, parameters", 1e-6, max_difference(moved[name], after[name]))
        unmoved = max_difference(moved[name], start[name]) <= 1e-5
        yield Check("optimizer steps, parameters that did not move by 1e-5", 0, unmoved)


def _to_released(config: rar.Config, tree: Tree) -> dict[str, np.ndarray]:
    """Under the released names; position tables cut to the rows that are used, as the golden files hold them."""
    out = to_released(weights.TABLE, tree)
    return {name: x[:, : config.num_tokens + 2] if name in POSITION_TABLES else x for name, x in out.items()}
