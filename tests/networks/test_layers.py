"""Dropout's own random bits, attention, LayerNorm, GELU and products against NumPy and SciPy in float64."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.core import meta
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from rar_jax.generators import rar
from rar_jax.networks import layers
from rar_jax.networks.layers import Attention, Dropout, dropout_bits, gelu, has_fused_attention, layer_norm, matmul
from rar_jax.parallel.mesh import AXES


def test_dropout_bits_look_random() -> None:
    bits = np.asarray(dropout_bits(jax.random.key(0), (64, 100, 128)))
    n = bits.size
    for bit in range(32):  # each bit is fair, within 5 sigma
        assert abs(((bits >> bit) & 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    uniform = bits / 2.0**32
    for axis in range(3):  # neighbours do not know each other
        a, b = (np.delete(uniform, i, axis).ravel() - 0.5 for i in (-1, 0))
        assert abs((a * b).mean() * 12) < 5 / np.sqrt(a.size)
    counts = np.histogram(uniform, 256, (0, 1))[0]
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


def test_dropout_bits_of_other_keys_are_others() -> None:
    root = jax.random.key(0)
    draws = [np.asarray(dropout_bits(jax.random.fold_in(root, i), (4096,))) / 2.0**32 - 0.5 for i in range(30)]
    correlation = np.corrcoef(draws)
    assert np.abs(correlation - np.eye(30)).max() < 5 / np.sqrt(4096)


def test_dropout_bits_of_a_row_do_not_depend_on_the_length_of_rows() -> None:
    """Positions are counted within a row: across rows they would repeat after 2**32 entries."""
    key = jax.random.key(3)
    whole = np.asarray(dropout_bits(key, (4, 6, 10)))
    np.testing.assert_array_equal(dropout_bits(key, (2, 3, 10)), whole[:2, :3])
    assert len(np.unique(whole)) == whole.size


def test_dropout_keeps_the_mean_and_the_share() -> None:
    layer = Dropout(0.3, deterministic=False)
    out: Any = layer.apply({}, jnp.ones((200, 500)), rngs={"dropout": jax.random.key(1)})
    assert abs(float((out == 0).mean()) - 0.3) < 5 * np.sqrt(0.21 / 1e5)
    assert set(np.unique(np.asarray(out)).tolist()) == {0.0, float(np.float32(1) / np.float32(0.7))}


def numpy_attention(x_nd: np.ndarray, p: Any) -> np.ndarray:
    def norm(v: np.ndarray, name: str) -> np.ndarray:
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * p[name]["scale"] + p[name]["bias"]

    q, k, v = np.einsum("nd,dchk->cnhk", x_nd, p["qkv"]["kernel"]) + p["qkv"]["bias"][:, None]
    scores = np.einsum("nhk,mhk->hnm", norm(q, "q_norm"), norm(k, "k_norm")) / np.sqrt(q.shape[-1])
    scores[:, ~np.tri(len(x_nd), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hnm,mhk,hkd->nd", weights, v, p["proj"]["kernel"]) + p["proj"]["bias"]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_against_numpy(scale: float) -> None:
    layer = Attention(num_heads=3, attention_dropout=0.0, dropout=0.0, deterministic=True, dtype=jnp.dtype("float32"))
    x = jax.random.normal(jax.random.key(0), (2, 7, 12)) * scale
    import flax.linen as nn

    params: Any = nn.meta.unbox(layer.init(jax.random.key(1), x))["params"]
    params = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(jax.random.key(v.size), v.shape), params)
    ours: Any = layer.apply({"params": params}, x)
    wide = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    for i in range(2):
        np.testing.assert_allclose(ours[i], numpy_attention(np.asarray(x[i], np.float64), wide), atol=1e-4 * scale)


@pytest.mark.parametrize(("dropout", "deterministic", "fused"), [(0.1, True, 1), (0.0, False, 1), (0.1, False, 0)])
def test_fused_attention_is_the_same_and_not_taken_where_weights_are_dropped(
    dropout: float, deterministic: bool, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX's attention, here by XLA since cuDNN is on GPUs only, in the place where it is taken."""
    layer = Attention(2, dropout, 0.0, deterministic, jnp.dtype("float32"))
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = jax.tree.map(lambda p: p + 0.1, meta.unbox(layer.init(jax.random.key(1), x)["params"]))
    apply = functools.partial(layer.apply, {"params": params}, x, rngs={"dropout": jax.random.key(2)})
    expected, calls, theirs = apply(), [], jax.nn.dot_product_attention

    def by_xla(*args: Any, implementation: str, **rest: Any) -> jax.Array:
        calls.append(implementation)
        return theirs(*args, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(layers, "has_fused_attention", lambda *args: True)
    np.testing.assert_allclose(apply(), expected, atol=2e-6)
    assert calls == ["cudnn"] * fused


def on_platform(platform: str, monkeypatch: pytest.MonkeyPatch, capability: str = "9.0") -> Any:
    """A mesh context of `platform`, on a host whose default device is an NVIDIA GPU."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    return use_abstract_mesh(AbstractMesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, abstract_device=device))


@pytest.mark.parametrize(("platform", "capability", "head_dim", "dtype", "fused"), [
    ("gpu", "8.0", 48, "bfloat16", True), ("gpu", "9.0", 128, "float16", True), ("gpu", "8.0", 48, "float32", False),
    ("gpu", "8.0", 136, "bfloat16", False), ("gpu", "8.0", 44, "bfloat16", False),
    ("gpu", "7.5", 48, "bfloat16", False), ("gpu", "gfx942", 48, "bfloat16", False),
    ("tpu", "9.0", 48, "bfloat16", False), ("cpu", "9.0", 48, "bfloat16", False),
])  # fmt: skip
def test_where_there_is_fused_attention(
    platform: str, capability: str, head_dim: int, dtype: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_fused_attention(head_dim, dtype)  # the CPU of the tests
    with on_platform(platform, monkeypatch, capability):
        assert has_fused_attention(head_dim, dtype) == fused
    assert has_fused_attention(48, "bfloat16") == (capability in ("8.0", "9.0"))  # the default device


@pytest.mark.parametrize("platform", ["tpu", "cpu", "gpu"])
def test_a_gpu_host_lowers_the_attention_of_the_platform_of_the_mesh(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training forward pass and the sampler. cuDNN cannot be traced here: a function in its place."""
    config = dataclasses.replace(rar.TINY, dtype="bfloat16", attention_dropout=0.0)
    labels = jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(lambda: rar.init(config, jax.random.key(0)))
    narrow = jax.eval_shape(lambda p: rar.prepare(config, p, dtype="bfloat16"), params)
    tokens, key = jnp.zeros((1, 16), jnp.int32), jax.random.key(0)

    @jax.jit
    def cudnn_attention(q: jax.Array) -> jax.Array:
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: cudnn_attention(q))
    batch = {"tokens": tokens, "labels": labels}
    loss = jax.jit(lambda p: rar.loss(config, p, batch, key=key, step=0, train=True)[0])
    decode = jax.jit(lambda p: rar.cached_logits(config, p, tokens, labels))
    with on_platform(platform, monkeypatch):
        for function, given in ((loss, params), (decode, narrow)):
            lowered = function.trace(given).lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
            assert ("@cudnn_attention" in lowered.as_text()) == (platform == "gpu")


def test_layer_norm_does_not_cancel() -> None:
    """E[x^2] - E[x]^2 in float32 would be wrong in the first digit here."""
    x = 1000.0 + np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32) * 0.1
    layer = layer_norm(jnp.dtype("float32"), "norm", affine=False)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer.apply({}, jnp.asarray(x)), expected, atol=2e-2)


def test_gelu_against_scipy() -> None:
    x = np.linspace(-9, 9, 4001)
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), x * scipy.special.ndtr(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("formula", "x", "kernel", "ins"), [
    ("bnd,dthk->bnthk", (2, 5, 8), (8, 3, 2, 4), 1),
    ("bnhk,hkd->bnd", (2, 5, 2, 4), (2, 4, 7), 2),
])  # fmt: skip
def test_matmul_and_its_gradients_against_numpy(
    formula: str, x: tuple[int, ...], kernel: tuple[int, ...], ins: int
) -> None:
    rng = np.random.default_rng(0)
    a, w = rng.standard_normal(x), rng.standard_normal(kernel)
    factors, outs = formula.split("->")
    of_a, of_w = factors.split(",")
    expected = np.einsum(formula, a, w)
    g = rng.standard_normal(expected.shape)
    y, pull = jax.vjp(lambda a, w: matmul(a, w, ins, jnp.dtype("float32")), jnp.float32(a), jnp.float32(w))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for ours, expected in zip(
        pull(jnp.float32(g)),
        (np.einsum(f"{outs},{of_w}->{of_a}", g, w), np.einsum(f"{of_a},{outs}->{of_w}", a, g)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
