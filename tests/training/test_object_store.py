"""Work directories in buckets: of servers that speak Google's and Amazon's protocols on this machine."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from commands import TINY, environment, finish, state_of

from rar_jax import cli
from rar_jax.config import ConfigError
from rar_jax.training import lease, object_store
from rar_jax.training.lease import LeaseError
from rar_jax.training.object_store import RECORD, WRITER, Mirror, ObjectStoreError
from rar_jax.training.workdir import Workdir

SERVERS = {
    "gs": ("gcp_storage_emulator", "start", "--host=127.0.0.1", "--port={port}", "--in-memory", "--default-bucket=bucket"),
    "s3": ("moto.server", "-H", "127.0.0.1", "-p", "{port}"),
}  # fmt: skip


@contextlib.contextmanager
def serve(scheme: str) -> Iterator[int]:
    """A server on a free port, which it yields."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *(word.format(port=port) for word in SERVERS[scheme])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if not client.connect_ex(("127.0.0.1", port)):
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def gs() -> Iterator[dict[str, str]]:
    """Environment variables that lead to a server of Google's kind with a bucket named "bucket"."""
    with serve("gs") as port:
        yield {"TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The same of Amazon's kind."""
    with serve("s3") as port:
        url = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
        keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        yield {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", **keys}


class Machine:
    """What has a scratch folder of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scratch: pathlib.Path) -> None:
        self._monkeypatch, self._scratch = monkeypatch, scratch

    def mirror(self, url: str) -> Mirror:
        self._monkeypatch.setenv(object_store.SCRATCH, str(self._scratch))
        return Mirror(url)


@pytest.fixture
def machines(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> tuple[Machine, Machine]:
    """Two, that reach the bucket of a test's `scheme`."""
    for name, value in request.getfixturevalue(request.getfixturevalue("scheme")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(object_store.PUSH, "1000")  # the tests push
    return Machine(monkeypatch, tmp_path / "a"), Machine(monkeypatch, tmp_path / "b")


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: pathlib.Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != RECORD
    }


@pytest.fixture
def scheme() -> str:
    return "gs"


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_what_one_machine_made_another_finds(
    scheme: str, machines: tuple[Machine, Machine], tmp_path: pathlib.Path
) -> None:
    a, b = (machine.mirror(f"{scheme}://bucket/there/and back/{scheme}") for machine in machines)
    a.take("run")
    kept = {"config.json": "{}", "tokens/train/card.json": "1", "checkpoints/generator/8/state/d/0": "eight"}
    kept |= {"checkpoints/generator/8/manifest.json": "m", "checkpoints/generator/best.json": "b"}
    # Not for others: what is of this machine, and what is being made.
    own = {".lease.json": "x", "config.json.tmp": "x", "checkpoints/generator/16/state/d/0": "no manifest yet"}
    own |= {"checkpoints/generator/24.orbax-checkpoint-tmp-1/manifest.json": "x", "tokens/train/shard.npy.7.tmp": "x"}
    write(a.folder, kept | own)
    order: list[str] = []
    store, a._store = a._store, Spy(a._store, order)
    a.push()
    assert sorted(order) == sorted(kept) and order[-1] == "checkpoints/generator/8/manifest.json"
    b.pull()
    assert read(b.folder) == kept
    # Only what changed is sent; what is gone is removed, the manifest first.
    (a.folder / "config.json").write_text('{"a": 1}')
    for name in ("checkpoints/generator/8/state/d/0", "checkpoints/generator/8/manifest.json"):
        (a.folder / name).unlink()
    order.clear()
    a.push()
    assert order == ["config.json", "checkpoints/generator/8/manifest.json", "checkpoints/generator/8/state/d/0"]
    a._store = store
    a.release()
    b.pull()
    assert read(b.folder).keys() == kept.keys() - set(order[1:]) and read(b.folder)["config.json"] == '{"a": 1}'
    # This machine wrote last: it keeps what it has, sent or not.
    write(a.folder, {"unsent": "x"})
    again = machines[0].mirror(a.url)
    again.take("run")
    assert "unsent" in read(a.folder)
    again.release()
    b.pull()
    assert "unsent" in read(b.folder)


class Spy:
    """A store that notes what is written and removed, but for the writer's beats."""

    def __init__(self, store: Any, order: list[str]) -> None:
        self._store, self._order = store, order

    def write(self, name: str, *rest: Any, **more: Any) -> Any:
        self._order += [] if name == WRITER else [name]
        return self._store.write(name, *rest, **more)

    def read(self, name: str) -> Any:
        return self._store.read(name)


def test_one_writer(machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 3.0)
    a, b = (machine.mirror("gs://bucket/one writer") for machine in machines)
    a.take("run")
    with pytest.raises(LeaseError, match=r"is being written to by process \d+ on .* \(rar-jax run\)"):
        b.take("train")
    b.release()  # of nothing
    a._ended.set()  # it dies, unheard
    began = time.monotonic()
    b.take("train")
    assert time.monotonic() - began >= 3.0
    write(a.folder, {"late": "x"})
    with pytest.raises(LeaseError, match="was taken over by process"):
        a._beat()
    for late in (a.check, a.push):
        with pytest.raises(LeaseError, match="its last work is in"):
            late()
    b.release()
    # A process of this machine that ended is known at once.
    b._store.write(WRITER, json.dumps(lease.this_process() | {"nonce": "other", "pid": 2**22 + 1}).encode()).result()
    monkeypatch.setattr(lease, "STALE_SECONDS", 1e9)
    c = machines[0].mirror(a.url)
    c.take("run")
    assert "late" not in read(c.folder)
    c.release()


def test_results_are_added_beside_a_run(machines: tuple[Machine, Machine]) -> None:
    url = "gs://bucket/beside"
    a = machines[0].mirror(url)
    a.take("train")
    write(a.folder, {"config.json": "{}"})
    a.push()
    b = Workdir(machines[1].mirror(url).url).fetch()
    write(b.path, {"evaluation/result.json": "fid"})
    b.send()
    write(a.folder, {"metrics.jsonl": "row"})
    machines[0].mirror(url).add()  # of the folder that is being written to: its writer sends it
    c = machines[1].mirror(url)
    c.pull()
    assert read(c.folder) == {"config.json": "{}", "evaluation/result.json": "fid"}
    a.release()
    c.pull()
    assert read(c.folder) == {"config.json": "{}", "evaluation/result.json": "fid", "metrics.jsonl": "row"}


@pytest.mark.parametrize("url", ["gs://bucket", "gs://", "http://host/run", "s3:///run", "gs://bucket/../run"])
def test_urls_that_are_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="write gs://BUCKET/PATH or s3://BUCKET/PATH"):
        Mirror(url)
    assert cli.main(["run", "--config", str(TINY), "--workdir", url]) == 2
    assert f"{url}: write gs://BUCKET/PATH" in capsys.readouterr().err


def test_a_bucket_that_is_not_there(machines: tuple[Machine, Machine]) -> None:
    with pytest.raises(ObjectStoreError, match=r"gs://missing/run cannot be reached \(.*see that the bucket is there"):
        machines[0].mirror("gs://missing/run").take("run")


@pytest.mark.slow
def test_killed_here_and_resumed_elsewhere(gs: dict[str, str], tmp_path: pathlib.Path) -> None:
    """kill -9, and the same command on a machine that has nothing but the bucket: the same bits as a run on a disk."""
    steps = ("--config.classifier.train.steps=400", "--config.classifier.train.checkpoint_every=100")
    url = "gs://bucket/killed"

    def start(workdir: str, scratch: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rar_jax", "train", "--stage", "classifier", "--config", str(TINY), *steps]
        env = environment() | gs | {object_store.SCRATCH: str(tmp_path / scratch), object_store.PUSH: "0.05"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, "--workdir", workdir], env=env, **pipes)

    finish([start(str(tmp_path / "straight"), "none")])
    killed = start(url, "here")
    record = tmp_path / "here" / "gs" / "bucket" / "killed" / RECORD
    deadline = time.monotonic() + 200
    while not re.search(r"classifier/\d+/manifest.json", record.read_text() if record.exists() else ""):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    out = finish([start(url, "elsewhere")])
    assert "classifier: goes on from step" in out and "classifier: goes on from step 400" not in out
    elsewhere = tmp_path / "elsewhere" / "gs" / "bucket" / "killed"
    assert state_of(elsewhere, 400) == state_of(tmp_path / "straight", 400)
    assert not (tmp_path / "none").exists()
