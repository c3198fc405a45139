"""A disk that is full: how it is said, how it is known, and rows of JSON that outlive it."""

from __future__ import annotations

import errno
import json
import os
import pathlib
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


def full(folder: pathlib.Path, why: str) -> OSError:
    """The error of a disk without room, seen before anything is written."""
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({why})", str(folder))


def is_full(error: BaseException | None) -> bool:
    """Whether an error is a full disk's; also one that wraps it, or has it as text only, as tensorstore's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Adds a line of JSON. It begins on a line of its own, whatever a full disk or a kill left of the row before."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")
