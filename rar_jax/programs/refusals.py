"""What the operating system or the installation refused, in one line that says what to do."""

from __future__ import annotations

import errno
import os

_ADVICE = {
    errno.ENOSPC: "the disk is full: make room and give the same command again",
    errno.EDQUOT: "your share of the disk is used up: make room and give the same command again",
    errno.EROFS: "this file system can only be read: choose a place that can be written to",
    errno.EACCES: "not permitted: choose a place that is yours, or change whose it is (ls -l, chmod)",
    errno.EPERM: "not permitted: choose a place that is yours, or change whose it is (ls -l, chmod)",
    errno.ENOENT: "there is no such file or folder: look for a mistyped path",
    errno.ENOTDIR: "a part of this path is a file where a folder should be: choose another path",
    errno.EISDIR: "this is a folder where a file should be: choose another path",
    errno.EEXIST: "this is there already: choose another path, or move it away",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose a shorter path",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n 65536) and give the same command again",
    errno.EIO: "the storage has failed: look at the machine's log, and give the same command again on sound storage",
}


def of_system(error: OSError, where: object = None) -> str:
    """A line for an error of the operating system.

    Args:
      where: what was being written, for errors that name no file (a full disk).
    """
    what = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else where
    known = _ADVICE.get(error.errno or 0)
    text = known or f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, type(error).__name__)})"
    return f"{what}: {text}" if what is not None else text


def of_import(error: ImportError) -> str:
    """A line for a package that is not there, or is not what it should be."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return f"a package cannot be used ({error}): install it again, in the version of requirements.lock"
    name = error.name.partition(".")[0]
    return (
        f"the package '{name}' is not installed: install rar_jax again (pip install -e . in its checkout), which brings all that "
        "it needs; what an experiment file imports besides, install yourself"
    )
