"""RAR: Randomized Autoregressive Visual Generation (arXiv 2411.00776).

A causal transformer predicts the tokens of an image one after the other. In training each sequence is permuted randomly
with a probability that is annealed from 1 to 0: the model sees context from every direction and ends as a raster model.
The position embedding of the *target* is added to each input, to tell which token comes next.

Sequence positions (slots): 0 cls, 1 class, 2 first token, ... The last token is never an input.
Shape suffixes: b batch, n tokens, s sequence positions (n + 1), d width, v codes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint

from rar_jax.config import Steps, require, require_at_least
from rar_jax.models import Aux, TokenSpec
from rar_jax.networks import decoding
from rar_jax.networks.boxes import logical_axes
from rar_jax.networks.layers import INIT, Dense, attention_weights, layer_norm, modulate
from rar_jax.networks.transformer import Transformer
from rar_jax.objectives.classes import cross_entropy, drop_labels
from rar_jax.sampling import SamplingSettings, draw_ids, guide, weigh_guidance

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and regularisation of a RAR generator. The defaults are RAR-B on ImageNet-256.

    Attributes:
      num_tokens: tokens per image, each below codebook_size.
      num_classes: label `num_classes` is the null class.
      dropout: after projections and in the MLP. attention_dropout: of attention weights.
      label_dropout: probability that a label becomes the null class.
      anneal_start, anneal_end: steps between which the probability of a random order falls from 1 to 0.
      remat: recompute blocks in the backward pass to save memory.
      unroll: blocks compiled per iteration of the loop over layers (docs/measurements/training.md).
      dtype: of matmuls and activations in training. Parameters, LayerNorm statistics, softmax, logits and loss are
        float32; so is sampling, unless `prepare` gets a dtype.
    """

    num_tokens: int = 256
    codebook_size: int = 1024
    num_classes: int = 1000
    width: int = 768
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    label_dropout: float = 0.1
    anneal_start: Steps = 125_000
    anneal_end: Steps = 187_500
    remat: bool = False
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = ("num_tokens", "codebook_size", "num_classes", "width", "depth", "num_heads", "mlp_width", "unroll")
        require_at_least(self, 1, *sizes)
        for name in ("dropout", "attention_dropout", "label_dropout"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        divides = f"width {self.width} is not divisible by num_heads {self.num_heads}: change one of them"
        require(self.width % self.num_heads == 0, divides)
        ordered = f"anneal_start {self.anneal_start} is after anneal_end {self.anneal_end}: exchange them"
        require(self.anneal_start <= self.anneal_end, ordered)
        require(self.dtype in ("float32", "bfloat16"), f"dtype is '{self.dtype}': it must be float32 or bfloat16")


TINY = Config(
    num_tokens=16, codebook_size=32, num_classes=10, width=32, depth=2, num_heads=4, mlp_width=64,
    anneal_start=2, anneal_end=4,
)  # fmt: skip


class RAR(nn.Module):
    """The network. Its position tables have the n + 2 rows that are used."""

    config: Config
    deterministic: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        c = self.config

        def table(name: str, rows: int, init: Any = INIT) -> Any:
            return self.param(name, nn.with_logical_partitioning(init, (None, None)), (rows, c.width), jnp.float32)

        self.cls_token: Any = table("cls_token", 1, nn.initializers.zeros)
        # Rows: 0..v-1 codes, v a mask row that is never used, v+1.. classes, the last one the null class.
        self.embeddings: Any = table("embeddings", c.codebook_size + 1 + c.num_classes + 1)
        self.pos_embed: Any = table("pos_embed", c.num_tokens + 2)
        self.target_aware_pos_embed: Any = table("target_aware_pos_embed", c.num_tokens + 2)
        self.timesteps_embeddings: Any = table("timesteps_embeddings", c.num_tokens + 2)
        sizes = c.depth, c.num_heads, c.mlp_width, c.dropout, c.attention_dropout
        self.transformer: Transformer = Transformer(*sizes, self.deterministic, c.remat, c.unroll, self.dtype)
        self.final_adaln: Dense = Dense((2, c.width), ("width", None, "modulation"), self.dtype, zero=True)
        self.final_norm: nn.LayerNorm = layer_norm(self.dtype, "final_norm", affine=False)
        self.lm_head: Dense = Dense((c.codebook_size,), ("width", "codes"), jnp.dtype("float32"))

    def __call__(self, tokens_bn: jax.Array, labels_b: jax.Array, orders_bn: jax.Array) -> jax.Array:
        """Return logits (b, n, v) float32: row i predicts the token at raster position orders[:, i]."""
        n = self.config.num_tokens
        class_b1d = self.embeddings[self.config.codebook_size + 1 + labels_b][:, None]
        ordered_bn = jnp.take_along_axis(tokens_bn, orders_bn, axis=1)
        targets_bnd = self.target_aware_pos_embed[orders_bn + 2]
        cls_b1d = jnp.broadcast_to((self.cls_token + self.pos_embed[:1])[None], class_b1d.shape)
        first_b1d = class_b1d + self.pos_embed[1:2][None] + targets_bnd[:, :1]
        later_bnd = self.embeddings[ordered_bn] + self.pos_embed[orders_bn + 2]
        x_bsd = jnp.concatenate([cls_b1d, first_b1d, later_bnd[:, :-1] + targets_bnd[:, 1:]], axis=1)
        x_bsd = with_logical_constraint(x_bsd, ("batch", None, None))
        c_bsd = nn.silu(class_b1d + self.timesteps_embeddings[: n + 1][None]).astype(self.dtype)
        x_bsd = self.transformer(x_bsd.astype(self.dtype), c_bsd)
        # The final modulation gives (scale, shift), in the opposite order to the blocks.
        scale_bsd, shift_bsd = jnp.unstack(self.final_adaln(c_bsd), axis=2)
        x_bsd = modulate(self.final_norm(x_bsd), shift_bsd, scale_bsd)
        return self.lm_head(x_bsd.astype(jnp.float32))[:, 1:]


# ---------------------------------------------------------------- parameters


def token_spec(config: Config) -> TokenSpec:
    """One sample's tokens: ids (n,) in raster order."""
    return TokenSpec((config.num_tokens,), "int32", config.codebook_size)


def _boxed_init(config: Config, key: jax.Array) -> Any:
    tokens_bn = jnp.zeros((1, config.num_tokens), jnp.int32)
    orders_bn = jnp.arange(config.num_tokens)[None]
    return RAR(config).init(key, tokens_bn, jnp.zeros((1,), jnp.int32), orders_bn)["params"]


def init(config: Config, key: jax.Array) -> Params:
    """Return float32 parameters: normal(0, 0.02) weights and tables; biases, cls_token and adaLN zero."""
    return nn.meta.unbox(_boxed_init(config, key))


def axes(config: Config) -> Params:
    """Return a tuple of logical axis names for each array of `init`."""
    return logical_axes(functools.partial(_boxed_init, config))


def decay_mask(config: Config) -> Params:
    """Return True where weight decay applies: the kernels of blocks and head, and cls_token."""

    def decays(path: Any, _: Any) -> bool:
        names = [p.key for p in path]
        return names == ["cls_token"] or (names[-1] == "kernel" and names[0] != "final_adaln")

    return jax.tree_util.tree_map_with_path(decays, axes(config), is_leaf=lambda x: isinstance(x, tuple))


def adapt(config: Config, params: Params, *, other_config: Config, other_params: Params) -> Params:
    """Fit the parameters of another RAR to this config, as a start for fine-tuning.

    With another number of classes, class rows are those of `params` (fresh) and the null class is copied. With another
    grid, the position tables and the table of steps are interpolated bicubically in two dimensions.

    Raises: ConfigError naming a size that cannot be changed.
    """
    for name in ("width", "depth", "num_heads", "mlp_width", "codebook_size"):
        ours, theirs = getattr(config, name), getattr(other_config, name)
        require(ours == theirs, f"init_from has {name} {theirs}, config.generator.{name} is {ours}: make them equal")
    out = dict(other_params)
    if config.num_classes != other_config.num_classes:
        codes, rows_of = config.codebook_size + 1, other_params["embeddings"]
        out["embeddings"] = jnp.concatenate([rows_of[:codes], params["embeddings"][codes:-1], rows_of[-1:]])
    if config.num_tokens != other_config.num_tokens:
        old, new = math.isqrt(other_config.num_tokens), math.isqrt(config.num_tokens)
        sizes = other_config.num_tokens, config.num_tokens
        require(sizes == (old**2, new**2), f"init_from has {sizes[0]} tokens, not {sizes[1]}: both must be squares")
        for name in ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings"):
            grid_yxd = other_params[name][2:].reshape(old, old, config.width)  # rows 0 and 1 belong to cls and class
            grid_yxd = jax.image.resize(grid_yxd, (new, new, config.width), "cubic")
            out[name] = jnp.concatenate([other_params[name][:2], grid_yxd.reshape(new * new, config.width)])
    return out


# ---------------------------------------------------------------- training


def random_ratio(config: Config, step: jax.Array | int) -> jax.Array:
    """Probability that a sequence is put in random order: 1, then linear to 0 (RAR, section 3.3). float32 scalar."""
    span = max(config.anneal_end - config.anneal_start, 1)
    return jnp.clip((config.anneal_end - jnp.asarray(step, jnp.float32)) / span, 0.0, 1.0)


def random_orders(config: Config, key: jax.Array, ratio: jax.Array | float, batch: int) -> jax.Array:
    """Return orders (b, n) int32: with probability `ratio` a uniform permutation, else raster."""
    key_which, key_order = jax.random.split(key)
    shuffled_bn = jnp.argsort(jax.random.bits(key_order, (batch, config.num_tokens)), axis=1)
    raster_bn = jnp.broadcast_to(jnp.arange(config.num_tokens)[None], shuffled_bn.shape)
    is_random_b = jax.random.uniform(key_which, (batch,)) < ratio
    return jnp.where(is_random_b[:, None], shuffled_bn, raster_bn)


def loss(
    config: Config,
    params: Params,
    batch: Mapping[str, jax.Array],
    *,
    key: jax.Array,
    step: jax.Array | int,
    train: bool,
    **_: Any,
) -> tuple[jax.Array, Aux]:
    """Return the mean cross-entropy in nats a token (RAR, section 3), and metrics {"loss", "bits", "random_ratio"}.

    Args:
      batch: "tokens" int (b, n) in raster order, "labels" int (b,); optionally "orders" int (b, n) and "drop" bool (b,)
        (labels that become the null class) in place of drawn ones.
      key: for orders, dropped labels and dropout.
      step: sets the share of random orders.
      train: False evaluates: no dropout of any kind, raster order.
    """
    tokens_bn, orders_bn, ratio = batch["tokens"].astype(jnp.int32), batch.get("orders"), random_ratio(config, step)
    key_order, key_label, key_dropout = jax.random.split(key, 3)
    if orders_bn is None:
        orders_bn = random_orders(config, key_order, ratio if train else 0.0, tokens_bn.shape[0])
    labels_b = drop_labels(batch, key_label, rate=config.label_dropout if train else 0.0, null=config.num_classes)
    model = RAR(config, deterministic=not train, dtype=jnp.dtype(config.dtype))
    rngs = {"dropout": key_dropout} if train else None
    logits_bnv: Any = model.apply({"params": params}, tokens_bn, labels_b, orders_bn, rngs=rngs)
    value = cross_entropy(logits_bnv, jnp.take_along_axis(tokens_bn, orders_bn, axis=1))
    metrics = {"loss": value, "bits": value / math.log(2)}
    return value, Aux(metrics | {"random_ratio": ratio} if train else metrics)


def validation_variants(config: Config, size: int, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Return validation variants by name, as additions to a batch: raster order, and fixed random orders."""
    return {"raster": {}, "random": {"orders": random_orders(config, key, 1.0, size)}}


def logits(
    config: Config, params: Params, tokens: jax.Array, labels: jax.Array, orders: jax.Array | None = None
) -> jax.Array:
    """Return teacher-forced logits, float32 (b, n, v), without dropout.

    tokens: int (b, n) in raster order. orders: int (b, n); row i predicts the token at raster position orders[b, i];
      default raster order.
    """
    if orders is None:
        orders = jnp.broadcast_to(jnp.arange(config.num_tokens)[None], tokens.shape)
    out: Any = RAR(config).apply({"params": params}, jnp.asarray(tokens), jnp.asarray(labels), jnp.asarray(orders))
    return out


def attention(config: Config, params: Params, tokens: jax.Array, labels: jax.Array, orders: jax.Array) -> jax.Array:
    """Return attention weights, float32 (layers, b, h, s, s), recomputed from the q and k of `logits`.

    Row i belongs to sequence position i (0 cls, 1 class, i the token at raster position orders[:, i - 2]) and sums to 1
    over positions 0..i.
    """

    seen: Any
    capture: Any = {"capture_intermediates": lambda module, _: module.name in ("q_norm", "k_norm")}
    _, seen = RAR(config).apply({"params": params}, tokens, labels, orders, **capture, mutable=["intermediates"])
    layers = seen["intermediates"]["transformer"]["blocks"]["attn"]
    return jax.vmap(attention_weights)(layers["q_norm"]["__call__"][0], layers["k_norm"]["__call__"][0])


# ---------------------------------------------------------------- sampling


def prepare(config: Config, params: Params, *, dtype: Any = None, scanned: bool | None = None) -> Params:
    """Convert parameters to the decoding layout of `sample`: kernels (*out, *in), one tree per layer.

    With `scanned` (default: on TPUs and GPUs), one tree of stacked layers, which are compiled once.

    With `dtype` "bfloat16" the blocks multiply and cache in bfloat16; sums, activations, norms, tables and the head
    stay float32 (docs/measurements/bfloat16.md). Prepared parameters are returned unchanged.
    """
    del config
    if "layers" in params:
        return params
    tables: Params = {name: jnp.asarray(x) for name, x in params.items() if not isinstance(x, dict)}
    outer: Params = {
        name: {**params[name], "kernel": decoding.outputs_first(jnp.asarray(params[name]["kernel"]))}
        for name in ("final_adaln", "lm_head")
    }
    blocks = jax.tree.map(jnp.asarray, params["transformer"]["blocks"])
    return {**tables, **outer, "layers": decoding.prepare_blocks(blocks, dtype=dtype, scanned=scanned)}


@dataclasses.dataclass(frozen=True)
class Sampling(SamplingSettings):
    """How RAR draws. The published settings are of each size: weights/rar.py.

    Attributes:
      scale: guidance scale g; None is no guidance, and only the class branch is computed.
      power: 0 holds g from the first step on; p > 0 rises from 1 to g along a cosine of (step / n)^p.
      temperature: logits are divided by it.
      greedy: take the most likely token instead of drawing.
    """

    scale: float | None = None
    power: float = 0.0
    temperature: float = 1.0
    greedy: bool = False


def sample(
    config: Config, params: Params, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, given: Any = None
) -> jax.Array:
    """Draw the tokens of images in raster order with a KV cache (RAR, section 3; guidance: appendix).

    Args:
      params: of `init` or `prepare`. labels: int (b,); `num_classes` is the null class.
      keys: typed PRNG keys (b,), one per sample: a sample does not depend on its batch.
      given: optionally "uniforms" (b, n), in place of draws.

    Returns: int32 (b, n).
    """
    no_tokens = jnp.zeros((len(labels), 0), jnp.int32)
    return _sample_after(config, params, labels, no_tokens, keys, sampling, (given or {}).get("uniforms"))


def complete(
    config: Config, params: Params, labels: jax.Array, *, keys: jax.Array, sampling: Sampling, tokens: Any, known: Any
) -> jax.Array:
    """Draw the tokens that are not known, int32 (b, n). The known ones come back unchanged.

    tokens: int (b, n), any value where not known. known: NumPy bool (b, n), True for the first tokens of each row.
    Raises: ConfigError for known tokens that are not the first ones: RAR draws in raster order.
    """
    places_n = np.arange(config.num_tokens)
    is_prefix = bool((np.asarray(known) == (places_n < np.sum(known[0]))).all())
    require(is_prefix, "rar draws in raster order: it can only complete images whose first tokens are known")
    return _sample_after(config, params, labels, jnp.asarray(tokens)[:, places_n[known[0]]], keys, sampling)


def _sample_after(
    config: Config, params: Params, labels: jax.Array, known_bk: jax.Array, keys: Any, sampling: Sampling,
    uniforms_bn: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Draw the tokens after the first k, which are known."""
    n, known = config.num_tokens, known_bk.shape[1]
    known_bn = jnp.pad(known_bk.astype(jnp.int32), ((0, 0), (0, n - known)))

    def draw(slot: jax.Array, logits_vbg: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = jnp.maximum(slot - 1, 0)  # what slot 0 draws is not used
        logits_gbv = logits_vbg.transpose(2, 1, 0)
        logits_bv = logits_gbv[0]
        if sampling.scale is not None:
            schedule: Any = {"schedule": "power-cosine", "power": sampling.power}
            logits_bv = guide(logits_bv, logits_gbv[1], weigh_guidance(sampling.scale, place / n, **schedule))
        if sampling.greedy:
            tokens_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        else:
            keys_b = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
            uniforms_b = None if uniforms_bn is None else jnp.asarray(uniforms_bn)[:, place]
            tokens_b = draw_ids(logits_bv / sampling.temperature, keys_b, uniforms_b)
        tokens_b = jnp.where(place < known, known_bn[:, place], tokens_b)
        return tokens_b, tokens_b

    labels_b = jnp.asarray(labels, jnp.int32)
    return _slot_by_slot(config, prepare(config, params), labels_b, draw, guided=sampling.scale is not None).T


def cached_logits(config: Config, params: Params, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Return teacher-forced raster logits, float32 (b, n, v), as `sample` computes them: with the cache."""

    def draw(slot: jax.Array, logits_vbg: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tokens[:, jnp.maximum(slot - 1, 0)].astype(jnp.int32), logits_vbg[..., 0].T

    labels_b = jnp.asarray(labels, jnp.int32)
    return _slot_by_slot(config, prepare(config, params), labels_b, draw, guided=False).swapaxes(0, 1)


def _slot_by_slot(config: Config, params: Params, labels_b: jax.Array, draw: Any, *, guided: bool) -> jax.Array:
    """Decode all positions; return what `draw` (see decoding.generate) keeps per token, (n, ...)."""
    table_cd, null = params["embeddings"][config.codebook_size + 1 :], config.num_classes
    # g branches: the class, and with guidance the null class.
    labels_gb = jnp.stack([labels_b, jnp.full_like(labels_b, null)] if guided else [labels_b])
    class_dbg = table_cd[labels_gb].transpose(2, 1, 0)

    def embed(slot: jax.Array, token_b: jax.Array) -> jax.Array:
        # The embedding of the target's place is on every slot but the first.
        positions_d = params["pos_embed"][slot] + params["target_aware_pos_embed"][slot + 1] * (slot > 0)
        token_db1 = params["embeddings"][token_b].T[..., None]
        x_dbg = jnp.where(slot == 1, class_dbg, jnp.broadcast_to(token_db1, class_dbg.shape))
        return jnp.where(slot == 0, params["cls_token"].T[..., None], x_dbg) + positions_d[:, None, None]

    conditions = decoding.conditions(labels_b, table_cd, table_cd[null:] if guided else None)
    slots = config.num_tokens + 1  # nothing is predicted from the last token
    return decoding.generate(params, conditions, slots=slots, embed=embed, draw=draw)[1:]
