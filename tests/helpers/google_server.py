"""`python google_server.py PORT`: gcp-storage-emulator with a bucket named "bucket", in memory.

What a bucket of Google's does and the emulator as it comes does not: it takes many connections at once (the emulator one, with room
for five to wait, which leaves others to their client's time-outs; here each has a thread, and its code runs for one request at a
time), empty objects (the emulator closes the connection, without an answer), and conditions upon the generation of an object, which
is told to who reads it.
"""

import http
import http.server
import sys
import threading
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

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


_download, _insert = objects.download, objects.insert


def _generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _download_and_tell(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
    _download(request, response, storage, *rest, **more)
    found = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = _generation(storage, *found)


def _insert_if(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != _generation(storage, request.params["bucket_name"], request.query["name"][0]):
        response.status = http.HTTPStatus.PRECONDITION_FAILED
    else:
        _insert(request, response, storage, *rest, **more)


if __name__ == "__main__":
    server.server.HTTPServer = Threads
    server.Router = OneAtATime
    server._read_data = _empty_too
    objects.download = _download_and_tell
    for _, handlers in server.HANDLERS:
        handlers.update((method, _insert_if) for method, handler in handlers.items() if handler is _insert)
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
