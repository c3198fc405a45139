"""What huggingface_hub asks of the hub for one file, rar_b.bin, answered by a server in this process."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import pathlib
import threading
from collections.abc import Iterator

import huggingface_hub.constants
import pytest

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """`sends`: so many bytes of the file before the connection is closed; None: all."""

    etag, content, sends = SHA256, CONTENT, None

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self.content[: self.sends])

    def _answer(self, body: bytes) -> None:
        found = self.path == "/yucornetto/RAR/resolve/main/rar_b.bin" or "0123" in self.path
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{self.etag}"')
            self.send_header("X-Repo-Commit", "0123456789012345678901234567890123456789")
            self.send_header("Content-Length", str(len(self.content)))
        else:
            self.send_header("Content-Length", "0")
        self.end_headers()
        if found:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextlib.contextmanager
def served(monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> Iterator[type[Hub]]:
    """The hub, reachable by huggingface_hub, and an empty cache; what is set on the class it gives changes the answers."""

    class Fresh(Hub):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    yield Fresh
    server.shutdown()
    thread.join()
    server.server_close()
