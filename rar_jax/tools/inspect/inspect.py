"""The verb `inspect`: what a work directory, a token store or a source of images holds, and what is wrong with it.

Another kind of thing is one more file with a function that makes a report and one that tells it, and one line in KINDS.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from rar_jax.config import require
from rar_jax.data.sources import SPECS
from rar_jax.errors import ConfigError
from rar_jax.tools.inspect.images import class_folders, inspect_images, is_source, tell_images
from rar_jax.tools.inspect.text import Report
from rar_jax.tools.inspect.tokens import inspect_tokens, is_store, tell_tokens
from rar_jax.tools.inspect.workdir import inspect_workdir, is_workdir, tell_workdir


def inspect(what: str, **flags: Any) -> Report:
    """Looks at a thing.

    Args:
      what: any of KINDS. flags: of its kind, as the keywords of its function; None is its default.

    Returns: a report; report["problems"] is {"total": how many, "first": [[name, reason], ...]}.
    Raises: ConfigError for a thing that is not known, or a flag that its kind does not have; what opening it raises.
    """
    kind = next((kind for kind in KINDS if kind.takes(what)), None)
    if kind is None:
        missing = "" if pathlib.Path(what).exists() else ", and there is no such file or folder"
        known = "; ".join(kind.known_as for kind in KINDS)
        raise ConfigError(f"{what} is nothing that inspect knows{missing}. It knows {known}")
    given = {name: value for name, value in flags.items() if value is not None}
    if wrong := [name for name in given if name not in kind.flags]:
        raise ConfigError(f"--{wrong[0].replace('_', '-')} means nothing for {what}: leave it out")
    for name in {"image_size", "limit", "problems"} & given.keys():
        require(given[name] >= 1, f"--{name.replace('_', '-')} is {given[name]}: at least 1")
    return kind.look(what, **given)


def tell(report: Report) -> str:
    """A report as lines of text."""
    return "\n".join(next(kind for kind in KINDS if kind.name == report["kind"]).tell(report))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of thing. known_as: for people. takes: whether WHAT is one. look: makes the report, with these flags."""

    name: str
    known_as: str
    takes: Callable[[str], bool]
    look: Callable[..., Report]
    tell: Callable[[Report], list[str]]
    flags: tuple[str, ...]


KINDS = (
    Kind(
        "work directory",
        "a work directory (a folder with config.json)",
        is_workdir,
        inspect_workdir,
        tell_workdir,
        ("problems", "quiet"),
    ),
    Kind(
        "token store",
        "a token store (a folder with card.json)",
        is_store,
        inspect_tokens,
        tell_tokens,
        ("problems", "quiet"),
    ),
    Kind(
        "images",
        f"a folder with a folder of images for each class, and the sources {', '.join(SPECS)}",
        lambda what: is_source(what) or class_folders(what),
        inspect_images,
        tell_images,
        ("split", "image_size", "limit", "problems", "out", "quiet"),
    ),
)
