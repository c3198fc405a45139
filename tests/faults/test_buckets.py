"""A work directory in a bucket, cut off at any request, and killed at any moment: what the bucket has can be gone on from elsewhere."""

import contextlib
import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from buckets import Cut, Machine, Store, read, serve, step, steps, with_store, write
from commands import TINY, Command, environment, finish, state_of, wait_for

from rar_jax.runs import object_store
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.object_store import RECORD, WRITER

FOREVER = 10**9


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> tuple[Machine, Machine]:
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    monkeypatch.setenv(object_store.PUSH, "1000")  # the tests push
    return Machine(monkeypatch, tmp_path / "a"), Machine(monkeypatch, tmp_path / "b")


LIFE: list[
    tuple[int, Callable[[pathlib.Path], None]]
] = []  # the newest step that must be there from then on, and what is done


def moment(newest: int) -> Callable[[Callable[[pathlib.Path], None]], None]:
    return lambda work: LIFE.append((newest, work))


@moment(0)
def _(folder: pathlib.Path) -> None:
    write(
        folder,
        {
            "config.json": "{}",
            "a.txt": "sorted before it",
            "tokens/train/shard-0.npy": "s",
            "tokens/train/shard-1.npy": "s",
        },
    )
    write(folder, {"tokens/train/card.json": "names both"})


@moment(8)
def _(folder: pathlib.Path) -> None:
    step(folder, 8, "eight")


@moment(16)
def _(folder: pathlib.Path) -> None:
    step(folder, 16, "sixteen")
    shutil.rmtree(folder / "checkpoints/generator/8", ignore_errors=True)  # retention
    write(folder, {"checkpoints/generator/best.json": "16"})


@moment(16)  # and back to it from 24, which is made anew
def _(folder: pathlib.Path) -> None:
    step(folder, 24, "twenty-four")


@moment(16)
def _(folder: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / "checkpoints/generator/24").rename(folder / "checkpoints/generator/24.rewound")
    step(folder, 24, "another")


@moment(32)
def _(folder: pathlib.Path) -> None:
    step(folder, 32, "the last")
    for number in (16, 24):
        shutil.rmtree(folder / f"checkpoints/generator/{number}", ignore_errors=True)
    write(folder, {"result.json": "of 32"})


def killed(objects: dict[str, bytes]) -> None:
    """Who writes was this process, which lives."""
    objects[WRITER] = json.dumps(json.loads(objects[WRITER]) | {"pid": 2**22 + 1}).encode()


@pytest.mark.parametrize("seed", range(2))
def test_cut_off_at_any_request_the_bucket_can_be_gone_on_from(machines: tuple[Machine, Machine], seed: int) -> None:
    cut = 0
    while True:
        objects: dict[str, bytes] = {}
        store = Store(objects, cut, seed)
        a = with_store(machines[0].mirror(f"gs://bucket/cut/{cut}"), store)
        arrived = lived = 0
        try:
            a.take("run")
            for newest, work in LIFE:
                work(a.folder)
                lived += 1
                a.push()
                arrived = newest
        except Cut:
            pass
        a._ended.set()
        killed(objects)
        b = with_store(machines[1].mirror(a.url), Store(objects, FOREVER))
        b.take("run")
        found, there = read(b.folder), steps(b.folder)
        assert not found or "config.json" in found
        assert (
            "tokens/train/card.json" not in found
            or {"tokens/train/shard-0.npy", "tokens/train/shard-1.npy"} <= found.keys()
        )
        assert max(there, default=0) >= arrived, "what had arrived is there"
        assert "result.json" not in found or 32 in there
        assert {str(number) for number in there} <= set(found.get("metrics.jsonl", "").splitlines()), (
            "rows before steps"
        )
        # Gone on with elsewhere, nothing is left of what was cut off.
        write(b.folder, {"config.json": "{}"})
        for _, work in LIFE[lived:]:
            work(b.folder)
            b.push()
        step(b.folder, 40, "of b")
        b.release()
        assert objects.keys() - {WRITER} == {name for name in read(b.folder) if ".rewound" not in name}
        if not store.dead:
            break
        cut += 1
    assert cut > 60


def test_cut_off_and_gone_on_with_in_the_same_folder(machines: tuple[Machine, Machine]) -> None:
    """Half a step was sent and not written down: nothing of it stays once the folder has another."""
    objects: dict[str, bytes] = {}
    a = with_store(machines[0].mirror("gs://bucket/same"), Store(objects, 8))
    a.take("run")
    write(a.folder, {"config.json": "{}"})
    step(a.folder, 8, "eight")
    record = (a.folder / RECORD).read_text()
    with pytest.raises(Cut):
        a.push()
    a._ended.set()
    (a.folder / RECORD).write_text(record)  # a process that is killed writes none
    assert any("/8/" in name for name in objects)
    shutil.rmtree(a.folder / "checkpoints/generator/8")
    step(a.folder, 16, "sixteen")
    killed(objects)
    again = with_store(machines[0].mirror(a.url), store := Store(objects, FOREVER))
    again.take("run")
    again.release()
    assert not any("/8/" in name for name in objects) and "config.json" in store.order
    b = with_store(machines[1].mirror(a.url), Store(objects, 0))
    b.pull()
    assert steps(b.folder) == [16]


def test_retention_takes_a_step_that_is_on_its_way(machines: tuple[Machine, Machine]) -> None:
    objects: dict[str, bytes] = {}
    a = machines[0].mirror("gs://bucket/retention")
    folder = a.folder / "checkpoints/generator"

    def seen(name: str) -> None:
        if "/16/" in name and (folder / "16").exists():
            shutil.rmtree(folder / "16")

    with_store(a, Store(objects, FOREVER, seen=seen)).take("run")
    write(a.folder, {"config.json": "{}"})
    step(a.folder, 8, "eight")
    a.push()
    step(a.folder, 16, "sixteen")
    shutil.rmtree(folder / "8")
    a.push()
    b = with_store(machines[1].mirror(a.url), Store(objects, 0))
    b.pull()
    assert 16 in steps(b.folder) and not (folder / "16").exists()
    a.push()  # none is here: the bucket keeps what it has
    b.pull()
    assert 16 in steps(b.folder)
    step(a.folder, 24, "twenty-four")
    a.release()
    b.pull()
    assert steps(b.folder) == [24]


def test_a_damaged_step_is_not_sent(machines: tuple[Machine, Machine], caplog: pytest.LogCaptureFixture) -> None:
    objects: dict[str, bytes] = {}
    a = with_store(machines[0].mirror("gs://bucket/damaged"), Store(objects, FOREVER))
    a.take("run")
    write(a.folder, {"config.json": "{}"})
    step(a.folder, 8, "eight")
    a.push()
    step(a.folder, 16, "sixteen")
    write(a.folder, {"checkpoints/generator/16/state/d/0": "sixteeN"})
    shutil.rmtree(a.folder / "checkpoints/generator/8")
    a.push()
    a.push()
    assert "16 is not sent to gs://bucket/damaged" in caplog.text and caplog.text.count("state/d/0 is damaged") == 1
    b = with_store(machines[1].mirror(a.url), Store(objects, 0))
    b.pull()
    assert steps(b.folder) == [8]
    a.release()


def test_a_folder_that_is_gone_takes_nothing_with_it(machines: tuple[Machine, Machine]) -> None:
    objects: dict[str, bytes] = {}
    a = with_store(machines[0].mirror("gs://bucket/gone"), Store(objects, FOREVER))
    a.take("run")
    write(a.folder, {"config.json": "{}", "a": "x"})
    a.push()
    shutil.rmtree(a.folder)
    with contextlib.suppress(FileNotFoundError):
        a.release()
    assert {"config.json", "a"} <= objects.keys()


# ---------------------------------------------------------------- kill -9


def told(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir, "classifier")]


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
WHAT = "kill -9 at random moments, the folder deleted, gone on with elsewhere from a bucket of {} kind: same state and rows, bitwise"


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=SLOW)])
def test_killed_and_gone_on_with_from_google(
    kills: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, straight, killed = kill("gs", kills, tmp_path, monkeypatch)
    assert ours == straight and killed == kills


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_and_gone_on_with_from_amazon(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, straight, killed = kill("s3", 10, tmp_path, monkeypatch)
    assert ours == straight and killed == 10


def kill(
    scheme: str, kills: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Any, Any], tuple[Any, Any], int]:
    """Kills a run on the tiny experiment so many times: its last state and rows, those of one that was not killed, and the kills."""
    recipe = {"steps": (last := max(120, 40 * kills)), "checkpoint_every": 5, "eval_every": 20, "log_every": 1}
    flags = ["--stage=classifier", *(f"--config.classifier.train.{k}={v}" for k, v in recipe.items())]
    url, rng, newest, moments = f"{scheme}://bucket/killed", random.Random(kills), 0, []
    with serve(scheme) as reached:
        for name, value in reached.items():
            monkeypatch.setenv(name, value)

        def start(workdir: str, scratch: str) -> list[Command]:
            env = environment() | reached | {object_store.SCRATCH: str(tmp_path / scratch), object_store.PUSH: "0.1"}
            return [Command(["train", "--config", str(TINY), "--workdir", workdir, *flags], env)]

        def there() -> list[int]:
            """Steps in the bucket that have a manifest."""
            names = [name.split("/") for name in bucket.names() if name.endswith("manifest.json")]
            return sorted(int(parts[-2]) for parts in names)

        finish(start(str(tmp_path / "straight"), "none"))
        look = Machine(monkeypatch, tmp_path / "look")
        bucket = look.mirror(url).bucket
        for trial in range(kills):
            running = start(url, "here")
            if trial % 5 == 3:
                time.sleep(rng.uniform(0.2, 5.0))  # starting, pulling, compiling
            else:
                wait_for(lambda newest=newest: max(there(), default=0) > newest, running)
                time.sleep(rng.uniform(0, 0.6))
            running[0].kill()
            out = running[0].communicate()[0]
            assert running[0].returncode == -9, out[-3000:]
            shutil.rmtree(tmp_path / "here", ignore_errors=True)
            mirror = look.mirror(url)
            mirror.pull()
            good = steps(mirror.folder, "classifier")  # each that has a manifest verifies
            assert max(good, default=0) >= newest, "what was in the bucket is there"
            newest = max(good, default=0)
            moments.append(newest)
        out = finish(start(url, "elsewhere"))
        assert not newest or f"classifier: resuming from step {newest} of {last}" in out
        final = tmp_path / "elsewhere" / scheme / "bucket" / "killed"
        ours, straight = ((state_of(w, last), told(w)) for w in (final, tmp_path / "straight"))
        mirror = look.mirror(url)
        mirror.pull()
        assert read_all(mirror.folder) == read_all(final), "the bucket has all of it, and nothing else"
        assert state_of(mirror.folder, last) == state_of(final, last)
    assert not (tmp_path / "none").exists()
    assert moments[-1] < last, "it was killed while it trained"
    return ours, straight, len(moments)


def read_all(folder: pathlib.Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if ".unfinished" not in str(path)}
