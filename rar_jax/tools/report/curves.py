"""The metrics of one or two runs as SVG curves. Curves that compare share a panel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from rar_jax.tools.report.tags import format_value, make_tag

POINTS, HOVERS = 400, 200  # most points of a curve; most steps of a panel with a tooltip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 200, 50, 10, 8, 180  # pixels of a panel, and of the plot in it
COLORS = ("#3b7dd8", "#d9583f", "#23a17a", "#9163c4", "#c08422", "#1897ad", "#cc4f8c", "#7b8494")


class Curve(NamedTuple):
    """A metric of a run. steps, values: float64 (n,), ascending."""

    name: str
    run: int
    steps: np.ndarray
    values: np.ndarray


def draw_stage(runs: Sequence[tuple[str, list[dict[str, Any]]]], stage: str) -> list[Element]:
    """Draw a panel for each metric of a stage, those with validation first.

    Args:
      runs: names of runs, and their rows of metrics.jsonl.
    """
    panels: dict[str, list[Curve]] = {}
    for run, (_, rows) in enumerate(runs):
        curves = read_curves([row for row in rows if row["stage"] == stage], run)
        names = {curve.name for curve in curves}
        for curve in curves:
            panels.setdefault(find_panel(curve.name, names), []).append(curve)
    order = sorted(panels, key=lambda panel: not any("validation/" in curve.name for curve in panels[panel]))
    return [_draw_panel(panel, panels[panel], [name for name, _ in runs]) for panel in order]


def read_curves(rows: Sequence[Mapping[str, Any]], run: int = 0) -> list[Curve]:
    """Collect each metric of a stage. Of a step that was repeated the last row counts."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step", "time") and isinstance(value, int | float):
                points.setdefault(name, {})[row["step"]] = value
    return [Curve(name, run, *np.array(sorted(found.items()), np.float64).T) for name, found in points.items()]


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


def _draw_panel(title: str, curves: list[Curve], runs: list[str]) -> Element:
    steps, values = (np.concatenate([getattr(curve, name) for curve in curves]) for name in ("steps", "values"))
    # A logarithmic scale where half of the points would lie at the bottom.
    log = bool(values.min() > 0 and np.median(values) < values.max() / 10)
    scale = np.log10 if log else np.asarray
    low, high = float(scale(values.min())), float(scale(values.max()))
    room = (high - low or abs(high) or 1) * 0.05
    low, high, first, last = low - room, high + room, steps.min(), max(steps.max(), steps.min() + 1)

    def x(step: Any) -> Any:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: Any) -> Any:
        return TOP + (BOTTOM - TOP) * (high - scale(value)) / (high - low)

    def path(steps: np.ndarray, values: np.ndarray, **style: Any) -> Element:
        points = zip(x(steps), y(values), strict=True)
        return make_tag("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points), **style)

    svg = make_tag("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    ends = (10**low, 10**high) if log else (low, high)
    for tick in (LogLocator(subs=(1, 2, 5), numticks=6) if log else MaxNLocator(4)).tick_values(*ends):
        if ends[0] <= tick <= ends[1]:
            svg.append(
                make_tag("line", class_="tick", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y(tick):.1f}", y2=f"{y(tick):.1f}")
            )
            svg.append(make_tag("text", f"{tick:.4g}", x=LEFT - 6, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    for tick in MaxNLocator(5, integer=True).tick_values(first, last):
        if first <= tick <= last:
            svg.append(
                make_tag(
                    "text", f"{tick:,.0f}", x=f"{min(x(tick), WIDTH - 20):.1f}", y=HEIGHT - 4, text_anchor="middle"
                )
            )
    hues = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys(curve.name for curve in curves))}
    legend = make_tag("div", class_="legend")
    for curve in curves:
        style = {"stroke": hues[curve.name], "stroke_dasharray": "5 3" if curve.run else None}
        smooth = curve.values
        if len(curve.values) > 100 and "validation/" not in curve.name:
            svg.append(path(*thin_points(curve.steps, curve.values), class_="raw", **style))
            smooth = smooth_values(curve.values, -(-len(curve.values) // 40))
        svg.append(path(*thin_points(curve.steps, smooth), class_="line", **style))
        if len(curve.steps) < 30:
            dots = zip(x(curve.steps), y(curve.values), strict=True)
            svg.extend(make_tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2.4, fill=style["stroke"]) for a, b in dots)
        line = "dashed: " if curve.run else ""
        mark = make_tag("i", style=f"background: {hues[curve.name]}")
        legend.append(make_tag("span", mark, line + _label(curve, runs)))
    svg.extend(_make_hovers(curves, runs, x))
    heading = make_tag("h3", title, make_tag("span", " (log scale)" if log else "", class_="legend"))
    return make_tag("div", heading, svg, legend, class_="card", data_panel=title)


def smooth_values(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each point."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(sums))
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def _make_hovers(curves: list[Curve], runs: list[str], x: Any) -> Iterator[Element]:
    """Strips of a panel that show a line and, as tooltip, the values at the nearest step."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, HOVERS).astype(int))]
    edges = [LEFT, *(x(steps[1:]) + x(steps[:-1])) / 2, WIDTH - RIGHT]
    for step, (begin, end) in zip(steps, itertools.pairwise(edges), strict=True):
        texts = [f"step {step:.0f}"]
        for curve in curves:
            i = np.abs(curve.steps - step).argmin()
            at = "" if curve.steps[i] == step else f" (step {curve.steps[i]:.0f})"
            texts.append(f"{_label(curve, runs)}: {format_value(float(curve.values[i]))}{at}")
        rect = make_tag("rect", x=f"{begin:.1f}", y=TOP, width=f"{end - begin:.1f}", height=BOTTOM - TOP)
        cursor = make_tag("line", x1=f"{x(step):.1f}", x2=f"{x(step):.1f}", y1=TOP, y2=BOTTOM)
        yield make_tag("g", make_tag("title", "\n".join(texts)), rect, cursor, class_="hover")


def _label(curve: Curve, runs: list[str]) -> str:
    return f"{curve.name}, {runs[curve.run]}" if len(runs) > 1 else curve.name
