"""The verb `inspect`: summarize a work directory, a token store or a source of images, and list its problems."""

from __future__ import annotations

import pathlib
from typing import Any

from rar_jax.config import require
from rar_jax.data.sources import SPECS
from rar_jax.tools.inspect.images import inspect_source, is_source
from rar_jax.tools.inspect.layout import LISTED, Summary
from rar_jax.tools.inspect.tokens import inspect_token_store, is_token_store
from rar_jax.tools.inspect.workdir import inspect_workdir, is_workdir


def inspect_target(target: str, *, problems: int | None = None, quiet: bool = False, **image_flags: Any) -> Summary:
    """Summarize a work directory, a token store or a source of images.

    Args:
      problems: maximum number of listed problems.
      image_flags: arguments of `inspect_source`. None means its default.

    Raises: ConfigError for an unknown target, or a flag that its kind does not have.
    """
    image_flags = {name: value for name, value in image_flags.items() if value is not None}
    common = {"max_problems": LISTED if problems is None else problems, "quiet": quiet}
    for name, value in {"problems": problems, **image_flags}.items():
        require(not isinstance(value, int) or value >= 1, f"--{name.replace('_', '-')} is {value}: at least 1")
    inspect = inspect_workdir if is_workdir(target) else inspect_token_store if is_token_store(target) else None
    if inspect is not None:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in image_flags)
        require(not flags, f"{flags} does not apply to {target}: leave it out")
        return inspect(target, **common)
    exists = "" if pathlib.Path(target).exists() else " No such file or folder exists."
    known = "a work directory (with config.json), a token store (with card.json), "
    known += "a folder with one folder of images per class"
    require(is_source(target), f"{target} cannot be inspected.{exists} Give {known}, or a source: {', '.join(SPECS)}")
    return inspect_source(target, **common, **image_flags)
