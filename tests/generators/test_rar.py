"""RAR against the authors' network (golden files), and against itself: causality, cache, keys, annealing."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rar_jax.generators import rar
from rar_jax.sampling import Guidance
from rar_jax.weights import rar as released
from rar_jax.weights.mapping import released_shapes

SETTINGS = ("const4", "rarB", "rarXL", "nocfg")


@pytest.fixture(scope="module")
def tiny(golden: pathlib.Path) -> tuple[rar.Config, Any, Any]:
    config, params = released.load(golden / "rar_tiny.bin")
    return config, params, np.load(golden / "rar_tiny.npz")


def raster(batch: int, config: rar.Config) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(config.num_tokens)[None], (batch, config.num_tokens))


def random_params(config: rar.Config, seed: int = 0) -> Any:
    """Parameters with no zero among them, so that every path carries a signal."""
    params = rar.init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


# ---------------------------------------------------------------- golden


def test_teacher_logits(tiny: Any, parity: Any) -> None:
    config, params, g = tiny
    ours = rar.logits(config, params, g["tokens"], g["labels"], g["orders"])
    parity.check_close("teacher-forced logits, class", ours, g["teacher_logits"], 2e-5)
    null = np.full_like(g["labels"], config.num_classes)
    ours = rar.logits(config, params, g["tokens"], null, g["orders"])
    parity.check_close("teacher-forced logits, null class", ours, g["teacher_logits_null"], 2e-5)


def test_teacher_loss(tiny: Any, parity: Any) -> None:
    config, params, g = tiny
    batch = {name: jnp.asarray(g[name]) for name in ("tokens", "labels", "orders")}
    value, metrics = rar.loss(config, params, batch, key=None, step=0)
    parity.check_close("loss", value, g["teacher_loss"], 1e-5)
    assert float(metrics["loss"]) == float(value)
    # With a key but no dropouts, the loss is the same.
    assert float(rar.loss(config, params, batch, key=jax.random.key(0), step=0)[0]) == pytest.approx(
        float(value), abs=1e-6
    )


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_samples(tiny: Any, name: str, scanned: bool, parity: Any) -> None:
    config, params, g = tiny
    scale, power, temperature = map(float, g["cfg_values"][list(g["cfg_names"]).index(name)])
    guidance = Guidance(scale, power, temperature)
    keys = jax.random.split(jax.random.key(0), len(g["labels"]))
    sample = jax.jit(functools.partial(rar.sample, config, greedy=True))
    ids = sample(rar.prepare(config, params, scanned=scanned), g["labels"], keys=keys, guidance=guidance)
    parity.check_same("greedy samples, tokens that differ (four guidance settings)", ids, g[f"greedy_{name}_ids"])
    # The probabilities of every step, through the uncached network and the schedule.
    order = raster(len(ids), config)
    class_bnv = rar.logits(config, params, ids, g["labels"], order)
    null_bnv = rar.logits(config, params, ids, np.full_like(g["labels"], config.num_classes), order)
    weight_n = guidance.weight(jnp.arange(config.num_tokens), config.num_tokens)
    guided_bnv = null_bnv + weight_n[None, :, None] * (class_bnv - null_bnv)
    probs = jax.nn.softmax((guided_bnv if scale else class_bnv) / temperature)
    parity.check_close("greedy samples, step probabilities", probs, g[f"greedy_{name}_probs"], 1e-5)


def test_parameter_counts() -> None:
    """rar.md section 2, in millions: with the used rows of the position tables, and with the released ones."""
    sizes = {
        "S": (12, 768, 3072, 131.70, 133.3), "B": (24, 768, 3072, 259.28, 260.9), "L": (24, 1024, 4096, 459.47, 461.7),
        "XL": (32, 1280, 5120, 952.68, 955.4), "XXL": (40, 1408, 6144, 1495.50, 1498.5),
    }  # fmt: skip
    for depth, width, mlp_width, used, published in sizes.values():
        config = rar.Config(depth=depth, width=width, mlp_width=mlp_width)
        shapes = jax.eval_shape(lambda c=config: rar.init(c, jax.random.key(0)))
        count = sum(x.size for x in jax.tree.leaves(shapes))
        assert count / 1e6 == pytest.approx(used, abs=0.006)
        released_count = sum(np.prod(shape) for shape in released_shapes(released.TABLE, shapes).values())
        assert released_count / 1e6 == pytest.approx(published, abs=0.06)


# ---------------------------------------------------------------- structure


def test_permuted_causality_by_gradient() -> None:
    """Row i may see the tokens at orders[:i] and no others."""
    config = dataclasses.replace(rar.TINY, num_tokens=6)
    params = random_params(config)
    order = jnp.asarray([[3, 0, 5, 1, 4, 2]])
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]])

    def rows(embeddings: jax.Array) -> jax.Array:
        out_1nv = rar.logits(config, params | {"embeddings": embeddings}, tokens, jnp.asarray([0]), order)
        return out_1nv[0] @ jnp.arange(1.0, config.codebook_size + 1)

    jacobian = np.asarray(jax.jit(jax.jacrev(rows))(params["embeddings"]))  # (row, table row, width)
    for i in range(config.num_tokens):
        seen = {place for place in range(6) if np.abs(jacobian[i, tokens[0, place]]).max() > 0}
        assert seen == {int(place) for place in order[0, :i]}


def test_targets_are_known_and_orders_matter() -> None:
    """The same prefix with another next place gives other logits: the target-aware embedding is at work."""
    config = dataclasses.replace(rar.TINY, num_tokens=4)
    params = random_params(config)
    tokens, labels = jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([0])
    logits = jax.jit(lambda orders: rar.logits(config, params, tokens, labels, orders))
    a, b = logits(jnp.asarray([[0, 1, 2, 3]])), logits(jnp.asarray([[0, 2, 1, 3]]))
    np.testing.assert_allclose(a[0, 0], b[0, 0], atol=1e-6)
    assert float(jnp.abs(a[0, 1] - b[0, 1]).max()) > 1e-3


def numpy_rar(config: rar.Config, params: Any, tokens: Any, label: int, order: Any) -> tuple[list[Any], Any]:
    """One image through the network in float64, sums written out: attention (heads, s, s) of each layer, logits (n, v)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x: Any, name: Any = None) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x if name is None else x * name["scale"] + name["bias"]

    def dense(x: Any, layer: Any, formula: str) -> Any:
        return np.einsum(formula, x, layer["kernel"]) + layer["bias"]

    n, label_d = config.num_tokens, p["embeddings"][config.codebook_size + 1 + label]
    x = [p["cls_token"][0] + p["pos_embed"][0], label_d + p["pos_embed"][1]]
    x += [p["embeddings"][tokens[place]] + p["pos_embed"][place + 2] for place in order[:-1]]
    x = np.stack(x)
    x[1:] += p["target_aware_pos_embed"][np.asarray(order) + 2]
    c = label_d + p["timesteps_embeddings"][: n + 1]
    c = c / (1 + np.exp(-c))
    maps = []
    for layer in range(config.depth):
        block = jax.tree.map(lambda x, layer=layer: x[layer], p["transformer"]["blocks"])
        modulation = np.moveaxis(dense(c, block["adaln"], "sd,dmw->smw"), 1, 0)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = norm(x, block["norm1"]) * (1 + scale_a) + shift_a
        q, k, v = np.moveaxis(dense(h, block["attn"]["qkv"], "sd,dthk->sthk"), 1, 0)
        scores = np.einsum("nhk,mhk->hnm", norm(q, block["attn"]["q_norm"]), norm(k, block["attn"]["k_norm"]))
        scores = np.where(np.tri(n + 1, dtype=bool), scores / np.sqrt(q.shape[-1]), -np.inf)
        maps.append(np.exp(scores) / np.exp(scores).sum(-1, keepdims=True))
        x = x + gate_a * dense(np.einsum("hnm,mhk->nhk", maps[-1], v), block["attn"]["proj"], "nhk,hkd->nd")
        h = dense(norm(x, block["norm2"]) * (1 + scale_m) + shift_m, block["mlp"]["fc1"], "sd,df->sf")
        x = x + gate_m * dense(h * scipy.special.ndtr(h), block["mlp"]["fc2"], "sf,fd->sd")
    scale, shift = np.moveaxis(dense(c, p["final_adaln"], "sd,dmw->smw"), 1, 0)
    return maps, dense(norm(x) * (1 + scale) + shift, p["lm_head"], "sd,dv->sv")[1:]


def test_attention_maps_against_numpy() -> None:
    """Of every layer, in a random order: what is shown is what the network does."""
    config = dataclasses.replace(rar.TINY, num_tokens=6)
    params = random_params(config)
    tokens, labels, orders = (
        np.array([[7, 2, 3, 2, 5, 6], [0] * 6]),
        np.array([4, 10]),
        np.array([[3, 0, 5, 1, 4, 2]] * 2),
    )
    maps = rar.attention(config, params, jnp.asarray(tokens), jnp.asarray(labels), jnp.asarray(orders))
    assert maps.shape == (config.depth, 2, config.num_heads, 7, 7) and maps.dtype == jnp.float32
    logits = rar.logits(config, params, jnp.asarray(tokens), jnp.asarray(labels), jnp.asarray(orders))
    for image in range(2):
        by_hand, logits_nv = numpy_rar(config, params, tokens[image], labels[image], orders[image])
        np.testing.assert_allclose(maps[:, image], np.stack(by_hand), atol=1e-5)
        np.testing.assert_allclose(logits[image], logits_nv, atol=1e-4)
    assert float(maps[0].std()) > 0.05 and float(jnp.abs(maps[0] - maps[1]).max()) > 0.05, "nothing to tell apart"


def test_annealing_at_its_ends() -> None:
    config = dataclasses.replace(rar.TINY, anneal_start=10, anneal_end=20)
    assert [float(rar.random_ratio(config, s)) for s in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    in_order = np.arange(config.num_tokens)
    shuffled = np.asarray(rar.random_orders(config, jax.random.key(0), rar.random_ratio(config, 0), 64))
    assert (np.sort(shuffled, axis=1) == in_order).all() and not (shuffled == in_order).all(axis=1).any()
    ordered = np.asarray(rar.random_orders(config, jax.random.key(0), rar.random_ratio(config, 20), 64))
    assert (ordered == in_order).all()
    half = np.asarray(rar.random_orders(config, jax.random.key(0), rar.random_ratio(config, 15), 2000))
    assert abs((half == in_order).all(axis=1).mean() - 0.5) < 0.05
    # Uniform: each token stands at each step equally often (chi-square over 16 x 16 cells, 4.5 sigma).
    many = np.asarray(rar.random_orders(config, jax.random.key(1), jnp.float32(1.0), 8000))
    counts = np.stack([np.bincount(many[:, i], minlength=16) for i in range(16)])
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert abs(chi2 - 225) < 4.5 * np.sqrt(2 * 225)


def test_label_dropout_puts_the_null_class() -> None:
    config = dataclasses.replace(rar.TINY, dropout=0.0, attention_dropout=0.0, label_dropout=0.999999)
    params = random_params(config)
    batch = {"tokens": jnp.ones((4, 16), jnp.int32), "labels": jnp.arange(4), "orders": raster(4, config)}
    loss = jax.jit(lambda batch, key: rar.loss(config, params, batch, key=key, step=0)[0])
    dropped = float(loss(batch, jax.random.key(0)))
    null = float(loss(batch | {"labels": jnp.full((4,), config.num_classes)}, None))
    assert dropped == pytest.approx(null, abs=1e-6)
    assert null != pytest.approx(float(loss(batch, None)), abs=1e-4)


@pytest.mark.parametrize("which", ["dropout", "attention_dropout"])
def test_dropout_changes_the_loss_only_with_a_key(which: str) -> None:
    config = dataclasses.replace(
        rar.TINY, **{"dropout": 0.0, "attention_dropout": 0.0, "label_dropout": 0.0, which: 0.5}
    )
    params = random_params(config)
    batch = {"tokens": jnp.ones((4, 16), jnp.int32), "labels": jnp.arange(4), "orders": raster(4, config)}
    loss = jax.jit(lambda key: rar.loss(config, params, batch, key=key, step=0)[0])
    losses = [float(loss(key)) for key in (None, jax.random.key(0), jax.random.key(1))]
    assert len({round(x, 5) for x in losses}) == 3
    assert losses[1] == float(loss(jax.random.key(0)))


def test_remat_unroll_and_bfloat16() -> None:
    config = rar.TINY
    params = random_params(config)
    batch = {"tokens": jnp.ones((4, 16), jnp.int32), "labels": jnp.arange(4)}

    def grads(config: rar.Config) -> Any:
        grad = jax.jit(jax.grad(lambda p: rar.loss(config, p, batch, key=jax.random.key(3), step=3)[0]))
        return grad(params)

    plain = grads(config)
    for change in ({"remat": True}, {"unroll": 2}):
        other = grads(dataclasses.replace(config, **change))
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    low = grads(dataclasses.replace(config, dtype="bfloat16"))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low))
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (plain, low))
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.05


# ---------------------------------------------------------------- sampling


def keys_of(n: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(n))


@pytest.mark.parametrize("guidance", [Guidance(0.0, temperature=1.3), Guidance(3.0, 1.5, 0.9)])
def test_cached_is_uncached(guidance: Guidance) -> None:
    """Draw by draw: the uncached network, the schedule in NumPy float64 and the same noise give the same tokens."""
    config = rar.TINY
    params, labels = random_params(config), jnp.asarray([0, 3, 9])
    tokens = rar.sample(config, params, labels, keys=keys_of(3), guidance=guidance)
    order = raster(3, config)
    class_bnv = np.asarray(rar.logits(config, params, tokens, labels, order), np.float64)
    null_bnv = np.asarray(rar.logits(config, params, tokens, jnp.full((3,), config.num_classes), order), np.float64)
    n = config.num_tokens
    close = 0
    for s in range(n):
        rise = (1 - np.cos(np.pi * (s / n) ** guidance.power)) / 2
        w = 1 + (guidance.scale - 1) * rise if guidance.scale else 1.0
        guided = null_bnv[:, s] + w * (class_bnv[:, s] - null_bnv[:, s])
        for i in range(3):
            noise = jax.random.gumbel(jax.random.fold_in(keys_of(3)[i], s), (config.codebook_size,))
            perturbed = guided[i] / guidance.temperature + np.asarray(noise, np.float64)
            best, second = np.sort(perturbed)[::-1][:2]
            close += best - second < 1e-5
            assert perturbed[int(tokens[i, s])] > best - 1e-5
    assert close == 0


def test_a_sample_depends_on_its_key_and_label_alone() -> None:
    config, labels, guidance = rar.TINY, jnp.asarray([1, 2, 3, 4]), Guidance(2.0, 1.0)
    params, keys = random_params(config), keys_of(4)
    together = rar.sample(config, params, labels, keys=keys, guidance=guidance)
    for i in range(4):
        alone = rar.sample(config, params, labels[i : i + 1], keys=keys[i : i + 1], guidance=guidance)
        np.testing.assert_array_equal(alone[0], together[i])
    other = rar.sample(config, params, labels, keys=keys[::-1], guidance=guidance)
    assert (np.asarray(other) != np.asarray(together)).any(axis=1).all()


@pytest.mark.parametrize("given", [0, 1, 7, 15, 16])
def test_completion_from_a_prefix(given: int) -> None:
    config, labels, guidance = rar.TINY, jnp.asarray([1, 2]), Guidance(2.0)
    params, keys = random_params(config), keys_of(2)
    whole = rar.sample(config, params, labels, keys=keys, guidance=guidance)
    completed = rar.sample(config, params, labels, keys=keys, guidance=guidance, prefix=whole[:, :given])
    np.testing.assert_array_equal(completed, whole)
    if given:
        changed = (whole[:, :given] + 1) % config.codebook_size
        other = rar.sample(config, params, labels, keys=keys, guidance=guidance, prefix=changed)
        np.testing.assert_array_equal(other[:, :given], changed)


def test_prepared_parameters_sample_the_same() -> None:
    config, labels = rar.TINY, jnp.asarray([1, 2])
    params = random_params(config)
    kwargs: Any = {"keys": keys_of(2), "guidance": Guidance(2.0)}
    a = rar.sample(config, params, labels, **kwargs)
    b = rar.sample(config, rar.prepare(config, params), labels, **kwargs)
    np.testing.assert_array_equal(a, b)
