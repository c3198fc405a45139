"""A disk that is full: how it is said, and how it is known."""

from __future__ import annotations

import errno
import os
import pathlib

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
