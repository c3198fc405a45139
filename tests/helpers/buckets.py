"""Servers of Google's and Amazon's kind on this machine, each with an empty bucket named "bucket"."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

GOOGLE = pathlib.Path(__file__).with_name("google_server.py")
SERVERS = {"gs": (str(GOOGLE), "{port}"), "s3": ("-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}")}


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[dict[str, str]]:
    """Environment variables that lead to a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *(word.format(port=port) for word in SERVERS[scheme])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if not client.connect_ex(("127.0.0.1", port)):
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port}"
        if scheme == "gs":
            yield {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}
        else:
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
            keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
            yield {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", **keys}
    finally:
        process.kill()
        process.wait()
