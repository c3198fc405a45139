"""Whether all processes see one and the same directory, in which what one writes, creates and renames is so for the others."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import socket

from rar_jax.errors import StorageError


def check_shared(folder: pathlib.Path) -> None:
    """Looks before the work: process 0 writes a number that no file had, all read it, and fail to make its file again (what a
    lock needs); each renames a file of its own, and process 0 finds them all. All processes call this; alone, it does nothing.

    Raises: StorageError, on all processes.
    """
    import jax  # late: `trouble` is asked by `rar-jax doctor` where jax cannot be imported

    from rar_jax.parallel.processes import from_main, gather_strings, is_main

    if jax.process_count() == 1:
        return
    nonce = from_main(lambda: secrets.token_hex(8))
    shared = folder / f".preflight-{nonce}"
    renamed = [folder / f"{shared.name}-{k}" for k in range(jax.process_count())]

    def look() -> None:
        if lost := [k for k, path in enumerate(renamed) if not path.is_file()]:
            raise _not_shared(folder, f"process 0 does not see what process {lost[0]} renamed there")

    try:
        from_main(lambda: _create(shared, nonce))
        trouble = _trouble(shared, renamed[jax.process_index()], nonce)
        said = gather_strings(trouble and f"process {jax.process_index()} on {socket.gethostname()} {trouble}")
        if wrong := [text for text in said if text]:
            more = f" ({len(wrong)} of {len(said)} processes have trouble)" if len(wrong) > 1 else ""
            raise _not_shared(folder, wrong[0] + more)
        from_main(look)
    finally:
        _remove(renamed[jax.process_index()])
        if is_main():
            _remove(shared)


def trouble(folder: pathlib.Path) -> str:
    """What this process alone cannot do in a folder (create, create exclusively, rename), as the end of a sentence; "" if all
    is well. Nothing stays behind."""
    nonce = secrets.token_hex(8)
    shared, own = (folder / f".preflight-{nonce}{end}" for end in ("", "-own"))
    try:
        _create(shared, nonce)
        return _trouble(shared, own, nonce)
    except OSError as error:
        return f"cannot create a file there ({error})"
    finally:
        for path in (shared, own, own.with_name(f"{own.name}.tmp")):
            _remove(path)


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # on a file system that can only be read
        path.unlink(missing_ok=True)


def _not_shared(folder: pathlib.Path, what: str) -> StorageError:
    return StorageError(
        f"{folder.absolute()} is not the same directory for all processes: {what}. Give a path on storage that all hosts mount, "
        "such as NFS, Lustre or Filestore"
    )


def _create(path: pathlib.Path, text: str) -> None:
    """Makes a file that was not there, the whole of it on the disk."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _trouble(shared: pathlib.Path, own: pathlib.Path, nonce: str) -> str:
    """What is wrong in the eyes of this process; nothing if all is well."""
    try:
        if (text := shared.read_text()) != nonce:
            return f"reads {text[:20]!r} where process 0 wrote '{nonce}'"
    except OSError as error:
        return f"does not see the file that process 0 wrote there ({error.strerror})"
    try:
        _create(shared, "not exclusive")
        return "could make a file that was there already: locks do not hold on this storage"
    except FileExistsError:
        pass
    except OSError as error:
        return f"cannot create a file there ({error})"
    try:
        temporary = own.with_name(f"{own.name}.tmp")
        _create(temporary, nonce)
        temporary.replace(own)
        renamed = own.read_text() == nonce and not temporary.exists()
        return "" if renamed else "renamed a file there and found it under its old name"
    except OSError as error:
        return f"cannot write and rename a file there ({error})"
