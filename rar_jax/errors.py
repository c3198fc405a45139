"""Every exception class of the package, exit codes, and one-line texts for errors of others."""

from __future__ import annotations

import errno
import os

# Exit code of a preempted process, which can be rerun (EX_TEMPFAIL of sysexits.h); launch/common.sh has it too.
PREEMPTED = 75


class RarJaxError(Exception):
    """An actionable error: the message says what is wrong, where, and what to do."""

    exit_code = 1


class ConfigError(RarJaxError, ValueError):
    """An argument or an experiment setting is wrong."""

    exit_code = 2


class StoreError(RarJaxError, ValueError):
    """A token store is missing, unfinished or damaged, or got wrong records."""


class WeightsError(RarJaxError, ValueError):
    """A weight file is damaged, dangerous or not the expected kind."""


class ReferenceFileError(RarJaxError, ValueError):
    """A file of statistics or images is damaged, dangerous or not the expected kind."""


class NonFiniteError(RarJaxError, ValueError):
    """Images to score have pixels that are not finite numbers."""


class DecodeError(RarJaxError, ValueError):
    """An image cannot be decoded. The message is the reason, without the record's name."""


class CheckpointError(RarJaxError, RuntimeError):
    """A checkpoint is missing or damaged."""


class LockError(RarJaxError, RuntimeError):
    """Another process writes to the work directory."""


class ObjectStoreError(RarJaxError, RuntimeError):
    """The bucket cannot be read or written."""


class DeviceMemoryError(RarJaxError, RuntimeError):
    """A program needs more device memory than there is."""


class ProcessError(RarJaxError, RuntimeError):
    """The processes did not find each other, or another process stopped."""


class StorageError(RarJaxError, RuntimeError):
    """The processes do not share a directory."""


class TripCountError(RarJaxError, ValueError):
    """The trip count of a loop depends on data, so that its cost cannot be counted."""


class TrainingError(RarJaxError, RuntimeError):
    """Training cannot continue."""


class Preempted(Exception):
    """The training was asked to stop and has saved its state."""


_ADVICE = {
    errno.ENOSPC: "the disk is full: make room and rerun the command",
    errno.EDQUOT: "your disk quota is used up: make room and rerun the command",
    errno.EROFS: "this file system is read-only: choose another path",
    errno.EACCES: "permission denied: choose another path, or change its permissions",
    errno.EPERM: "permission denied: choose another path, or change its permissions",
    errno.ENOENT: "no such file or folder: check the path",
    errno.ENOTDIR: "a part of this path is a file where a folder should be: choose another path",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n 65536) and rerun the command",
}


def describe_os_error(error: OSError, path: object = None) -> str:
    """Say in one line what the operating system refused, and what to do.

    Args:
      path: what was being written, for errors that name no file (a full disk).
    """
    named = isinstance(error.filename, (str, bytes, os.PathLike))
    path = os.fsdecode(error.filename) if named else path
    number = error.errno or 0
    name = errno.errorcode.get(number, type(error).__name__)
    text = _ADVICE.get(number) or f"{error.strerror or error} ({name})"
    return text if path is None else f"{path}: {text}"


def describe_import_error(error: ImportError) -> str:
    """Say in one line which package is missing or unusable, and what to do."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return f"a package cannot be used ({error}): reinstall it in the version of requirements.lock"
    name = error.name.partition(".")[0]
    return f"the package '{name}' is not installed: reinstall rar_jax (pip install -e .), or install '{name}' yourself"
