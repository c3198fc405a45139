"""What the reports of `inspect` share: counts, sizes and problems as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# What is told: JSON values, of which "kind", "name" and "problems" are in every report.
Report = dict[str, Any]

LISTED = 20  # problems, and classes of a table; of more classes the smallest, the median and the largest


def spread(count: int, most: int | None) -> np.ndarray:
    """int64, the numbers below `count`, or `most` of them at equal distances."""
    return np.unique(np.linspace(0, count - 1, min(count, most or count)).astype(np.int64))


def three(values: np.ndarray) -> dict[str, int] | None:
    """The smallest, the median and the largest; None of none."""
    if not len(values):
        return None
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def readable(count: int) -> str:
    """A number of bytes, for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def counts(counts: dict[str, int]) -> str:
    """Names with their counts, in a line."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def class_lines(names: Sequence[str], counts: Sequence[int], of: str) -> list[str]:
    """A table of up to LISTED classes; of more, three of them and those that are empty."""
    if len(names) <= LISTED:
        lines = [f"    {count:9,}  {name}" for name, count in zip(names, counts, strict=True)]
    else:
        order = np.argsort(counts, kind="stable")
        places = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
        lines = [f"    {counts[i]:9,}  {names[i]} ({which})" for which, i in places.items()]
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            more = f", and {len(empty) - LISTED:,} more" if len(empty) > LISTED else ""
            lines.append(f"    {len(empty):,} have none: {'; '.join(empty[:LISTED])}{more}")
    return [f"  classes    {len(names):,}, of so many {of}:", *lines]


def problem_lines(report: Report) -> list[str]:
    """How many problems there are, and the first of them."""
    problems = report["problems"]
    lines = [f"    {name}: {reason}" for name, reason in problems["first"]]
    more = problems["total"] - len(lines)
    return [f"  problems   {problems['total']:,}", *lines, *([f"    and {more:,} more: --problems N"] if more else [])]
