"""The FID network against torch-fidelity, its resize against TensorFlow 1, and the metrics against NumPy."""

from __future__ import annotations

import ast
import math
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rar_jax.metrics import frechet
from rar_jax.metrics import inception_score as inception
from rar_jax.metrics.features import extract_features, resize_half_pixel, resize_tf1
from rar_jax.metrics.kid import kid
from rar_jax.metrics.precision_recall import precision_recall
from rar_jax.weights import inception as weights
from tests.golden import Arrays, Check, count_other_dtypes, max_difference, to_nhwc

FILES = (
    "inception_names_shapes.npz", "inception_small_tensors.npz", "inception_features.npz",
    "tf1_resize.npz", "metrics.npz",
)  # fmt: skip
FEATURES = {"pool3": "pool3", "spatial": "spatial", "logits": "logits_unbiased"}  # our name: theirs


def measure(folder: pathlib.Path) -> Iterator[Check]:
    """Yield the checks of one folder."""
    yield from _measure_network(make_state(folder), Arrays(folder / "inception_features.npz"))
    yield from _measure_resize(Arrays(folder / "tf1_resize.npz"))
    metrics = Arrays(folder / "metrics.npz")
    yield from _measure_frechet(metrics)
    yield from _measure_inception_score(metrics)
    yield from _measure_neighbours(metrics)


def make_state(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Make the network's random tensors by released name: the small ones are stored, the others follow a recipe."""
    known, state = Arrays(folder / "inception_names_shapes.npz"), dict(Arrays(folder / "inception_small_tensors.npz"))
    for name, text in zip(known["names"].tolist(), known["shapes"].tolist(), strict=True):
        shape = ast.literal_eval(text)
        if name not in state:
            normal = np.random.default_rng([zlib.crc32(name.encode()), 3]).standard_normal(shape, dtype=np.float32)
            state[name] = normal * np.float32(np.sqrt(2 / math.prod(shape[1:])))
    return state


# ---------------------------------------------------------------- network and resize


def _measure_network(state: dict[str, np.ndarray], arrays: Arrays) -> Iterator[Check]:
    for name, checksum in arrays["conv_weight_checksums"].tolist():
        difference = abs(state[name].sum(dtype=np.float64) - float(checksum))
        yield Check("Inception, checksums of the random weights", 1e-6, difference)
    images = {size: to_nhwc(x) for size, x in arrays.with_prefix("images_nchw_").items()}
    extract: Any = jax.jit(extract_features)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "inception.safetensors"
        safetensors.numpy.save_file(state, path)
        params = jax.device_put(weights.load(path))
        for size, x in images.items():
            yield from _measure_float32(extract(params, x), arrays, size)
        with jax.enable_x64(True):
            params = jax.device_put(weights.load(path, dtype=np.float64))
            for size, x in images.items():
                yield from _measure_float64(extract(params, x), arrays, size)


def _measure_float32(ours: dict[str, Any], arrays: Arrays, size: str) -> Iterator[Check]:
    yield Check("Inception, outputs of another dtype", 0, count_other_dtypes(np.float32, *ours.values()))
    expected = arrays[f"pool3_f32_{size}"]
    yield Check("Inception, float32, pool3", 2e-3, max_difference(ours["pool3"], expected))
    mean = float(np.abs(np.asarray(ours["pool3"]) - expected).mean())
    yield Check("Inception, float32, pool3, mean difference", 1e-4, mean)
    for name in ("spatial", "logits"):
        # Made in float64 on a grid of float64: most of the difference is the grid.
        difference = max_difference(ours[name], arrays[f"{FEATURES[name]}_f64_{size}"])
        yield Check(f"Inception, float32, {name} against float64", 2e-3, difference)


def _measure_float64(ours: dict[str, Any], arrays: Arrays, size: str) -> Iterator[Check]:
    yield Check("Inception, outputs of another dtype", 0, count_other_dtypes(np.float64, *ours.values()))
    for name, theirs in FEATURES.items():
        expected = arrays[f"{theirs}_f64_{size}"]
        relative = max_difference(ours[name], expected) / np.abs(expected).max()
        yield Check(f"Inception, float64, {name}, over the largest", 1e-9, relative)


def _measure_resize(arrays: Arrays) -> Iterator[Check]:
    images, expected = jnp.asarray(to_nhwc(arrays["image_nchw"]), jnp.float32), to_nhwc(arrays["resized_nchw"])
    difference = max_difference(resize_tf1(images)[:, ::13, ::13], expected)
    yield Check("TensorFlow-1 resize, of 0..255", 2e-5, difference)
    half_pixel = np.asarray(resize_half_pixel(images)[:, ::13, ::13])
    alike = np.abs(half_pixel - expected).mean() <= 1
    yield Check("images that half-pixel resize cannot be told apart by", 0, alike)


# ---------------------------------------------------------------- metrics


def _fit_gaussian(x_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x_nd = x_nd.astype(np.float64)
    return x_nd.mean(axis=0), np.cov(x_nd.T)


def _measure_frechet(metrics: Arrays) -> Iterator[Check]:
    reference, samples = metrics["reference"], metrics["samples"]
    cases = {
        "fid": (reference, samples),
        "fid_same": (reference, reference),
        "fid_rank_deficient": (reference[:10], samples[:14]),
    }
    in_graph = jax.jit(frechet.frechet_distance_in_graph)
    for name, (x, y) in cases.items():
        moments = (*_fit_gaussian(x), *_fit_gaussian(y))
        # Roots of eigenvalues that are zero but for rounding (1e-16) are 1e-8.
        yield Check("Frechet distance", 1e-6, max_difference(frechet.frechet_distance(*moments), metrics[name]))
        ours = in_graph(*(jnp.asarray(x, jnp.float32) for x in moments))
        yield Check("Frechet distance, in graph", 2e-4, max_difference(ours, metrics[name]))
        yield Check("Frechet distances of another dtype", 0, count_other_dtypes(np.float32, ours))


_sum_split = jax.jit(inception.sum_split)


def score_in_batches(logits_nc: np.ndarray, split_size: int, batch: int) -> float:
    """Compute the Inception Score in batches of one size: the tail of every split is padded with NaN, of weight 0."""
    splits = []
    for begin in range(0, len(logits_nc), split_size):
        split = logits_nc[begin : begin + split_size]
        total: Any = inception.init_split_sums(logits_nc.shape[1])
        for start in range(0, len(split), batch):
            rows = split[start : start + batch]
            padded = np.full((batch, logits_nc.shape[1]), np.nan, np.float32)
            padded[: len(rows)] = rows
            sums = _sum_split(jnp.asarray(padded), jnp.arange(batch) < len(rows))
            total = jax.tree.map(jnp.add, total, sums)
        splits.append(total)
    return inception.score_splits(splits)


def _measure_inception_score(metrics: Arrays) -> Iterator[Check]:
    logits = metrics["logits"]
    for size, expected in metrics.with_prefix("inception_score_split").items():
        ours = inception.inception_score(logits, split_size=int(size))
        yield Check("Inception Score", 1e-12, max_difference(ours, expected))
        in_graph = score_in_batches(logits, int(size), 64)
        yield Check("Inception Score, sums in graph", 1e-5, max_difference(in_graph, expected))
        if len(logits) <= int(size):
            default = max_difference(inception.inception_score(logits), expected)
            yield Check("Inception Score, one split by default", 1e-12, default)


def _measure_neighbours(metrics: Arrays) -> Iterator[Check]:
    reference, samples = metrics["reference"], metrics["samples"]
    yield Check("KID, unbiased", 1e-12, max_difference(kid(reference, samples), metrics["kid_unbiased"]))
    for name, ours in precision_recall(reference, samples).items():
        yield Check(f"{name}, k = 3", 1e-15, max_difference(ours, metrics[f"{name}_k3"]))
