"""The FID network a second time, in plain NumPy and float64, by the released names: written from the description of the
network (kernel sizes, strides, pools) and not from rar_jax's, so that the two can only agree if both are right.

Shapes: b batch, y x height width, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Array = np.ndarray


def features(state: Mapping[str, Array], images: Array) -> dict[str, Array]:
    """uint8 (b, y, x, 3) -> {"pool3" (b, 2048), "spatial" (b, 2023), "logits" (b, 1008)} of the adm protocol, float64."""
    net = _Network(state)
    parts = [_features(net, images[i : i + 4]) for i in range(0, len(images), 4)]  # few at a time, for memory
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _features(net: _Network, images: Array) -> dict[str, Array]:
    x = (_resize(images.astype(np.float64)) - 128) / 128
    x = net.conv("Conv2d_1a_3x3", x, stride=2, pad=(0, 0))
    x = net.conv("Conv2d_2a_3x3", x, pad=(0, 0))
    x = net.conv("Conv2d_2b_3x3", x)
    x = net.conv("Conv2d_3b_1x1", _max_pool(x, 2))
    x = net.conv("Conv2d_4a_3x3", x, pad=(0, 0))
    x = _max_pool(x, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = net.branches(
            name, x, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], [f"branch3x3dbl_{i}" for i in (1, 2, 3)]]
        )
    x = np.concatenate(
        [
            net.conv("Mixed_6a.branch3x3", x, stride=2, pad=(0, 0)),
            net.conv(
                "Mixed_6a.branch3x3dbl_3",
                net.chain("Mixed_6a", x, ["branch3x3dbl_1", "branch3x3dbl_2"]),
                stride=2,
                pad=(0, 0),
            ),
            _max_pool(x, 2),
        ],
        axis=-1,
    )
    spatial = x
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        if name == "Mixed_6d":
            spatial = net.conv("Mixed_6d.branch1x1", x)[..., :7]
        chains = [["branch1x1"], [f"branch7x7_{i}" for i in (1, 2, 3)], [f"branch7x7dbl_{i}" for i in range(1, 6)]]
        x = net.branches(name, x, chains)
    x = np.concatenate(
        [
            net.conv("Mixed_7a.branch3x3_2", net.chain("Mixed_7a", x, ["branch3x3_1"]), stride=2, pad=(0, 0)),
            net.conv(
                "Mixed_7a.branch7x7x3_4",
                net.chain("Mixed_7a", x, [f"branch7x7x3_{i}" for i in (1, 2, 3)]),
                stride=2,
                pad=(0, 0),
            ),
            _max_pool(x, 2),
        ],
        axis=-1,
    )
    for name in ("Mixed_7b", "Mixed_7c"):
        stem3, stem_dbl = net.chain(name, x, ["branch3x3_1"]), net.chain(name, x, ["branch3x3dbl_1", "branch3x3dbl_2"])
        parts = [net.conv(f"{name}.branch1x1", x)]
        parts += [net.conv(f"{name}.branch3x3_{part}", stem3) for part in ("2a", "2b")]
        parts += [net.conv(f"{name}.branch3x3dbl_{part}", stem_dbl) for part in ("3a", "3b")]
        pooled = _mean_pool(x) if name == "Mixed_7b" else _max_pool(np.pad(x, _border(1), constant_values=-np.inf), 1)
        x = np.concatenate([*parts, net.conv(f"{name}.branch_pool", pooled)], axis=-1)
    pool3 = x.mean(axis=(1, 2))
    return {"pool3": pool3, "spatial": spatial.reshape(len(x), -1), "logits": pool3 @ net.state["fc.weight"].T}


class _Network:
    def __init__(self, state: Mapping[str, Array]) -> None:
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def conv(self, name: str, x: Array, *, stride: int = 1, pad: tuple[int, int] | None = None) -> Array:
        """Convolution without a bias, BatchNorm (eps 1e-3), ReLU; padded by k // 2 unless told otherwise."""
        kernel = self.state[f"{name}.conv.weight"]  # (out, in, y, x)
        height, width = kernel.shape[2:]
        py, px = (height // 2, width // 2) if pad is None else pad
        x = np.pad(x, ((0, 0), (py, py), (px, px), (0, 0)))
        rows, columns = (x.shape[1] - height) // stride + 1, (x.shape[2] - width) // stride + 1
        out = np.zeros((len(x), rows, columns, len(kernel)))
        for i in range(height):  # a sum over the kernel's places of matrix products
            for j in range(width):
                seen = x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
                # Whole in memory both: of anything else NumPy's product is a loop of its own, not BLAS.
                flat = np.ascontiguousarray(seen).reshape(-1, x.shape[-1])
                out += (flat @ np.ascontiguousarray(kernel[:, :, i, j].T)).reshape(out.shape)
        norm = {part: self.state[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")}
        scaled = (out - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3)
        return np.maximum(scaled * norm["weight"] + norm["bias"], 0)

    def chain(self, name: str, x: Array, parts: list[str]) -> Array:
        for part in parts:
            x = self.conv(f"{name}.{part}", x)
        return x

    def branches(self, name: str, x: Array, chains: list[list[str]]) -> Array:
        """The chains side by side, and the mean pool with its convolution."""
        outs = [self.chain(name, x, chain) for chain in chains]
        return np.concatenate([*outs, self.conv(f"{name}.branch_pool", _mean_pool(x))], axis=-1)


def _border(width: int) -> list[tuple[int, int]]:
    return [(0, 0), (width, width), (width, width), (0, 0)]


def _max_pool(x: Array, stride: int) -> Array:
    """3 x 3, without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return windows[:, ::stride, ::stride].max(axis=(-2, -1))


def _mean_pool(x: Array) -> Array:
    """3 x 3 with stride 1; what lies beyond the border does not count."""

    def total(a: Array) -> Array:
        return np.lib.stride_tricks.sliding_window_view(np.pad(a, _border(1)), (3, 3), axis=(1, 2)).sum(axis=(-2, -1))

    return total(x) / total(np.ones((1, *x.shape[1:3], 1)))


def _resize(images: Array, size: int = 299) -> Array:
    """TensorFlow 1: pixel i is read at i * in / size, lerp in x and then in y."""
    for axis in (2, 1):
        length = images.shape[axis]
        at = np.arange(size) * float(np.float32(length / size))
        below = np.minimum(at.astype(int), length - 1)
        low, high = (np.take(images, np.minimum(below + step, length - 1), axis=axis) for step in (0, 1))
        shape = [1, 1, 1, 1]
        shape[axis] = size
        images = low + (high - low) * (at - below).reshape(shape)
    return images
