"""The metrics of one or two runs as paths of SVG. Curves that compare share a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

POINTS, HOVERS = 400, 200  # most points of a curve; most steps of a panel with a tooltip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 200, 50, 422, 8, 180  # pixels of a panel, and of the plot in it
COLORS = ("#3b7dd8", "#d9583f", "#23a17a", "#9163c4", "#c08422", "#1897ad", "#cc4f8c", "#7b8494")


class Curve(NamedTuple):
    """A metric of a run. label: its text in legends. run: 0 or 1. steps, values: float64 (n,), steps ascending."""

    name: str
    label: str
    run: int
    steps: np.ndarray
    values: np.ndarray


def make_panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Make the values of page.html for a panel of each metric, those with validation first.

    Args:
      runs: rows of metrics.jsonl of one stage by the name of the run.
    """
    panels: dict[str, list[Curve]] = {}
    for run, (run_name, rows) in enumerate(runs.items()):
        points = collect_points(rows)
        for name, (steps, values) in points.items():
            label = f"{name}, {run_name}" if len(runs) > 1 else name
            panels.setdefault(find_panel(name, set(points)), []).append(Curve(name, label, run, steps, values))
    order = sorted(panels, key=lambda panel: not any("validation/" in curve.name for curve in panels[panel]))
    return [_make_panel(panel, panels[panel]) for panel in order]


def collect_points(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Steps and values (2, n) of each metric. Of a step that was repeated the last row counts."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step", "time") and isinstance(value, int | float):
                points.setdefault(name, {})[row["step"]] = value
    return {name: np.array(sorted(found.items()), np.float64).T for name, found in points.items()}


def find_panel(name: str, names: set[str]) -> str:
    """The metric to compare with: "loss" for "validation/raster_loss", if there is one."""
    bare = name.removeprefix("validation/")
    ends = [other for other in names if bare == other or bare.endswith(f"_{other}")]
    return min(ends, key=len) if name != bare and ends else bare


def thin_points(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the lowest and the highest point of each span of a long curve."""
    if len(steps) <= POINTS:
        return steps, values
    spans = np.array_split(np.arange(len(steps)), POINTS // 2)
    kept = np.unique([span[i] for span in spans for i in (values[span].argmin(), values[span].argmax())])
    return steps[kept], values[kept]


def _make_panel(title: str, curves: list[Curve]) -> dict[str, Any]:
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    values = np.concatenate([curve.values for curve in curves])
    # A logarithmic scale where half of the points would lie at the bottom.
    log = bool(values.min() > 0 and np.median(values) < values.max() / 10)
    scale = np.log10 if log else np.asarray
    low, high = float(scale(values.min())), float(scale(values.max()))
    room = (high - low or abs(high) or 1) * 0.05
    low, high, first, last = low - room, high + room, steps[0], max(steps[-1], steps[0] + 1)

    def x(step: Any) -> Any:
        return np.round(LEFT + (RIGHT - LEFT) * (step - first) / (last - first), 1)

    def y(value: Any) -> Any:
        return np.round(TOP + (BOTTOM - TOP) * (high - scale(value)) / (high - low), 1)

    def draw_line(steps: np.ndarray, values: np.ndarray, curve: Curve, kind: str) -> dict[str, Any]:
        steps, values = thin_points(steps, values)
        points = [f"{a} {b}" for a, b in zip(x(steps), y(values), strict=True)]
        path = "L".join([points[0], *points])  # a single point is a dot
        return {"path": f"M{path}", "kind": kind, "color": colors[curve.name], "dashed": curve.run > 0}

    names = dict.fromkeys(curve.name for curve in curves)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    ends = (10**low, 10**high) if log else (low, high)
    y_ticks = (LogLocator(subs=(1, 2, 5), numticks=6) if log else MaxNLocator(4)).tick_values(*ends)
    x_ticks = MaxNLocator(5, integer=True).tick_values(first, last)
    lines = []
    for curve in curves:
        window = len(curve.steps) // 40
        smooth = window > 2 and "validation/" not in curve.name
        lines.append(draw_line(curve.steps, curve.values, curve, "raw" if smooth else "line"))
        if smooth:
            means = np.convolve(curve.values, np.full(window, 1 / window), "valid")
            lines.append(draw_line(curve.steps[window - 1 :], means, curve, "line"))
    strip, hovers = (RIGHT - LEFT) / HOVERS, []
    for left in np.arange(LEFT, RIGHT, strip):
        step = float(steps[np.abs(x(steps) - left - strip / 2).argmin()])
        hovers.append((f"{left:.1f}", strip, x(step), describe_step(step, curves)))
    return {
        "title": title,
        "log": log,
        "y_ticks": [(y(tick), f"{tick:.4g}") for tick in y_ticks if ends[0] <= tick <= ends[1]],
        "x_ticks": [(x(tick), f"{tick:,.0f}") for tick in x_ticks if first <= tick <= last],
        "lines": lines,
        "legend": [(curve.label, colors[curve.name], curve.run > 0) for curve in curves],
        "hovers": hovers,
    }


def describe_step(step: float, curves: Sequence[Curve]) -> str:
    """The tooltip of a step: each curve's value there, or at its nearest step."""
    lines = [f"step {step:.0f}"]
    for curve in curves:
        i = np.abs(curve.steps - step).argmin()
        at = "" if curve.steps[i] == step else f" (step {curve.steps[i]:.0f})"
        lines.append(f"{curve.label}: {curve.values[i]:.6g}{at}")
    return "\n".join(lines)
