"""The manifest of a folder: checksums of all its files, written last.

A saved step counts only if its manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from rar_jax.errors import CheckpointError

MANIFEST = "manifest.json"


def file_sha256(path: pathlib.Path) -> str:
    """Hex sha256 of a file's bytes. Never remembered: a disk that rots does not change a file's time.

    Raises: CheckpointError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that the file is either whole or not there: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_manifest(folder: pathlib.Path) -> None:
    """Writes manifest.json over all files below `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {str(p.relative_to(folder)): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(folder / MANIFEST, {"files": entries, "sha256": _digest(entries)})


def verify_from_disk(folder: pathlib.Path) -> None:
    """`verify_manifest` of what the disk holds, where the system lets go of what it remembers of files that were just written.

    Raises: CheckpointError naming the file that is missing or changed.
    """
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    verify_manifest(folder)


def verify_manifest(folder: pathlib.Path, *, part: str = "") -> str:
    """Checks every file below `folder`, or of a part of it, against its manifest.

    Files that the manifest does not name (a desktop's or a file server's) do no harm and are passed over.

    Returns: the manifest's own hash, which names this content.
    Raises: CheckpointError naming the file that is missing or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the save was not finished")
    try:
        manifest = json.loads(path.read_bytes())
        entries = manifest["files"]
        intact = _digest(entries) == manifest["sha256"] and manifest.keys() == {"files", "sha256"}
    except (ValueError, KeyError, TypeError):
        intact, entries, manifest = False, {}, {}
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    for name, entry in entries.items():
        if not name.startswith(part):
            continue
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
        if file_sha256(folder / name) != entry["sha256"]:
            raise CheckpointError(f"{folder / name} is damaged: its sha256 is not the manifest's")
    return manifest["sha256"]
