"""For `mkdocs build`: `<!-- from README.md: Try it -->` in a page is that section of the README, `<!-- from CHANGELOG.md -->` the file.

What the README says stands once. Links there are of the repository's root, here of docs/.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = pathlib.Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's text with the sections that it names put in, and what Python-Markdown wants before a list."""
    text = re.sub(r"<!-- from (\S+?)(?:: (.+?))? -->", lambda found: section(found[1], found[2]), markdown)
    # A list may follow a paragraph as it does on GitHub, without an empty line. Indented lines are code, or go on with an item.
    return re.sub(r"^((?![*\-|#] |\d+\. )\S.*\n)(?=(?:[*-]|\d+\.) )", r"\1\n", text, flags=re.MULTILINE)


def section(name: str, title: str | None) -> str:
    """A file, or its section of that title without the heading. Raises: PluginError if there is none."""
    text = (ROOT / name).read_text()
    if title is None:
        return text
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"{name} has no section '{title}'")
    return found[1].strip().replace("](docs/", "](")
