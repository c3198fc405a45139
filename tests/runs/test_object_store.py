"""Work directories in buckets, of servers that speak Google's and Amazon's protocols on this machine. Killed: tests/faults/test_buckets.py."""

import json
import pathlib
import socket
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import tensorstore
from buckets import Machine, Store, read, serve, step, with_store, write
from commands import TINY

from rar_jax import cli
from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError, LeaseError
from rar_jax.experiment import resolve
from rar_jax.runs import bucket, ledger, object_store, session
from rar_jax.runs import lock as lease
from rar_jax.runs.object_store import WRITER, Mirror, ObjectStoreError
from rar_jax.runs.workdir import Workdir

FOREVER = 10**9


@pytest.fixture(scope="module")
def gs() -> Iterator[dict[str, str]]:
    with serve("gs") as environ:
        yield environ


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with serve("s3") as environ:
        yield environ


@pytest.fixture
def machines(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> tuple[Machine, Machine]:
    """Two, that reach the bucket of a test's `scheme`."""
    for name, value in request.getfixturevalue(request.getfixturevalue("scheme")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(object_store.PUSH, "1000")  # the tests push
    return Machine(monkeypatch, tmp_path / "a"), Machine(monkeypatch, tmp_path / "b")


@pytest.fixture
def scheme() -> str:
    return "gs"


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_what_one_machine_made_another_finds(
    scheme: str, machines: tuple[Machine, Machine], tmp_path: pathlib.Path
) -> None:
    a, b = (machine.mirror(f"{scheme}://bucket/there/and back/{scheme}") for machine in machines)
    a.take("run")
    kept = {"config.json": "{}", "tokens/train/card.json": "1", "checkpoints/generator/best.json": "b"}
    # Not for others: what is of this machine, what is being made, and what was set aside.
    own = {".lease.json": "x", "config.json.tmp": "x", "checkpoints/generator/16/state/d/0": "no manifest yet"}
    own |= {"checkpoints/generator/24.orbax-checkpoint-tmp-1/manifest.json": "x", "tokens/train/shard.npy.7.tmp": "x"}
    own |= {"totals.npz.partial": "x", "checkpoints/generator/24.rewound/manifest.json": "x"}
    write(a.folder, kept | own)
    step(a.folder, 8, "eight")
    kept |= {name: text for name, text in read(a.folder).items() if "/8/" in name or name == "metrics.jsonl"}
    assert len(kept) == 7
    a.push()
    b.pull()
    assert read(b.folder) == kept
    # What changed is sent again, what is gone is removed.
    write(a.folder, {"config.json": '{"a": 1}'})
    (a.folder / "tokens/train/card.json").unlink()
    a.push()
    b.pull()
    del kept["tokens/train/card.json"]
    assert read(b.folder) == {**kept, "config.json": '{"a": 1}'}
    a.release()
    # This machine wrote last: it keeps what it has, sent or not.
    write(a.folder, {"unsent": "x"})
    again = machines[0].mirror(a.url)
    again.take("run")
    assert "unsent" in read(a.folder)
    again.release()
    b.pull()
    assert "unsent" in read(b.folder)


# ---------------------------------------------------------------- a bucket that is away


def test_a_bucket_that_stays_away_stops_the_run(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away: list[str] = []

    def seen(name: str) -> None:
        if away:
            raise ValueError("UNAVAILABLE: away")

    monkeypatch.setenv(object_store.PUSH, "0.01")
    monkeypatch.setattr(object_store, "PATIENCE_SECONDS", 0.3)
    a = with_store(machines[0].mirror("gs://bucket/away"), Store({}, FOREVER, seen=seen))
    a.take("run")
    away.append("now")
    write(a.folder, {"config.json": "{}"})
    a.check()
    deadline = time.monotonic() + 20
    with pytest.raises(ObjectStoreError, match=r"UNAVAILABLE: away.* For \d+ s now: the work so far is in .*away"):
        while time.monotonic() < deadline:
            a.check()
            time.sleep(0.01)
    assert "it is tried again" in caplog.text
    with pytest.raises(ObjectStoreError, match="UNAVAILABLE: away"):  # and what is left at the end is not silently so
        a.release()
    assert a.bucket._store.objects.keys() == {WRITER}


def test_a_server_that_never_answers(machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "WAIT_SECONDS", 0.1)
    a = machines[0].mirror("gs://bucket/silent")
    write(a.folder, {"config.json": "{}"})
    silent = tensorstore.Promise.new()
    a.bucket._store = types.SimpleNamespace(write=lambda *_: silent[1], read=lambda *_: silent[1])
    for ask in (a.push, a.pull):
        with pytest.raises(ObjectStoreError, match=r"cannot be reached \(it does not answer\)"):
            ask()


# ---------------------------------------------------------------- one writer


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
    ended = json.dumps(lease.this_process() | {"nonce": "other", "pid": 2**22 + 1}).encode()
    assert b.bucket.write_if(WRITER, ended, b.bucket.read_one(WRITER)[1])
    monkeypatch.setattr(lease, "STALE_SECONDS", 1e9)
    c = machines[0].mirror(a.url)
    c.take("run")
    assert "late" not in read(c.folder)
    c.release()


@pytest.mark.parametrize("scheme", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_of_two_that_take_over_at_once_one_does(scheme: str, machines: tuple[Machine, Machine]) -> None:
    for url, left in ((f"{scheme}://bucket/two/new", False), (f"{scheme}://bucket/two/left", True)):
        a, b, first = (machines[i].mirror(url) for i in (0, 1, 0))
        if left:
            first.take("run")
            first.release()
        real = a.bucket.write_if

        def late(*rest: Any, b: Mirror = b, real: Any = real) -> Any:
            if b._known is None:
                b.take("train")
            return real(*rest)

        a.bucket.write_if = late  # between a's look and its first beat b comes
        with pytest.raises(LeaseError, match="was taken over by process"):
            a.take("run")
        b._beat()
        b.release()


@pytest.mark.parametrize("asleep", ["before a push", "before a manifest", "before a removal"])
def test_who_was_taken_for_dead_sends_no_more(
    asleep: str, machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine stood still for longer than a minute at this place, while b went on elsewhere."""
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    objects: dict[str, bytes] = {}
    a = with_store(machines[0].mirror("gs://bucket/asleep"), Store(objects, FOREVER))
    b = with_store(machines[1].mirror(a.url), Store(objects, FOREVER))
    a.take("run")
    write(a.folder, {"config.json": "{}", "gone": "x"})
    step(a.folder, 8, "eight")
    a.push()
    before: dict[str, bytes] = {}

    def sleep(at: str) -> None:
        if at == asleep and b._known is None:
            a._ended.set()
            b.take("run")
            step(b.folder, 16, "of b")
            b.push()
            before.update(objects)

    real = {name: getattr(a, name) for name in ("_remove", "_send_step")}
    monkeypatch.setattr(a, "_remove", lambda *rest: (sleep("before a removal"), real["_remove"](*rest)))
    verify = object_store.verify_manifest
    monkeypatch.setattr(object_store, "verify_manifest", lambda folder: (sleep("before a manifest"), verify(folder)))
    (a.folder / "gone").unlink()
    step(a.folder, 16, "of a")
    sleep("before a push")
    with pytest.raises(LeaseError, match="was taken over by process"):
        a.push()
    assert objects == before
    b.release()


def test_who_was_taken_for_dead_stops_at_the_next_poll(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.5)
    workdir = Workdir(machines[0].mirror("gs://bucket/stops").url)
    assert workdir.mirror is not None
    b = with_store(machines[1].mirror(workdir.mirror.url), with_store(workdir.mirror, Store({}, FOREVER)).bucket._store)
    expected = pytest.raises(LeaseError, match="was taken over")
    with expected, session.open_session(workdir, "tokenize", lambda: None) as around:
        b._known = b._writer()  # as if it had waited for a minute
        b._beat()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            around.poll()
            time.sleep(0.01)
    stops = [row["reason"] for row in ledger.read_ledger(workdir.path) if row["event"] == "stop"]
    assert stops[0].startswith("LeaseError: gs://bucket/stops")


def test_results_are_added_beside_a_run(machines: tuple[Machine, Machine]) -> None:
    url = "gs://bucket/beside"
    a = machines[0].mirror(url)
    a.take("train")
    write(a.folder, {"config.json": "{}", "notes": "of a"})
    a.push()
    b = Workdir(machines[1].mirror(url).url).fetch()
    write(b.path, {"evaluation/result.json": "fid"})
    (b.path / "notes").unlink()  # it is not b's to remove
    b.send()
    write(a.folder, {"metrics.jsonl": "row"})
    machines[0].mirror(url).add()  # of the folder that is being written to: its writer sends it
    c = machines[1].mirror(url)
    c.pull()
    assert read(c.folder) == {"config.json": "{}", "notes": "of a", "evaluation/result.json": "fid"}
    a.release()
    c.pull()
    kept = {"config.json": "{}", "notes": "of a", "evaluation/result.json": "fid", "metrics.jsonl": "row"}
    assert read(c.folder) == kept


def test_results_added_beside_a_run_outlive_its_next_start(machines: tuple[Machine, Machine]) -> None:
    url = "gs://bucket/added"
    a = machines[0].mirror(url)
    a.take("train")
    write(a.folder, {"config.json": "{}", "notes": "of a", "old": "of a"})
    a.push()
    a._ended.set()  # killed, and gone on with here after another one evaluated
    a._beat(released=True)
    b = machines[1].mirror(url)
    b.pull()
    write(b.folder, {"evaluation/result.json": "fid"})
    b.add()
    (a.folder / "old").unlink()
    again = machines[0].mirror(url)
    again.take("train")
    again.push()
    b.pull()
    kept = {"config.json": "{}", "notes": "of a", "evaluation/result.json": "fid"}
    assert read(again.folder) == read(b.folder) == kept
    again.release()


def test_placeholders_of_folders_are_no_files(machines: tuple[Machine, Machine]) -> None:
    """The web pages of Google and Amazon make an empty object for a folder that is made there."""
    a, b = (machine.mirror("gs://bucket/places/run") for machine in machines)
    above = bucket.Bucket("gs://bucket/places")
    list(above.write([("run/", b""), ("run/tokens/", b"")]))
    a.take("run")
    write(a.folder, {"config.json": "{}"})
    a.release()
    b.pull()
    assert read(b.folder) == {"config.json": "{}"}
    assert {"run/", "run/tokens/"} <= {key.decode() for key in above._store.list().result()}  # not ours to remove


def test_a_run_elsewhere_is_told_and_left_alone(
    machines: tuple[Machine, Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    a = machines[0].mirror("gs://bucket/elsewhere")
    a.take("train")
    Workdir(a.folder).claim(resolve(load_experiment(str(TINY)), "tiny").resolved())
    ledger.Ledger(a.folder).row("start", verb="train", command="rar-jax train --config tiny")
    a.push()
    machines[1].mirror(a.url)
    assert cli.main(["inspect", a.url, "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "running: " in told and "verb train" in told and socket.gethostname() in told
    assert "nothing to do: it is running" in told
    a.release()
    assert cli.main(["inspect", a.url, "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "running: " not in told and "rar-jax train --config tiny" in told


def test_a_folder_that_another_process_works_in_is_not_emptied(machines: tuple[Machine, Machine]) -> None:
    a, b = (machine.mirror("gs://bucket/worked in") for machine in machines)
    a.take("run")
    write(a.folder, {"config.json": "{}"})
    a.release()
    write(b.folder, {"weights": "being read"})
    held = lease.Lease(b.folder, "run")
    with pytest.raises(LeaseError, match=r"is being written to by process \d+ on .* \(rar-jax run"):
        Workdir(b.url).fetch()
    assert read(b.folder).keys() == {"weights", lease.NAME}
    held.release()
    assert read(Workdir(b.url).fetch().path) == {"config.json": "{}"}


@pytest.mark.parametrize("url", ["gs://bucket", "gs://", "http://host/run", "s3:///run", "gs://bucket/../run"])
def test_urls_that_are_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="write gs://BUCKET/PATH or s3://BUCKET/PATH"):
        Mirror(url)
    assert cli.main(["run", "--config", str(TINY), "--workdir", url]) == 2
    assert f"{url}: write gs://BUCKET/PATH" in capsys.readouterr().err


def test_a_bucket_that_is_not_there(machines: tuple[Machine, Machine]) -> None:
    with pytest.raises(ObjectStoreError, match=r"gs://missing/run cannot be reached \(.*see that the bucket is there"):
        machines[0].mirror("gs://missing/run").take("run")
