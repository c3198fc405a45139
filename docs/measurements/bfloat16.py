"""How many greedy choices change when a RAR of random weights decodes in bfloat16, or from weights of 8 bits: python docs/measurements/bfloat16.py

Random weights of RAR-B's size on every path; the gates of the blocks have a standard deviation of `--gate`, since with the
initial zeros every block would be the identity. Teacher forcing by the cached steps of the sampler, the cache included.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rar_jax.generators import rar

parser = argparse.ArgumentParser()
parser.add_argument("--gate", type=float, nargs="+", default=[0.1, 0.3])
parser.add_argument("--images", type=int, default=8)
args = parser.parse_args()

config = rar.Config()


def random_params(gate: float) -> Any:
    def one(path: Any, spec: jax.ShapeDtypeStruct) -> jax.Array:
        names = [p.key for p in path]
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, "/".join(names))))
        noise = jax.random.normal(key, spec.shape)
        if "adaln" in names[-2]:
            return gate * noise if names[-1] == "bias" else gate / 5 * noise
        return 1 + 0.02 * noise if names[-1] == "scale" else 0.02 * noise

    shapes = jax.eval_shape(functools.partial(rar.init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, spec: one([*path[:1], *path], spec), shapes)


def eight_bits(path: Any, x: jax.Array) -> jax.Array:
    """A kernel (*out, *in) as 8 bits a weight with a scale for each output would hold it."""
    if path[-1].key != "kernel":
        return x
    inputs = tuple(range(x.ndim - (2 if path[-2].key == "proj" else 1), x.ndim))
    scale = jnp.abs(x).max(inputs, keepdims=True) / 127
    return jnp.round(x / scale) * scale


cached_logits = jax.jit(functools.partial(rar.cached_logits, config))
tokens_bn = jax.random.randint(jax.random.key(1), (args.images, config.num_tokens), 0, config.codebook_size)
labels_b = jax.random.randint(jax.random.key(2), (args.images,), 0, config.num_classes)
print("| gate | what is bfloat16 | greedy agreement | max change of a logit | rms change | std of the logits |")
print("|---|---|---|---|---|---|")
for gate in args.gate:
    params = random_params(gate)
    exact = cached_logits(params, tokens_bn, labels_b)
    prepared = rar.prepare(config, params, dtype="bfloat16")
    tables = {name: x for name, x in prepared.items() if name != "layers"}
    whole = rar.prepare(config, params)
    layers = jax.tree_util.tree_map_with_path(eight_bits, whole["layers"])
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tables)
    for name, narrow in (
        ("the blocks' kernels and the cache (`prepare`)", prepared),
        ("and the tables and the head", prepared | rounded),
        ("none; the blocks' kernels in 8 bits", whole | {"layers": layers}),
    ):
        rough = cached_logits(narrow, tokens_bn, labels_b)
        agreement, change = jnp.mean(exact.argmax(-1) == rough.argmax(-1)), rough - exact
        numbers = (
            f"{agreement:.4f} | {jnp.abs(change).max():.4f} | {jnp.sqrt(jnp.mean(change**2)):.4f} | {exact.std():.3f}"
        )
        print(f"| {gate} | {name} | {numbers} |", flush=True)
