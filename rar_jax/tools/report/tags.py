"""HTML elements. Text is escaped when they are serialized, so names from files are never markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element


def make_tag(tag: str, /, *children: Any, **attributes: Any) -> Element:
    """Make an element from elements and texts. None is left out; class_ and stroke_width become class, stroke-width."""
    named = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items() if value is not None}
    element = Element(tag, named)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child is not None and len(element):
            element[-1].tail = (element[-1].tail or "") + str(child)
        elif child is not None:
            element.text = (element.text or "") + str(child)
    return element


def make_table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, mark: bool = False) -> Element:
    """Make a table. mark: highlight rows whose values, those after the first, differ."""
    body = [
        make_tag(
            "tr", *map(_make_cell, row), class_="differs" if mark and len(set(map(format_value, row[1:]))) > 1 else None
        )
        for row in rows
    ]
    return make_tag(
        "div", make_tag("table", make_tag("tr", *(make_tag("th", name) for name in head)), *body), class_="long"
    )


def format_value(value: Any) -> str:
    """Format a number, or a value of JSON."""
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _make_cell(value: Any) -> Element:
    text = format_value(value)
    short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)  # a sha256
    return make_tag("td", short, title=text if short != text else None)
