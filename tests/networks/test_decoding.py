"""Decoding a slot at a time, in parts: against NumPy in float64, and against the same without the shortcut."""

import contextlib
import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from rar_jax.generators import rar
from rar_jax.generators.rar import Sampling
from rar_jax.networks import decoding
from rar_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, sharded
from rar_jax.weights.rar import FILES


def layer(out: tuple[int, ...], width: int, seed: int) -> dict[str, jax.Array]:
    """A linear layer, kernel (*out, width)."""
    keys = jax.random.split(jax.random.key(seed))
    return {"kernel": jax.random.normal(keys[0], (*out, width)), "bias": jax.random.normal(keys[1], out)}


@pytest.mark.parametrize("labels", [[4], [1, 1, 1], [7, 0, 7, 3, 0], list(range(8)) * 3])
@pytest.mark.parametrize("slots", [1, 5, 40])
def test_modulations_by_distinct_classes(labels: list[int], slots: int) -> None:
    """Each sample gets that of its own class, in float64, however many share it; and those of classes that are not there are
    not computed."""
    rng, layers = np.random.default_rng(0), [layer((6, 5), 5, 1), layer((2, 5), 5, 2)]
    table, null, steps = (rng.standard_normal((n, 5)).astype(np.float32) for n in (9, 1, slots))
    given = decoding.conditions(jnp.asarray(labels), jnp.asarray(table), jnp.asarray(null))
    assert given.distinct is not None and int(given.distinct) == len(set(labels))
    at = given.modulations(layers, jnp.asarray(steps))
    for slot in {0, slots // 2, slots - 1}:
        ours = at(jnp.int32(slot))
        for p, out in zip(layers, ours, strict=True):
            kernel, bias = (np.asarray(p[name], np.float64) for name in ("kernel", "bias"))
            for i, label in enumerate(labels):
                for branch, embedding in enumerate((table[label], null[0])):
                    c = embedding.astype(np.float64) + steps[slot]
                    expected = kernel @ (c / (1 + np.exp(-c))) + bias
                    np.testing.assert_allclose(out[..., i, branch], expected, atol=2e-5)


def test_attention_over_stages_is_attention_over_all() -> None:
    rng = np.random.default_rng(0)
    q, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (6, 11, 8), (6, 11, 8)))
    seen = 9  # 4 + 3 slots of stages that are over, and two of the four of the last
    stages = [(jnp.asarray(keys[:, a:b]), jnp.asarray(values[:, a:b])) for a, b in ((0, 4), (4, 7), (7, 11))]
    ours = decoding.attend(jnp.asarray(q), stages, jnp.int32(2))
    scores = np.einsum("rk,rmk->rm", q.astype(np.float64), keys[:, :seen]) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours, np.einsum("rm,rmk->rk", weights, values[:, :seen]), atol=1e-6)


@pytest.mark.parametrize("classes", [1, 3, 16, 33, 500])
@pytest.mark.parametrize("slots", [1, 17, 64, 257, 1025])
def test_slots_at_a_time(classes: int, slots: int) -> None:
    """They cover all slots, the last time too for the most part; memory is bounded."""
    period = decoding.Conditions(jnp.zeros((classes, 2)), None).slots_at_a_time(slots)
    times = -(-slots // period)
    assert 1 <= period <= 64 and (period - 1) * times < slots
    assert period * classes <= 1024 or period <= 8


def test_slots_at_a_time_go_by_what_one_device_has() -> None:
    whole, part = (decoding.Conditions(jnp.zeros((rows, 2)), None) for rows in (128, 32))
    expected = part.slots_at_a_time(257)
    assert expected != whole.slots_at_a_time(257)
    with sharded(make_mesh(MeshConfig(2, 2, 1))):
        assert whole.slots_at_a_time(257) == expected


def random_params(seed: int) -> Any:
    shapes = jax.eval_shape(lambda: rar.init(rar.TINY, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize(("stages", "scanned"), [(1, False), (3, False), (4, False), (2, True), (4, True)])
def test_stages_and_scans_change_nothing(stages: int, scanned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, as this size has by itself, or others; layers unrolled, as on a CPU, or scanned."""
    params, labels = random_params(0), jnp.asarray([3, 1, 3])
    keywords: Any = {"keys": jax.random.split(jax.random.key(1), 3), "sampling": Sampling(2.0, 1.0)}
    expected = rar.sample(rar.TINY, params, labels, **keywords)
    params = rar.prepare(rar.TINY, params, scanned=scanned)
    monkeypatch.setattr(decoding, "_stage_ends", lambda *_: [17 * i // stages for i in range(stages + 1)])
    np.testing.assert_array_equal(rar.sample(rar.TINY, params, labels, **keywords), expected)


@pytest.mark.parametrize(("stages", "scanned"), [(1, False), (2, False), (2, True)])
def test_modulations_in_several_parts_of_a_stage(stages: int, scanned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More slots than are modulated at a time, as in the released sizes: the logits of the network that has no cache."""
    config = dataclasses.replace(rar.TINY, num_tokens=160)
    shapes = jax.eval_shape(lambda: rar.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda s: 0.3 * jax.random.normal(jax.random.key(s.size), s.shape), shapes)
    labels, tokens = jnp.asarray([3, 10]), jax.random.randint(jax.random.key(2), (2, 160), 0, 32)
    parts: list[int] = []
    slots_at_a_time = decoding.Conditions.slots_at_a_time

    def told(given: decoding.Conditions, slots: int) -> int:
        period = slots_at_a_time(given, slots)
        parts.append(-(-slots // period))
        return period

    monkeypatch.setattr(decoding.Conditions, "slots_at_a_time", told)
    monkeypatch.setattr(decoding, "_stage_ends", lambda *_: [161 * i // stages for i in range(stages + 1)])
    ours = rar.cached_logits(config, rar.prepare(config, params, scanned=scanned), tokens, labels)
    assert parts == {1: [3], 2: [2, 2]}[stages]
    orders = jnp.broadcast_to(jnp.arange(160), (2, 160))
    np.testing.assert_allclose(ours, rar.logits(config, params, tokens, labels, orders), atol=2e-4)


@pytest.mark.parametrize(("shape", "scanned"), [(None, False), (None, True), ((2, 1, 1), True), ((1, 1, 2), False)])
def test_fused_attention_draws_the_same_and_not_where_heads_are_cut(
    shape: tuple[int, int, int] | None, scanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX's attention, here by XLA since cuDNN is on GPUs only, in the place where it is taken: the logits as without it."""
    config, params = rar.TINY, random_params(0)
    labels, tokens = jnp.asarray([3, 1, 3, 10]), jax.random.randint(jax.random.key(2), (4, 16), 0, 32)
    expected, read, theirs = rar.cached_logits(config, params, tokens, labels), [], jax.nn.dot_product_attention

    def by_xla(q: jax.Array, *args: Any, implementation: str, **rest: Any) -> jax.Array:
        read.append((implementation, args[0].shape))
        return theirs(q, *args, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(decoding, "has_fused_attention", lambda *_: True)
    with contextlib.nullcontext() if shape is None else sharded(make_mesh(MeshConfig(*shape), jax.devices()[:2])):
        prepared = rar.prepare(config, params, scanned=scanned)
        ours = jax.jit(lambda p, t, c: rar.cached_logits(config, p, t, c))(prepared, tokens, labels)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    one_stage = ("cudnn", (4 * 1 * config.num_heads, 17, 1, config.width // config.num_heads))
    assert read == ([] if shape == (1, 1, 2) else [one_stage] * (1 if scanned else config.depth))


@pytest.mark.parametrize("scanned", [False, True])
def test_the_cache_is_written_in_place(scanned: bool) -> None:
    """Once for each layer and stage, and no loop has a copy of it: so there is nothing to donate."""
    rows, stages, head_dim = 3 * 2 * rar.TINY.num_heads, (8, 9), rar.TINY.width // rar.TINY.num_heads

    def draw(params: Any, labels: jax.Array, keys: jax.Array) -> jax.Array:
        return rar.sample(rar.TINY, params, labels, keys=keys, sampling=Sampling(2.0, 1.0))

    params, labels = rar.prepare(rar.TINY, random_params(0), scanned=scanned), jnp.arange(3)
    text = jax.jit(draw).lower(params, labels, jax.random.split(jax.random.key(1), 3)).compile().as_text()
    loops = text[: text.index("\nENTRY ")]  # what is outside of them sets it to zero
    for slots in stages:
        layers = f"{rar.TINY.depth}," if scanned else ""
        made = re.findall(rf"= f32\[{layers}{rows},{slots},{head_dim}\]\S* ([a-z-]+)\(", loops)
        assert made.count("dynamic-update-slice") == 2 * (1 if scanned else rar.TINY.depth)
        assert "copy" not in made and "transpose" not in made


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("scanned", [False, True])
def test_stages_cover_the_slots_and_stay_few_to_compile(name: str, scanned: bool) -> None:
    config = FILES[name].config
    init = functools.partial(rar.init, config)
    params = jax.eval_shape(lambda: rar.prepare(config, init(jax.random.key(0)), scanned=scanned))
    ends = [decoding._stage_ends(params, 257, rows) for rows in (2, 16, 128, 2048)]
    for stages in ends:
        assert (stages[0], stages[-1]) == (0, 257) and all(a < b for a, b in itertools.pairwise(stages))
        assert scanned or (len(stages) - 1) * config.depth <= 80
    numbers = [len(stages) - 1 for stages in ends]
    assert numbers[0] == 1 and numbers == sorted(numbers) and numbers[-1] > 1
    assert not scanned or numbers[-1] == 4


@pytest.mark.parametrize(("platform", "form"), [("cpu", tuple), ("gpu", dict), ("tpu", dict)])
def test_the_platform_decides_whether_layers_are_scanned(platform: str, form: type) -> None:
    params, device = random_params(0), AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    with use_abstract_mesh(AbstractMesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, abstract_device=device)):
        prepared = jax.eval_shape(functools.partial(rar.prepare, rar.TINY), params)
    assert isinstance(prepared["layers"], form)


@pytest.mark.parametrize(("shape", "scanned"), [
    ((4, 1, 1), False), ((1, 4, 1), False), ((2, 1, 2), False), ((1, 2, 2), False), ((1, 2, 2), True),
])  # fmt: skip
def test_on_a_mesh(shape: tuple[int, int, int], scanned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are cut over the devices and parameters by rules.py: the logits of one device, in stages for the rows that it has."""
    stage_ends, rows = decoding._stage_ends, []
    monkeypatch.setattr(decoding, "_stage_ends", lambda *args: rows.append(args[2]) or stage_ends(*args))
    config, params = rar.TINY, random_params(0)
    labels, keys = jnp.asarray([3, 1, 3, 10, 0, 2, 5, 5]), jax.random.split(jax.random.key(1), 8)
    tokens = jax.random.randint(jax.random.key(2), (8, 16), 0, 32)
    expected = rar.cached_logits(config, params, tokens, labels)
    drawn = rar.sample(config, params, labels, keys=keys, sampling=Sampling(2.0))
    mesh = make_mesh(MeshConfig(*shape))
    tokens, labels, keys = jax.device_put((tokens, labels, keys), batch_sharding(mesh))
    with sharded(mesh):
        prepare = functools.partial(rar.prepare, config, scanned=scanned)
        ours = jax.jit(lambda p, t, c: rar.cached_logits(config, prepare(p), t, c))(params, tokens, labels)
        draw = jax.jit(lambda p, c, k: rar.sample(config, prepare(p), c, keys=k, sampling=Sampling(2.0)))
        again = draw(params, labels, keys)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    np.testing.assert_array_equal(again, drawn)
    assert rows == [8, 16, *(each // (shape[0] * shape[1]) for each in (8, 16))]  # cached_logits has no guidance
