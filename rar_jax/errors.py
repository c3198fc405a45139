"""Every exception class of the package, and the exit code of a preempted process."""

from __future__ import annotations

# The exit code of a process that was preempted and can be started again (EX_TEMPFAIL of sysexits.h, "try again later");
# launch/common.sh knows it too.
PREEMPTED = 75


class ConfigError(ValueError):
    """An experiment says something that cannot be: the message says what and how to mend it."""


class StoreError(ValueError):
    """A token store is missing, unfinished or damaged, or was given wrong records: the message names the file."""


class WeightsError(ValueError):
    """A weight file is damaged, dangerous or not what it should be: the message says which and where."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing or damaged: the message names the file."""


class LeaseError(RuntimeError):
    """Another process writes to the work directory: the message says which."""


class ObjectStoreError(RuntimeError):
    """The bucket cannot be read or written: the message says which and why."""


class Preempted(Exception):
    """The training was asked to stop and has been saved."""


class ReferenceFileError(ValueError):
    """A file of statistics or images is damaged, dangerous or not what it should be: says the file, the key and what to do."""


class DecodeError(ValueError):
    """An image that cannot be had: the message is the reason, one line, without the record's name."""


class TripCountError(ValueError):
    """The trip count of a loop depends on data, so that its cost cannot be counted."""


class DeviceMemoryError(RuntimeError):
    """A program took more of a device's memory than there is: the message says which, and what to make smaller."""


class ProcessError(RuntimeError):
    """The processes did not find each other, or another one stopped: the message says which."""


class StorageError(RuntimeError):
    """The processes do not share a directory: the message says which of them does not, and how."""


class TrainingError(RuntimeError):
    """Training cannot go on: the message says why and from where to resume."""
