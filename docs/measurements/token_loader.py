"""Measures reading tokens for training: the authors' way, JSONL through linecache, against the store and the loader.

    python docs/measurements/token_loader.py

Generates 1,000,000 records of 256 tokens both ways in a temporary folder (2 GB, removed afterwards), reads random batches of
2048 in turn, five rounds, each side in a process of its own, and writes docs/measurements/token_loader.md. Then the placing of
batches on devices, in line and ahead. About ten minutes.
"""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rar_jax.models import TokenSpec

RECORDS, TOKENS, BATCH, ROUNDS = 1_000_000, 256, 2048, 5
CODEBOOK, CLASSES = 1024, 1000
OURS_BATCHES, THEIRS_BATCHES = 480, 25
PLACE_STEPS, PLACE_ROUNDS = 100, 15


def write(folder: pathlib.Path) -> None:
    """The same records as a token store and as JSONL."""
    from rar_jax.tokens.writer import TokenStoreWriter

    card = {
        "spec": dataclasses.asdict(TokenSpec((TOKENS,), "uint16", CODEBOOK)),
        "num_classes": CLASSES,
        "crops": ["whole image"],
    }
    card |= {"class_names": [str(c) for c in range(CLASSES)], "source": "random", "tokenizer_sha256": None}
    writer = TokenStoreWriter(folder / "store", card, source_records=RECORDS)
    with open(folder / "tokens.jsonl", "w") as file:
        for j in writer.missing():
            begin, end = writer.span(j)
            rng = np.random.default_rng(j)
            tokens, labels = rng.integers(0, CODEBOOK, (end - begin, TOKENS)), rng.integers(0, CLASSES, end - begin)
            with writer.shard(j) as shard:
                shard.append(tokens, labels, np.arange(begin, end), np.zeros(end - begin, int))
            for label, row in zip(labels.tolist(), tokens.tolist(), strict=True):
                file.write(json.dumps({"class_id": label, "tokens": row}) + "\n")
    assert writer.finish()


# ---------------------------------------------------------------- one side, in a process of its own


def memory() -> dict[str, float]:
    """MB of this process: anonymous pages, pages of mapped files, the highest sum of both."""
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile", "VmHWM")}


def ours(folder: pathlib.Path, seed: int) -> Iterator[dict[str, np.ndarray]]:
    from rar_jax.data.loader import batches
    from rar_jax.tokens.store import TokenStore

    return batches(TokenStore(folder / "store"), global_batch=BATCH, seed=seed, start_step=0)


def theirs(folder: pathlib.Path, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """linecache keeps every line in memory; json.loads of one line a sample; stacked to a batch."""
    path = str(folder / "tokens.jsonl")
    order = np.random.default_rng(seed).permutation(len(linecache.getlines(path)))
    for start in range(0, len(order), BATCH):
        rows = [json.loads(linecache.getline(path, int(i) + 1)) for i in order[start : start + BATCH]]
        tokens, labels = [row["tokens"] for row in rows], [row["class_id"] for row in rows]
        yield {"tokens": np.array(tokens, np.int32), "labels": np.array(labels, np.int32)}


def side(name: str, folder: pathlib.Path, seed: int) -> dict[str, Any]:
    """Records/s after the first batch, seconds to it, and memory before, in the middle and at the end."""
    import rar_jax.data.loader  # noqa: F401 (so that what it imports is in "before" on both sides)

    count = OURS_BATCHES if name == "ours" else THEIRS_BATCHES
    out: dict[str, Any] = {"before": memory()}
    began = time.perf_counter()
    stream = {"ours": ours, "theirs": theirs}[name](folder, seed)
    batch = next(stream)
    assert batch["tokens"].shape == (BATCH, TOKENS) and batch["tokens"].dtype == np.int32
    out["first"] = time.perf_counter() - began
    began = time.perf_counter()
    for i in range(count):
        next(stream)
        if i == count // 4:
            out["quarter"] = memory()
    return {**out, "rate": count * BATCH / (time.perf_counter() - began), "end": memory()}


def in_process(name: str, folder: pathlib.Path, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, name, str(folder), str(seed)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- placing batches on devices


def placing(folder: pathlib.Path) -> list[float]:
    """Seconds of a loop with the batch placed in line, over those of the loop with batches placed ahead; on 4 CPU devices."""
    import jax
    import jax.numpy as jnp

    from rar_jax.parallel.arrays import make_global_batch, prefetch_batches
    from rar_jax.parallel.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig())
    kernel = jax.device_put(np.ones((TOKENS, 512), np.float32), jax.NamedSharding(mesh, jax.P()))

    @jax.jit
    def step(total: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        return total + jnp.tanh(batch["tokens"].astype(jnp.float32) @ kernel).mean()

    def in_line(stream: Iterator[Any]) -> Iterator[Any]:
        for rows in stream:
            yield make_global_batch({name: array for name, array in rows.items() if name != "ids"}, mesh)

    def loop(place: Callable[[Iterator[Any]], Iterator[Any]], seed: int) -> float:
        placed, total, before = place(ours(folder, seed)), jnp.float32(0), jnp.float32(0)
        for k in range(PLACE_STEPS + 10):
            if k == 10:
                began = time.perf_counter()
            before, total = total, step(total, next(placed))
            float(before)  # as the training loop fetches the metrics of the step before
        float(total)
        return time.perf_counter() - began

    ratios = []
    for k in range(PLACE_ROUNDS + 1):
        ways = [in_line, lambda stream: prefetch_batches(stream, mesh)]
        seconds = [loop(way, k) for way in (ways if k % 2 else ways[::-1])]
        ratios.append(seconds[0] / seconds[1] if k % 2 else seconds[1] / seconds[0])
    return ratios[1:]  # the first one compiled


# ---------------------------------------------------------------- all of it


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    rates = {name: [r["rate"] for r in rows] for name, rows in results.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
    head = " | ".join(f"round {k + 1}" for k in range(ROUNDS))
    lines = [f"| thousand records/s | {head} | median |", "|---|" + "---|" * (ROUNDS + 1)]
    for name, text in (("ours", "store and loader"), ("theirs", "JSONL and linecache")):
        values = " | ".join(f"{v / 1e3:.1f}" for v in rates[name])
        lines.append(f"| {text} | {values} | {statistics.median(rates[name]) / 1e3:.1f} |")
    values = " | ".join(f"{r:.1f}" for r in ratios)
    lines.append(f"| **ratio** | {values} | **{statistics.median(ratios):.1f}** |")
    lines += ["", "| MB, median of the rounds | store and loader | JSONL and linecache |", "|---|---|---|"]
    for when, text in (
        ("before", "before opening"),
        ("quarter", "after a quarter of the batches"),
        ("end", "at the end"),
    ):
        for key, what in (("RssAnon", "of its own"), ("RssFile", "pages of mapped files")):
            both = [statistics.median(r[when][key] for r in results[name]) for name in ("ours", "theirs")]
            lines.append(f"| {what}, {text} | {both[0]:.0f} | {both[1]:.0f} |")
    both = [statistics.median(r["first"] for r in results[name]) for name in ("ours", "theirs")]
    lines.append(f"| seconds to the first batch | {both[0]:.2f} | {both[1]:.2f} |")
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder)
        sizes = [
            sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6 for pattern in ("store/*", "tokens.jsonl")
        ]
        results: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
        for k in range(ROUNDS):
            for way, rows in results.items():
                rows.append(in_process(way, folder, k))
                print(k, way, {key: rows[-1][key] for key in ("rate", "first", "end")}, flush=True)
        ratios = placing(folder)
    lines = table(results)
    share = "written, as read here, by `python docs/measurements/token_loader.py`"
    text = f"""\
# Reading tokens: the store and the loader, or JSONL through linecache

Measured and {share}, on {os.cpu_count()} shared cores, page cache warm. {RECORDS:,} records of {TOKENS}
tokens: {sizes[0]:.0f} MB as a store, {sizes[1]:.0f} MB as JSONL. Random batches of {BATCH}, ours {OURS_BATCHES} in a round (0.98 of an epoch), theirs
{THEIRS_BATCHES}; the sides take turns, each in a process of its own that has imported the same modules, on one thread (ours has another that
prefetches).

The other side is written after what the authors' loader does: `linecache` reads the whole file into memory as lines, and each sample
is one `json.loads`. Theirs runs it in several worker processes, each with a copy of its own; so can ours (`data.workers`).

{chr(10).join(lines)}

Pages of mapped files are the store's own bytes, which the kernel drops when memory is wanted and all processes of a machine
share; they end at the size of the store. What the process itself holds does not grow.

## Batches on their way to the devices

`parallel.processes.prefetch_batches` places batches two ahead. Seconds of a loop that places in line, over seconds with it, {PLACE_ROUNDS} rounds of
{PLACE_STEPS} steps on 4 CPU devices: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}. CPU devices copy
nothing over a bus, so no gain is to be seen here; what it brings on an accelerator is not measured.
"""
    pathlib.Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(side(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        main()
