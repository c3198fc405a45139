"""Seconds to trace and compile the samplers of the released sizes, nothing allocated: python docs/measurements/compiling.py"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from rar_jax.generators import rar
from rar_jax.keys import sample_keys
from rar_jax.weights.rar import FILES

parser = argparse.ArgumentParser()
parser.add_argument("--models", nargs="+", default=["rar_b", "rar_xxl"])
parser.add_argument("--scanned", action="store_true", help="layers scanned, as on TPUs and GPUs")
parser.add_argument("--images", nargs="+", type=int, default=[1, 8, 32])
args = parser.parse_args()
print("| model | images | tracing, s | compiling, s |\n|---|---|---|---|")
for name in args.models:
    config = FILES[name].config
    params = jax.eval_shape(functools.partial(rar.init, config), jax.random.key(0))
    params = jax.eval_shape(functools.partial(rar.prepare, config, scanned=args.scanned), params)
    for images in args.images:
        labels = jax.ShapeDtypeStruct((images,), jnp.int32)
        keys = jax.eval_shape(functools.partial(sample_keys, 0, jnp.arange(images)))
        draw = functools.partial(rar.sample, config, sampling=rar.Sampling(16.0, power=2.75))
        began = time.perf_counter()
        lowered = jax.jit(lambda p, l, k, draw=draw: draw(p, l, keys=k)).lower(params, labels, keys)  # noqa: E741
        traced = time.perf_counter()
        lowered.compile()
        print(f"| {name} | {images} | {traced - began:.1f} | {time.perf_counter() - traced:.1f} |", flush=True)
