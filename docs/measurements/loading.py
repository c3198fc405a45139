"""Time and peak memory of loading a RAR file of real size, random numbers: python docs/measurements/loading.py --size xl

Each way of loading runs in a process of its own; the peak is the process's VmHWM, which counts mapped files too.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

from rar_jax.generators.rar import init
from rar_jax.programs.convert import convert_weights
from rar_jax.tokenizers import maskgit_vq as tokenizer
from rar_jax.weights import maskgit_vq, rar
from rar_jax.weights.mapping import param_shapes, released_shapes, write_safetensors

CHILD = """
import re, sys, time, jax
from rar_jax.weights import rar
from rar_jax.weights.loading import open_weights
jax.devices()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20
start, began = peak(), time.monotonic()
params = rar.load(sys.argv[1])[1] if sys.argv[2] == "load" else open_weights(sys.argv[1], "generators").place()
size = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**30
print(f"{size:.2f} GiB | {peak():.2f} GiB | {(peak() - start) / size:.2f} | {time.monotonic() - began:.1f} s")
"""

parser = argparse.ArgumentParser()
parser.add_argument("--size", choices=("b", "l", "xl", "xxl"), default="xl")
args = parser.parse_args()
config = rar.FILES[f"rar_{args.size}"].config

with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    rng = np.random.default_rng(0)
    state = {
        n: rng.standard_normal(s, dtype=np.float32)
        for n, s in released_shapes(rar.TABLE, param_shapes(init, config)).items()
    }
    write_safetensors(folder / "rar.safetensors", state)
    del state
    small = tokenizer.Config(image_size=32, base_width=32, width_multipliers=(1, 2), latent_width=8)
    maskgit_vq.save(folder / "vq.safetensors", small, tokenizer.init(small, jax.random.key(0)))
    convert_weights(
        str(folder / "rar.safetensors"), folder / "converted", tokenizer=str(folder / "vq.safetensors"), quiet=True
    )
    print(f"| RAR-{args.size.upper()} | parameters | peak | peak over parameters, without the process | time |")
    print("|---|---|---|---|---|")
    for what, path, how in (
        (".safetensors, placed on a device", "rar.safetensors", "place"),
        ("converted directory, placed on a device", "converted", "place"),
        (".safetensors, as NumPy arrays", "rar.safetensors", "load"),
    ):
        command = [sys.executable, "-c", CHILD, str(folder / path), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {what} | {done.stdout.strip()} |", flush=True)
