"""HTML elements as text. Everything that is not an element is escaped: names from files are never markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any


class Tag(str):
    """The text of an element."""


def make_tag(name: str, /, *children: Any, **attributes: Any) -> Tag:
    """Make an element. None is left out; class_ and stroke_width become class and stroke-width."""
    named = {key.rstrip("_").replace("_", "-"): html.escape(str(x)) for key, x in attributes.items() if x is not None}
    opening = " ".join([name, *(f'{key}="{value}"' for key, value in named.items())])
    inner = "".join(x if isinstance(x, Tag) else html.escape(str(x)) for x in children if x is not None)
    return Tag(f"<{opening}>" if name in ("img", "input") else f"<{opening}>{inner}</{name}>")


def make_html_table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, mark: bool = False) -> Tag:
    """Make a table. mark: highlight rows whose values after the first differ."""
    lines = [make_tag("tr", *(make_tag("th", name) for name in head))]
    for row in rows:
        differs = mark and any(value != row[1] for value in row[2:])
        lines.append(make_tag("tr", *map(_make_cell, row), class_="differs" if differs else None))
    return make_tag("div", make_tag("table", *lines), class_="long")


def _make_cell(value: Any) -> Tag:
    if isinstance(value, Tag):
        return make_tag("td", value)
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return make_tag("td", re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text), title=text)  # sha256
