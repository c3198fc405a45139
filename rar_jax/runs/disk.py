"""Full disks: how to recognise their errors, and how to append rows of JSON despite them."""

from __future__ import annotations

import errno
import json
import os
import pathlib
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it wraps, reports a full disk. TensorStore reports it in the text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Append a line of JSON. It starts on a new line, even after a row that a full disk or a kill cut off."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")
