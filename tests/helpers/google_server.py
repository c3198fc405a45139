"""`python google_server.py PORT`: gcp-storage-emulator with a bucket named "bucket", in memory.

What a bucket of Google's does and the emulator as it comes does not: it takes many connections at once (the emulator one, with room
for five to wait, which leaves others to their client's time-outs; here each has a thread, and its code runs for one request at a
time), and empty objects (the emulator closes the connection, without an answer).
"""

import http.server
import sys
import threading
from typing import Any

from gcp_storage_emulator import server

HANDLING = threading.Lock()


class Threads(http.server.ThreadingHTTPServer):
    """What accepts connections."""

    request_queue_size = 128


class OneAtATime(server.Router):
    """What answers."""

    def handle(self, method: str) -> None:
        with HANDLING:
            super().handle(method)


_read_data = server._read_data


def _empty_too(request: Any, query: Any) -> Any:
    data = _read_data(request, query)
    return b"" if data is None and request.headers.get("Content-Length") == "0" else data


if __name__ == "__main__":
    server.server.HTTPServer = Threads
    server.Router = OneAtATime
    server._read_data = _empty_too
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
