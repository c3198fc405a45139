"""Checksums of all files of a folder, written last: a saved step without a manifest that verifies does not count."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from rar_jax.errors import CheckpointError
from rar_jax.runs.bucket import BucketPath, Path, list_files

MANIFEST = "manifest.json"


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file. It is never cached: a failing disk does not change a file's time.

    Raises: CheckpointError if the file cannot be read.
    """
    try:
        if isinstance(path, BucketPath):
            return hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: on a disk through a temporary file, fsync and rename."""
    text = json.dumps(content, indent=1, sort_keys=True).encode()
    if isinstance(path, BucketPath):
        path.write_bytes(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_manifest(folder: Path) -> None:
    """Write manifest.json over all files below a folder."""
    names = [name for name in list_files(folder) if pathlib.PurePath(name).name != MANIFEST]
    entries = {name: {"sha256": file_sha256(folder / name)} for name in names}
    write_json(folder / MANIFEST, {"files": entries, "sha256": _digest(entries)})


def verify_from_disk(folder: Path) -> None:
    """Verify what the disk holds, after the system has dropped its cache of the files.

    Raises: CheckpointError naming the missing or changed file.
    """
    if not isinstance(folder, BucketPath) and hasattr(os, "posix_fadvise"):
        for name in list_files(folder):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    verify_manifest(folder)


def verify_manifest(folder: Path) -> str:
    """Check every file below a folder against its manifest. Files that it does not name are ignored.

    Returns: the manifest's own hash, which identifies this content.
    Raises: CheckpointError naming the missing or changed file.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        entries = manifest["files"]
        intact = _digest(entries) == manifest["sha256"] and manifest.keys() == {"files", "sha256"}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the save did not finish") from None
    except (ValueError, KeyError, TypeError):
        intact, entries, manifest = False, {}, {}
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    for name, entry in entries.items():
        if file_sha256(folder / name) != entry["sha256"]:
            raise CheckpointError(f"{folder / name} is damaged: its sha256 differs from the manifest")
    return manifest["sha256"]
