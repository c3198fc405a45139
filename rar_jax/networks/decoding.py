"""Decode with the transformer of transformer.py, one sequence position (slot) at a time, with a KV cache.

The arithmetic is the same; the layout is the one that is fast for a few rows (docs/measurements/sampling.md):
* Products are weights (out, in) times features (in, rows).
* On CPUs, layers are separate arrays and the loop over them is unrolled: a scan would copy each layer's weights. On TPUs
  and GPUs, where compiling all layers takes minutes, layers are stacked and scanned.
* The modulation depends on class and position only. It is computed for many positions at a time, once per class.
* The cache is allocated in stages, and attention reads only stages in use. A fused kernel reads only filled positions.

Shape suffixes: d width, f hidden width of the MLP, h heads, k head dim, b batch, g branches of guidance (class, null),
m cached positions, e distinct classes, s positions modulated at a time, l layers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint

from rar_jax.networks.layers import gelu, has_fused_attention, matmul_precision, modulate
from rar_jax.parallel.rules import batch_per_device, is_sharded, target_platform

Params = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]  # each (*r, m, k) with rows r = b, g, h, or one dimension of them all
Layers = tuple[Params, ...] | Params  # one tree per layer, or one tree of stacked arrays (l, ...), to be scanned

# ---------------------------------------------------------------- parameters


def prepare_blocks(blocks: Params, *, dtype: Any = None, scanned: bool | None = None) -> Layers:
    """Return the parameters of Transformer's blocks with kernels (*out, *in) in `dtype`.

    Args:
      scanned: whether layers stay stacked. Default: by the platform that code is traced for, True except on CPUs.
    """
    scanned = target_platform() != "cpu" if scanned is None else scanned

    def arrange(path: Any, x: jax.Array) -> jax.Array:
        if path[-1].key != "kernel":
            return x
        return outputs_first(x, inputs=2 if path[-2].key == "proj" else 1, dtype=dtype)

    def arrange_layer(layer: Params) -> Params:
        return jax.tree_util.tree_map_with_path(arrange, layer)

    if scanned:
        return jax.vmap(arrange_layer)(blocks)
    (depth,) = {leaf.shape[0] for leaf in jax.tree.leaves(blocks)}
    return tuple(arrange_layer(jax.tree.map(lambda x, i=i: x[i], blocks)) for i in range(depth))


def outputs_first(kernel: jax.Array, *, inputs: int = 1, dtype: Any = None) -> jax.Array:
    """A kernel (*in, *out) as (*out, *in), in `dtype`."""
    kernel = jnp.moveaxis(kernel, range(inputs), range(-inputs, 0))
    return kernel if dtype is None else kernel.astype(dtype)


# ---------------------------------------------------------------- layers


def dense(params: Params, x: jax.Array) -> jax.Array:
    """Linear layer: kernel (*out, *in) times x (*in, ...), summed in float32; (*out, ...)."""
    kernel, bias = params["kernel"], params["bias"]
    ins = kernel.ndim - bias.ndim
    contracted = tuple(range(bias.ndim, kernel.ndim)), tuple(range(ins))
    y = jax.lax.dot_general(
        kernel,
        x.astype(kernel.dtype),
        (contracted, ((), ())),
        precision=matmul_precision(kernel.dtype),
        preferred_element_type=jnp.float32,
    )
    return y + bias.reshape(bias.shape + (1,) * (y.ndim - bias.ndim))


def normalize(x: jax.Array, *, axis: int) -> jax.Array:
    """LayerNorm without affine over an axis, eps 1e-6, in two passes."""
    x = x - jnp.mean(x, axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axis, keepdims=True) + 1e-6)


def apply_layer_norm(params: Params, x: jax.Array, *, axis: int = 0) -> jax.Array:
    """LayerNorm with scale and bias over an axis."""
    shape = tuple(-1 if i == axis else 1 for i in range(x.ndim))
    return normalize(x, axis=axis) * params["scale"].reshape(shape) + params["bias"].reshape(shape)


def attend(q_rk: jax.Array, cache: Sequence[KeysValues], filled: jax.Array) -> jax.Array:
    """One query a row against the stages of the cache, of whose last one `filled` slots are; float32 (*r, k)."""
    factors = cache[0][0].dtype  # a cache in bfloat16 is not widened, only the sums are
    if _is_fused(q_rk.shape[-1], factors):
        (stage,) = cache
        return _attend_fused(q_rk.astype(factors), stage, filled)

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=matmul_precision(factors), preferred_element_type=jnp.float32)

    q_rk = (q_rk * q_rk.shape[-1] ** -0.5).astype(factors)
    scores = [product("...k,...mk->...m", q_rk, keys) for keys, _ in cache]
    scores[-1] = jnp.where(jnp.arange(scores[-1].shape[-1]) < filled, scores[-1], -jnp.inf)
    weights_rm = jax.nn.softmax(jnp.concatenate(scores, axis=-1)).astype(factors)
    ends = list(itertools.accumulate(part.shape[-1] for part in scores))
    weights = jnp.split(weights_rm, ends[:-1], axis=-1)
    parts = [product("...m,...mk->...k", w, values) for w, (_, values) in zip(weights, cache, strict=True)]
    return functools.reduce(jnp.add, parts)


def _is_fused(head_dim: int, dtype: Any) -> bool:
    """Whether a fused kernel computes attention. It cannot: its batch is all rows, sharded by a tensor axis."""
    return has_fused_attention(head_dim, dtype) and jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1


def _attend_fused(q_rk: jax.Array, stage: KeysValues, filled: jax.Array) -> jax.Array:
    """`attend` of one stage by cuDNN, which reads the cache up to `filled`. Each row is a sequence of one head."""
    *rows, m, k = stage[0].shape
    keys_rm1k, values_rm1k = (x.reshape(-1, m, 1, k) for x in stage)
    lengths_r = jnp.full(len(keys_rm1k), filled, jnp.int32)
    out_r11k = jax.nn.dot_product_attention(
        q_rk.reshape(-1, 1, 1, k), keys_rm1k, values_rm1k, key_value_seq_lengths=lengths_r, implementation="cudnn"
    )
    return out_r11k.reshape(*rows, k).astype(jnp.float32)


def block(
    params: Params,
    x_dbg: jax.Array,
    modulation_6dbg: jax.Array,
    cache: Sequence[KeysValues],
    place: jax.Array,
    layer: jax.Array | None = None,
) -> tuple[jax.Array, KeysValues]:
    """Apply transformer.Block at position `place` of the last stage; return the output and the updated stage.

    layer: index into the cache, if its arrays hold all layers: (l, *r, m, k).
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.unstack(modulation_6dbg)
    attn, mlp = params["attn"], params["mlp"]
    qkv_3hkbg = dense(attn["qkv"], modulate(apply_layer_norm(params["norm1"], x_dbg), shift_a, scale_a))
    q_hkbg = apply_layer_norm(attn["q_norm"], qkv_3hkbg[0], axis=1)
    k_hkbg = apply_layer_norm(attn["k_norm"], qkv_3hkbg[1], axis=1)
    *rows, _, _ = cache[-1][0].shape[0 if layer is None else 1 :]
    h, k, b, g = q_hkbg.shape
    q_rk, k_rk, v_rk = (x.transpose(2, 3, 0, 1).reshape(*rows, k) for x in (q_hkbg, k_hkbg, qkv_3hkbg[2]))

    def write(stage: jax.Array, new_rk: jax.Array) -> jax.Array:
        new = jnp.expand_dims(new_rk.astype(stage.dtype), -2 if layer is None else (0, -2))
        return jax.lax.dynamic_update_slice(
            stage, new, (*(() if layer is None else (layer,)), *(0 for _ in rows), place, 0)
        )

    def of_layer(stage: KeysValues) -> KeysValues:
        return stage if layer is None else tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in stage)

    keys, values = cache[-1]
    written = write(keys, k_rk), write(values, v_rk)
    out_rk = attend(q_rk, [of_layer(stage) for stage in (*cache[:-1], written)], place + 1)
    x_dbg = x_dbg + gate_a * dense(attn["proj"], out_rk.reshape(b, g, h, k).transpose(2, 3, 0, 1))
    h_fbg = dense(mlp["fc1"], modulate(apply_layer_norm(params["norm2"], x_dbg), shift_m, scale_m))
    x_dbg = x_dbg + gate_m * dense(mlp["fc2"], gelu(h_fbg))
    return with_logical_constraint(x_dbg, (None, "batch", None)), written


# ---------------------------------------------------------------- modulation, slots at a time


class Conditions(NamedTuple):
    """Conditioning of a batch of samples.

    Attributes:
      embedded_ed: embeddings of classes. null_1d: of the null class, None without guidance.
      places_b: index of each sample's class in embedded_ed; None if sample i has class i.
      distinct: int32, number of classes in use; None if all.
    """

    embedded_ed: jax.Array
    null_1d: jax.Array | None
    places_b: jax.Array | None = None
    distinct: jax.Array | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """(b, g)."""
        batch = len(self.embedded_ed if self.places_b is None else self.places_b)
        return batch, 1 if self.null_1d is None else 2

    def slots_at_a_time(self, slots: int) -> int:
        """Positions per group of modulations: about 1024 vectors on a device, 8 to 64 positions, divided evenly."""
        most = min(64, max(8, 1024 // batch_per_device(len(self.embedded_ed))))
        return -(-slots // -(-slots // most))

    def modulations(self, params: Sequence[Params], steps_sd: jax.Array) -> Callable[[jax.Array], list[jax.Array]]:
        """Apply linear layers to SiLU(class + step); return a function from a step to arrays (*out, b, g)."""
        classes = _modulations(params, self.embedded_ed, steps_sd, distinct=self.distinct)
        null = None if self.null_1d is None else _modulations(params, self.null_1d, steps_sd)

        def at(step: jax.Array) -> list[jax.Array]:
            out = [jax.lax.dynamic_index_in_dim(m, step, keepdims=False) for m in classes]
            out = out if self.places_b is None else [jnp.take(m, self.places_b, axis=-1) for m in out]
            if null is None:
                return [m[..., None] for m in out]
            nulls = [jax.lax.dynamic_index_in_dim(m, step, keepdims=False) for m in null]
            return [jnp.stack([m, jnp.broadcast_to(n, m.shape)], axis=-1) for m, n in zip(out, nulls, strict=True)]

        return at


def conditions(labels_b: jax.Array, table_cd: jax.Array, null_1d: jax.Array | None) -> Conditions:
    """Build the conditions of a batch. Samples of one class share a modulation, except on a sharded mesh."""
    if is_sharded():
        return Conditions(table_cd[labels_b], null_1d)
    size = min(len(labels_b), len(table_cd))
    labels_e, places_b, counts_e = jnp.unique(labels_b, return_inverse=True, return_counts=True, size=size)
    return Conditions(table_cd[labels_e], null_1d, places_b, jnp.count_nonzero(counts_e))


def _modulations(
    params: Sequence[Params], embedded_ed: jax.Array, steps_sd: jax.Array, *, distinct: jax.Array | None = None
) -> list[jax.Array]:
    """Compute (s, *out, e) for each layer; classes beyond `distinct`, rounded up to a tile, are skipped."""

    def of_classes(part_ed: jax.Array) -> list[jax.Array]:
        c_dse = jax.nn.silu((steps_sd[:, None] + part_ed[None]).transpose(2, 0, 1))
        return [jnp.moveaxis(dense(p, c_dse), -2, 0) for p in params]

    if distinct is None:
        return of_classes(embedded_ed)
    classes, slots = len(embedded_ed), len(steps_sd)
    tile = min(classes, max(1, 128 // slots))  # 128 columns are enough for a fast product
    padded_ed = jnp.pad(embedded_ed, ((0, -classes % tile), (0, 0)))

    def one_tile(i: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
        parts = of_classes(jax.lax.dynamic_slice_in_dim(padded_ed, i * tile, tile))
        return [
            jax.lax.dynamic_update_slice_in_dim(out, part, i * tile, axis=out.ndim - 1)
            for out, part in zip(outs, parts, strict=True)
        ]

    empty = [jnp.zeros((slots, *p["bias"].shape, len(padded_ed)), jnp.float32) for p in params]
    # The minimum is a static upper bound for tools that count trip counts.
    tiles = jnp.minimum(-(-distinct // tile), len(padded_ed) // tile)
    return jax.lax.fori_loop(0, tiles, one_tile, empty)


# ---------------------------------------------------------------- the loop over the slots


def generate(
    params: Params,
    given: Conditions,
    *,
    slots: int,
    embed: Callable[[jax.Array, jax.Array], jax.Array],
    draw: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Decode position by position: the token drawn at one is the input of the next.

    Args:
      params: "layers" of `prepare_blocks`; "final_adaln" and "lm_head", kernels (*out, *in); "timesteps_embeddings".
      embed: (slot, tokens int32 (b,)) -> inputs (d, b, g).
      draw: (slot, logits (v, b, g) float32) -> tokens int32 (b,), and the array to keep of the slot.

    Returns: the kept arrays, stacked: (slots, ...).
    """
    layers = params["layers"]
    scanned = isinstance(layers, dict)
    # Stacked, those of all layers are one linear layer: kernel (l, 6, d, d).
    adalns = [*([layers["adaln"]] if scanned else [layer["adaln"] for layer in layers]), params["final_adaln"]]
    depth, kernel_3hkd = _count_layers(layers), _shape_layer(layers)["attn"]["qkv"]["kernel"]
    token_b = jnp.zeros(given.rows[0], jnp.int32)
    logits_vbg = jax.ShapeDtypeStruct((len(params["lm_head"]["bias"]), *given.rows), jnp.float32)
    of_slot = jax.eval_shape(draw, jax.ShapeDtypeStruct((), jnp.int32), logits_vbg)[1]
    kept_s = jnp.zeros((slots, *of_slot.shape), of_slot.dtype)
    done: list[Any] = []  # of each stage that is over: keys and values of each layer, or of all

    def one_stage(begin: int, end: int, token_b: jax.Array, kept_s: jax.Array) -> Any:
        period = given.slots_at_a_time(end - begin)

        def some_slots(i: jax.Array, carry: Any) -> Any:
            first = begin + i * period
            steps_sd = jnp.take(params["timesteps_embeddings"], first + jnp.arange(period), axis=0, mode="clip")
            modulations_at = given.modulations(adalns, steps_sd)

            def body(slot: jax.Array, carry: Any) -> Any:
                stage, token_b, kept_s = carry
                modulations = modulations_at(slot - first)
                logits_vbg, stage = _apply_layers(params, embed(slot, token_b), modulations, done, stage, slot - begin)
                token_b, keep = draw(slot, logits_vbg)
                return stage, token_b, kept_s.at[slot].set(keep)

            return jax.lax.fori_loop(first, jnp.minimum(first + period, end), body, carry)

        _, heads, head_dim, _ = kernel_3hkd.shape
        # XLA's CPU product makes one dimension of the rows; were they more, it would copy the cache at every slot.
        rows = (*given.rows, heads) if is_sharded() else (math.prod(given.rows) * heads,)
        shape = (*((depth,) if scanned else ()), *rows, end - begin, head_dim)
        empty = (jnp.zeros(shape, kernel_3hkd.dtype),) * 2
        carry = empty if scanned else [empty] * depth, token_b, kept_s
        return jax.lax.fori_loop(0, -(-(end - begin) // period), some_slots, carry)

    for begin, end in itertools.pairwise(_stage_ends(params, slots, batch_per_device(math.prod(given.rows)))):
        stage, token_b, kept_s = one_stage(begin, end, token_b, kept_s)
        done.append(stage)
    return kept_s


def _apply_layers(
    params: Params, x_dbg: jax.Array, modulations: list[jax.Array], done: list[Any], stage: Any, position: jax.Array
) -> tuple[jax.Array, Any]:
    """Apply all layers and the head at one position; return logits (v, b, g) and the stage's updated cache."""
    if isinstance(layers := params["layers"], dict):

        def body(carry: Any, layer: Any) -> tuple[Any, None]:
            x_dbg, stage = carry
            of_layer, modulation_6dbg, i = layer
            return block(of_layer, x_dbg, modulation_6dbg, [*done, stage], position, i), None

        each = layers, modulations[0], jnp.arange(_count_layers(layers))
        (x_dbg, written), _ = jax.lax.scan(body, (x_dbg, stage), each)
    else:
        written = []
        for i, layer in enumerate(layers):
            x_dbg, new = block(layer, x_dbg, modulations[i], [*(before[i] for before in done), stage[i]], position)
            written.append(new)
    scale_dbg, shift_dbg = modulations[-1]  # the opposite order to the blocks
    x_dbg = modulate(normalize(x_dbg, axis=0), shift_dbg, scale_dbg)
    return dense(params["lm_head"], x_dbg), written


def _count_layers(layers: Layers) -> int:
    return jax.tree.leaves(layers)[0].shape[0] if isinstance(layers, dict) else len(layers)


def _shape_layer(layers: Layers) -> Params:
    """Shapes and dtypes of one layer's parameters."""
    return jax.eval_shape(lambda x: jax.tree.map(lambda x: x[0], x) if isinstance(x, dict) else x[0], layers)


def _stage_ends(params: Params, slots: int, rows: int) -> list[int]:
    """Choose where the stages of the cache begin and end. A fused kernel needs one stage.

    Each stage compiles one more loop over the layers: unrolled, of at most 80 in all (docs/measurements/compiling.py).
    It pays where the cache is about as large as the weights.
    """
    layers = params["layers"]
    layer = _shape_layer(layers)
    _, _, head_dim, width = (kernel := layer["attn"]["qkv"]["kernel"]).shape
    if _is_fused(head_dim, kernel.dtype):
        return [0, slots]
    kernels = [x for x in jax.tree.leaves({k: v for k, v in layer.items() if k != "adaln"}) if len(x.shape) > 1]
    share = 2 * width * slots * rows / sum(x.size for x in kernels)  # of the cache to the weights
    stages = 1 if share < 0.25 else 2 if share < 1 else 4
    stages = stages if isinstance(layers, dict) else min(stages, max(1, 80 // len(layers)))
    return [slots * i // stages for i in range(stages + 1)]
