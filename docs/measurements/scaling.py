"""How the cost of sampling grows: python docs/measurements/scaling.py [--out docs/pictures/scaling.png]

RAR-B's width, random weights, float32, guidance on: seconds a draw against batch size, tokens and depth, each the faster of
two draws after compilation, and the seconds that compiling took. Writes the picture and prints the table.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from rar_jax.generators import rar
from rar_jax.guidance import Guidance
from rar_jax.sampling.sampler import sample_keys

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="docs/pictures/scaling.png")
args = parser.parse_args()

BASE = rar.Config(depth=4)
GUIDANCE = Guidance(16.0, power=2.75)


def measure(config: rar.Config, images: int) -> tuple[float, float]:
    """Seconds a draw, and to compile."""
    params = jax.jit(lambda key: rar.prepare(config, rar.init(config, key)))(jax.random.key(0))
    given = jnp.arange(images), sample_keys(0, jnp.arange(images))

    def draw(params: rar.Params, labels: jax.Array, keys: jax.Array) -> jax.Array:
        return rar.sample(config, params, labels, keys=keys, guidance=GUIDANCE)

    began = time.perf_counter()
    compiled = jax.jit(draw).lower(params, *given).compile()
    compiling = time.perf_counter() - began
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, *given))
        seconds.append(time.perf_counter() - began)
    return min(seconds), compiling


change = functools.partial(dataclasses.replace, BASE)
curves = {
    "images in a batch": [(n, BASE, n) for n in (1, 2, 4, 8, 16, 32)],
    "tokens an image": [(n, change(num_tokens=n), 2) for n in (64, 256, 1024)],
    "layers": [(n, change(depth=n), 2) for n in (2, 4, 8, 16)],
}
figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.6), layout="constrained")
print("| what grows | | seconds a draw | seconds for each of it | compiling, s |\n|---|---|---|---|---|")
for axis, (name, cases) in zip(axes, curves.items(), strict=True):
    seconds = []
    for size, config, images in cases:
        taken, compiling = measure(config, images)
        seconds.append(taken)
        print(f"| {name} | {size} | {taken:.2f} | {taken / size:.4f} | {compiling:.1f} |", flush=True)
    sizes = [size for size, _, _ in cases]
    axis.loglog(sizes, seconds, "o-", base=2, label="measured")
    axis.loglog(
        sizes, [seconds[-1] * size / sizes[-1] for size in sizes], "--", base=2, color="grey", label="in proportion"
    )
    axis.set(xlabel=name, ylabel="seconds a draw", xticks=sizes, xticklabels=sizes)
    axis.legend(frameon=False)
figure.suptitle(
    f"RAR-B's width, {BASE.depth} layers, 256 tokens, 2 images where not said otherwise; {jax.devices()[0].device_kind}"
)
figure.savefig(args.out, dpi=120)
