"""How the cost of sampling grows: python docs/measurements/scaling.py [--out docs/pictures/scaling.png]

RAR-B's width, random weights, float32, guidance on: seconds an image against batch size, tokens and depth, each of the fastest
of four draws, and the seconds that compiling took. The draws go round all cases, so that a machine whose speed drifts does not
bend a curve. Writes the picture and prints the table.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from rar_jax.generators import rar
from rar_jax.keys import sample_keys

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="docs/pictures/scaling.png")
args = parser.parse_args()

BASE = rar.Config(depth=4)
SAMPLING = rar.Sampling(16.0, power=2.75)


class Case(NamedTuple):
    """One point: what it takes to draw, and how long it took to compile."""

    size: int
    images: int
    draw: Callable[[], jax.Array]
    compiling: float


def compiled(size: int, config: rar.Config, images: int) -> Case:
    params = jax.jit(lambda key: rar.prepare(config, rar.init(config, key)))(jax.random.key(0))
    given = jnp.arange(images), sample_keys(0, jnp.arange(images))

    def draw(params: rar.Params, labels: jax.Array, keys: jax.Array) -> jax.Array:
        return rar.sample(config, params, labels, keys=keys, sampling=SAMPLING)

    began = time.perf_counter()
    program = jax.jit(draw).lower(params, *given).compile()
    return Case(size, images, functools.partial(program, params, *given), time.perf_counter() - began)


def seconds(draw: Callable[[], jax.Array]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(draw())
    return time.perf_counter() - began


change = functools.partial(dataclasses.replace, BASE)
curves = {
    "images in a batch": [compiled(n, BASE, n) for n in (1, 2, 4, 8, 16, 32)],
    "tokens an image": [compiled(n, change(num_tokens=n), 2) for n in (64, 128, 256, 512, 1024)],
    "layers": [compiled(n, change(depth=n), 2) for n in (2, 4, 8, 16, 24)],
}
rounds = [{name: [seconds(case.draw) for case in cases] for name, cases in curves.items()} for _ in range(4)]

figure, axes = plt.subplots(1, len(curves), figsize=(12, 3.6), layout="constrained")
print("| what grows | | seconds a draw | seconds an image | compiling, s |\n|---|---|---|---|---|")
for axis, (name, cases) in zip(axes, curves.items(), strict=True):
    fastest = [min(times) for times in zip(*(taken[name] for taken in rounds), strict=True)]
    an_image = [taken / case.images for taken, case in zip(fastest, cases, strict=True)]
    for case, taken, one in zip(cases, fastest, an_image, strict=True):
        print(f"| {name} | {case.size} | {taken:.2f} | {one:.3f} | {case.compiling:.1f} |", flush=True)
    sizes = [case.size for case in cases]
    axis.loglog(sizes, an_image, "o-", base=2, label="measured")
    if name != "images in a batch":
        line = [an_image[-1] * size / sizes[-1] for size in sizes]
        axis.loglog(sizes, line, "--", base=2, color="grey", label="in proportion")
    axis.set(xlabel=name, ylabel="seconds an image", xticks=sizes, xticklabels=sizes)
    axis.legend(frameon=False)
figure.suptitle(
    f"RAR-B's width, {BASE.depth} layers, 256 tokens, 2 images where not said otherwise; {jax.devices()[0].device_kind}"
)
figure.savefig(args.out, dpi=120)
