"""Whether all processes see the same directory."""

from __future__ import annotations

import pathlib
import secrets
import socket

import jax

from rar_jax.errors import StorageError
from rar_jax.parallel.processes import from_main, gather_strings


def check_shared(folder: pathlib.Path) -> None:
    """Check that every process sees a file that process 0 writes. A barrier.

    Raises: StorageError on all processes.
    """
    if jax.process_count() == 1:
        return
    token = from_main(lambda: secrets.token_hex(8))
    file = folder / f".shared-{token}"
    from_main(lambda: file.write_text(token))
    seen = file.is_file() and file.read_text() == token
    blind = [
        who for who in gather_strings("" if seen else f"process {jax.process_index()} on {socket.gethostname()}") if who
    ]
    from_main(lambda: file.unlink())
    if blind:
        raise StorageError(
            f"{folder.absolute()} is not shared: {blind[0]} does not see a file that process 0 wrote there. Choose a path on "
            "storage that all hosts mount, or a bucket"
        )
