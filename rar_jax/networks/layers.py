"""Layers shared by the transformers. Shape suffixes: b batch, n positions, d width, h heads, k head dim.

Logical axis names used on parameters: width, heads, mlp, modulation, codes (see parallel/rules.py); None is replicated.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rar_jax.parallel.rules import target_platform

# torch's trunc_normal_(std=0.02) cuts at an absolute +-2, which is no cut; JAX's truncated_normal would cut at 2 sigma.
INIT = nn.initializers.normal(0.02)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32: accelerators would otherwise multiply in TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def matmul(x: jax.Array, kernel: jax.Array, ins: int, dtype: jnp.dtype) -> jax.Array:
    """Multiply x (*rows, *in) by kernel (*in, *out), summed in `dtype`: (*rows, *out).

    The gradient is written out to sum over one flat dimension of rows: XLA:CPU transposes a factor to sum over several
    (docs/measurements/training.md).
    """
    return _matmul(x, kernel, ins, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, kernel: jax.Array, ins: int, dtype: jnp.dtype) -> jax.Array:
    contracted = tuple(range(x.ndim - ins, x.ndim)), tuple(range(ins))
    return _dot(x, kernel, contracted, dtype)


def _dot(x: jax.Array, y: jax.Array, contracted: Any, dtype: jnp.dtype) -> jax.Array:
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, y, (contracted, ((), ())), precision=precision, preferred_element_type=dtype)


def _matmul_forward(x: jax.Array, kernel: jax.Array, ins: int, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
    return _matmul(x, kernel, ins, dtype), (x, kernel)


def _matmul_backward(ins: int, dtype: jnp.dtype, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    del dtype
    x, kernel = saved
    x_ri, g_ro = x.reshape(-1, *kernel.shape[:ins]), g.reshape(-1, *kernel.shape[ins:]).astype(x.dtype)
    outs = tuple(range(1, g_ro.ndim)), tuple(range(ins, kernel.ndim))
    return _dot(g_ro, kernel, outs, x.dtype).reshape(x.shape), _dot(x_ri, g_ro, ((0,), (0,)), kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """Linear layer with bias: kernel (*in, *out) on the logical `axes`, the last `len(out)` of which are outputs.

    Fused projections keep their parts as dimensions, (in, 3, h, k), to be sharded along heads. (Flax's DenseGeneral
    creates flat kernels first, which fails on a mesh.) A kernel stored in bfloat16 is multiplied in bfloat16.
    """

    out: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype
    zero: bool = False  # start at 0 (adaLN)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ins = len(self.axes) - len(self.out)
        init = nn.initializers.zeros if self.zero else INIT
        kernel_init = nn.with_logical_partitioning(init, self.axes)
        kernel: Any = self.param("kernel", kernel_init, (*x.shape[-ins:], *self.out), jnp.float32)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[ins:])
        bias: Any = self.param("bias", bias_init, self.out, jnp.float32)
        factors = kernel.dtype if kernel.dtype == jnp.bfloat16 else self.dtype
        y: Any = matmul(x.astype(factors), kernel.astype(factors), ins, self.dtype)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def layer_norm(dtype: jnp.dtype, name: str, affine: bool = True) -> nn.LayerNorm:
    """LayerNorm, eps 1e-6, statistics in float32. Two-pass variance: E[x^2] - E[x]^2 cancels."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
        name=name,
    )


def modulate(x_bnd: jax.Array, shift_bnd: jax.Array, scale_bnd: jax.Array) -> jax.Array:
    """adaLN: x (1 + scale) + shift."""
    return x_bnd * (1 + scale_bnd) + shift_bnd


def dropout_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 random bits for dropout alone: a hash of (key, row, position), equal under any sharding.

    Two rounds of the MurmurHash3 finaliser; the row, along the first of several axes, joins in the second, so that a
    batch may have more than 2**32 entries. Threefry is 25 times slower on a CPU (docs/measurements/dropout.md).
    """
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    place, stride, row = jnp.zeros(shape, jnp.uint32), 1, jnp.uint32(0)
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        if axis == 0 and len(shape) > 1:
            row = index * jnp.uint32(0x9E3779B9)
        else:
            place += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    for word in (words[0], words[-1] + row):
        place = place + word
        place = (place ^ (place >> 16)) * jnp.uint32(0x85EBCA6B)
        place = (place ^ (place >> 13)) * jnp.uint32(0xC2B2AE35)
        place = place ^ (place >> 16)
    return place


class Dropout(nn.Module):
    """Zeroes a share `rate` of the entries and scales the others up; the key comes as rngs={"dropout": key}."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return x
        keep = dropout_bits(self.make_rng("dropout"), x.shape) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by erf (arXiv 1606.08415), as in PyTorch. jax.nn.gelu uses erfc, which costs one more exponential."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Mlp(nn.Module):
    """fc1, GELU by erf, dropout, fc2, dropout."""

    hidden: int
    dropout: float
    deterministic: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        width = x_bnd.shape[-1]
        h_bnf = gelu(Dense((self.hidden,), ("width", "mlp"), self.dtype, name="fc1")(x_bnd))
        h_bnf = Dropout(self.dropout, self.deterministic)(h_bnf)
        out_bnd = Dense((width,), ("mlp", "width"), self.dtype, name="fc2")(h_bnf)
        return Dropout(self.dropout, self.deterministic)(out_bnd)


def attention_weights(q_bnhk: jax.Array, k_bnhk: jax.Array) -> jax.Array:
    """Return causal softmax(q k / sqrt(head dim)), float32 (b, h, n, m): attention of query n to keys m <= n."""
    n, head_dim, precision = q_bnhk.shape[1], q_bnhk.shape[-1], matmul_precision(q_bnhk.dtype)
    q_bnhk = q_bnhk * head_dim**-0.5
    scores_bhnm = jnp.einsum("bnhk,bmhk->bhnm", q_bnhk, k_bnhk, precision=precision, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(jnp.tri(n, dtype=bool)[None, None], scores_bhnm, -jnp.inf))


def has_fused_attention(head_dim: int, dtype: Any) -> bool:
    """Whether code that is traced here runs on GPUs with cuDNN's fused attention.

    NVIDIA GPUs have it since Ampere, in 16 bits, for head dims that are multiples of 8 up to 128.
    """
    fits = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    if not fits or target_platform() != "gpu":
        return False
    capability = str(getattr(jax.devices("gpu")[0], "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0


class Attention(nn.Module):
    """Causal multi-head self-attention with LayerNorm on q and k, over the head dim and shared by all heads."""

    num_heads: int
    attention_dropout: float
    dropout: float
    deterministic: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        d = x_bnd.shape[-1]
        shape = (3, self.num_heads, d // self.num_heads)
        qkv_bn3hk = Dense(shape, ("width", None, "heads", None), self.dtype, name="qkv")(x_bnd)
        q_bnhk = layer_norm(self.dtype, "q_norm")(qkv_bn3hk[:, :, 0])
        k_bnhk = layer_norm(self.dtype, "k_norm")(qkv_bn3hk[:, :, 1])
        drops = self.attention_dropout > 0 and not self.deterministic
        v_bnhk, precision = qkv_bn3hk[:, :, 2], matmul_precision(self.dtype)
        if not drops and has_fused_attention(q_bnhk.shape[-1], self.dtype):  # it could not drop the same weights
            out_bnhk = jax.nn.dot_product_attention(q_bnhk, k_bnhk, v_bnhk, is_causal=True, implementation="cudnn")
        else:
            weights_bhnm = attention_weights(q_bnhk, k_bnhk).astype(self.dtype)
            weights_bhnm = Dropout(self.attention_dropout, self.deterministic)(weights_bhnm)
            out_bnhk = jnp.einsum(
                "bhnm,bmhk->bnhk", weights_bhnm, v_bnhk, precision=precision, preferred_element_type=self.dtype
            )
        out_bnd = Dense((d,), ("heads", None, "width"), self.dtype, name="proj")(out_bnhk)
        return Dropout(self.dropout, self.deterministic)(out_bnd)
