"""Inception features a second beside torch-fidelity's network, in turn: python docs/measurements/inception.py --torch PYTHON

PYTHON: of an environment with torch and torch-fidelity. Both sides resize (TensorFlow 1's bilinear) and compute pool3,
spatial features and logits of the same uint8 images, with random weights, on all cores, in a process of their own that lives
through all rounds; one rests while the other works. (torchvision, which torch-fidelity's package imports and its network does
not need, is left out by an empty package in its place.)
"""

import argparse
import statistics
import subprocess
import sys

OURS = """
import sys, jax, jax.numpy as jnp, numpy as np, time
from rar_jax.metrics.features import extract_features
from rar_jax.networks.inception import Inception
batch = int(sys.argv[1])
params = Inception().init(jax.random.key(0), jnp.zeros((1, 299, 299, 3)))["params"]
images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)
compiled = jax.jit(extract_features)
work = lambda: jax.block_until_ready(compiled(params, images))
"""
THEIRS = """
import sys, types, pathlib, importlib.util, torch, time, numpy as np
root = pathlib.Path(importlib.util.find_spec("torch_fidelity").submodule_search_locations[0])
package = types.ModuleType("torch_fidelity")
package.__path__ = [str(root)]
sys.modules["torch_fidelity"] = package
import torch_fidelity.feature_extractor_inceptionv3 as module
module.load_state_dict_from_url = lambda *a, **k: None
Network = module.FeatureExtractorInceptionV3
batch = int(sys.argv[1])
Network.load_state_dict = lambda *a, **k: None
network = Network("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=None).eval()
if sys.argv[2] == "channels_last":
    network = network.to(memory_format=torch.channels_last)
images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, 256, 256), np.uint8))
def work():
    with torch.inference_mode():
        network(images)
"""
LOOP = """
work()
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    work()
    print(batch / (time.perf_counter() - began), flush=True)
"""

parser = argparse.ArgumentParser()
parser.add_argument("--torch", required=True)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--rounds", type=int, default=7)
args = parser.parse_args()
commands = {
    "rar_jax": [sys.executable, "-c", OURS + LOOP, str(args.batch)],
    "torch-fidelity": [args.torch, "-c", THEIRS + LOOP, str(args.batch), "plain"],
    "torch-fidelity, channels last": [args.torch, "-c", THEIRS + LOOP, str(args.batch), "channels_last"],
}
children = {
    name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for name, command in commands.items()
}
rates: dict[str, list[float]] = {name: [] for name in children}
for child in children.values():
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
for _ in range(args.rounds):
    for name, child in children.items():
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        rates[name].append(float(child.stdout.readline()))
for child in children.values():
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
print(f"images/s of 256 x 256, batch {args.batch}, {args.rounds} rounds in turn\n")
print("| | slowest | median | fastest | ours over theirs, median of rounds |\n|---|---|---|---|---|")
for name, found in rates.items():
    ratio = statistics.median(a / b for a, b in zip(rates["rar_jax"], found, strict=True))
    print(f"| {name} | {min(found):.2f} | {statistics.median(found):.2f} | {max(found):.2f} | {ratio:.2f} |")
