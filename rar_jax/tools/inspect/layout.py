"""Print a summary: a tree of names and values, with a table for each list of rows."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

# JSON values. Every kind has "kind", "name", "num_problems" and "problems", a list of {"name", "reason"}.
Summary = dict[str, Any]

LISTED = 20  # problems in a summary, rows of a printed table of classes


def print_summary(summary: Summary) -> None:
    """Print a summary to stdout. Lines are not wrapped, so that commands can be copied."""
    tree = Tree(Text(f"{summary['name']} ({summary['kind']})"))
    for key, value in summary.items():
        if key not in ("kind", "name"):
            _add_branch(tree, key, value)
    Console(width=10_000, highlight=False).print(tree)


def _add_branch(tree: Tree, key: str, value: Any) -> None:
    label = key.removeprefix("num_").replace("_", " ")
    if isinstance(value, dict) and any(isinstance(child, dict | list) for child in value.values()):
        branch = tree.add(Text(label))
        for name, child in value.items():
            _add_branch(branch, name, child)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        if key == "classes" and len(value) > LISTED:
            label = f"the {LISTED - 2} smallest classes, the median and the largest"
            value = sorted(value, key=lambda row: row["count"])
            value = [*value[: LISTED - 2], value[len(value) // 2], value[-1]]
        table = Table(*value[0], box=None, padding=(0, 2, 0, 0))
        for row in value:
            table.add_row(*(Text(_format(name, x)) for name, x in row.items()))
        tree.add(Text(label)).add(table)
    elif value not in (None, {}, []):
        tree.add(Text(f"{label}: {_format(key, value)}"))


def _format(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(name, x)}" for name, x in value.items())
    if isinstance(value, list):
        return ", ".join(_format(key, x) for x in value)
    if isinstance(value, float):
        return f"{value:.1%}" if key == "goodput" else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return decimal(value) if key == "bytes" else f"{value:,}"
    return str(value)
