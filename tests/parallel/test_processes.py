"""Real processes, started as a person would on one machine (launch/local.sh): what two do is what one does.

Two processes of two fake devices against one of four, on a mesh whose fsdp axis is cut inside a process and whose data axis
reaches over both; and on one whose tensor axis reaches over both, so that they hold the same rows. The generator starts from
the same tokenizer: two trainings of it differ in the last bit, since sums are taken in another order, and a token that lies
between two codes can then differ.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import cheap_inception
import numpy as np
import pytest
from commands import ROOT, TINY, Command, environment, finish

from rar_jax.errors import ConfigError
from rar_jax.parallel.processes import COORDINATOR, COUNT, INDEX, ProcessSettings, read_settings
from rar_jax.runs.logging import read_metrics

FSDP = ("--config.mesh.fsdp=2", "--config.train.keep_checkpoints=3")


def rar_jax(processes: int, verb: str, workdir: pathlib.Path, *flags: str, code: int = 0) -> str:
    """Runs a verb on four devices shared out among the processes; what they printed."""
    if verb != "sample":
        flags = ("--config", str(TINY), "--workdir", str(workdir), *flags)
    if processes == 1:
        return finish([Command([verb, *flags], environment(4))], code)
    path = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), str(processes), verb, *flags], env=environment(4 // processes) | path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-6000:]
    return done.stdout


def rows(workdir: pathlib.Path, stage: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(workdir, stage)]


def check_rows(ours: pathlib.Path, theirs: pathlib.Path, stage: str) -> None:
    """Every number that was told of a stage: losses and what is made of them to 1e-5, norms of gradients less closely."""
    mine, yours = rows(ours, stage), rows(theirs, stage)
    assert [row.keys() for row in mine] == [row.keys() for row in yours] and len(mine) > 12
    for a, b in zip(mine, yours, strict=True):
        for name in a.keys() - {"stage"}:
            bound = 1e-3 if name == "grad_norm" else 1e-5
            np.testing.assert_allclose(a[name], b[name], rtol=bound, atol=1e-5, err_msg=f"{stage} {a['step']} {name}")


def check_store(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    for split in ("train", "heldout"):
        files = sorted(p.relative_to(theirs) for p in (theirs / "tokens" / split).iterdir())
        assert len(files) == 2
        for file in files:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


def distances(workdir: pathlib.Path) -> dict[str, float]:
    told = json.loads((workdir / "result.json").read_text())["fd_classifier"]
    return {name: value for name, value in told.items() if isinstance(value, float)}


def cut_back(workdir: pathlib.Path, to: pathlib.Path, step: int, *, tokens: bool = True) -> pathlib.Path:
    """A copy of a finished run that stands at a step of the generator, as if it had been stopped there."""
    shutil.copytree(workdir, to)
    for folder in (to / "checkpoints" / "generator").iterdir():
        if not folder.name.isdigit() or int(folder.name) > step:
            shutil.rmtree(folder)
    if not tokens:
        shutil.rmtree(to / "tokens")
    (to / "result.json").unlink()
    for picture in to.glob("*.png"):
        picture.unlink()
    return to


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The whole job on one process and four devices. Not to be written to."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    rar_jax(1, "run", workdir, *FSDP)
    return workdir


@pytest.fixture(scope="module")
def two(one: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same on two processes from the generator's step 8, which one process saved; with tokens made anew."""
    workdir = cut_back(one, tmp_path_factory.mktemp("two") / "run", 8, tokens=False)
    out = rar_jax(2, "run", workdir, *FSDP)
    # Told once, and by process 0.
    assert out.count("tokenizer: up to date, skipped") == out.count("generator: resuming from step 8 of 24") == 1
    return workdir


def test_two_processes_do_what_one_does(one: pathlib.Path, two: pathlib.Path) -> None:
    check_store(two, one)
    check_rows(two, one, "generator")
    found, expected = distances(two), distances(one)
    assert found.keys() == expected.keys() and len(found) == 4
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    for name in ("samples.png", "reconstructions.png", "curves.png", "config.json"):
        assert (two / name).is_file()
    assert not list(two.glob(".preflight*")) and not list(two.rglob("*.tmp"))
    # Written by both, each its own part.
    written = {
        path.parent.name for path in (two / "checkpoints/generator/24").glob("state-*/ocdbt.process_*/manifest.ocdbt")
    }
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}


def test_one_process_goes_on_from_what_two_saved(one: pathlib.Path, two: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = cut_back(two, tmp_path / "run", 16)
    out = rar_jax(1, "train", workdir, *FSDP, "--config.mesh.fsdp=4")
    assert "generator: resuming from step 16 of 24" in out
    check_rows(workdir, one, "generator")


@pytest.mark.slow
def test_a_tensor_axis_over_both_processes(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The generator from its first step; both processes hold every row of a batch."""
    workdir = cut_back(one, tmp_path / "run", 0)
    rar_jax(2, "train", workdir, *FSDP, "--config.mesh.fsdp=1", "--config.mesh.data=1", "--config.mesh.tensor=4")
    check_rows(workdir, one, "generator")


@pytest.mark.slow
def test_two_processes_sample_what_one_does(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for processes in (1, 2):
        flags = ("--weights", str(one), "--out", str(tmp_path / str(processes)), "--classes=1,7", "--per-class=3")
        out = rar_jax(processes, "sample", tmp_path, *flags)
        assert out.count("6 images in") == 1
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(files) == 7 and files == sorted(path.name for path in (tmp_path / "2").iterdir())
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_shards_are_shared_out(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Eight shards, of which each process makes four at its own pace, against eight of one process."""
    flags = ["--config", str(TINY), "--source=digits", "--split=heldout", "--weights", str(one), "--shard-records=50"]
    finish([Command(["tokenize", *flags, "--out", str(tmp_path / "one")], environment(4))])
    told = pair(*[["tokenize", *flags, "--out", str(tmp_path / "two")]] * 2)
    assert [code for code, _ in told] == [0, 0], told
    # 180 of the 360 records each, and only process 0 says so.
    assert ["180 records in" in out or "200 records in" in out for _, out in told] == [True, False]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 9 and files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_score_what_one_does(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Statistics of images, and FID, precision, recall and KID of samples against them; in chunks, with pictures."""
    results = []
    for name in ("one", "two"):
        folder = tmp_path / name
        reference = ["--make-reference=digits", "--split=heldout", "--out", str(folder / "reference.npz")]
        scores = ["--weights", str(one), "--samples=40", "--samples-npz", "--out", str(folder / "scores")]
        for flags in (reference, [*scores, "--reference", str(tmp_path / "one" / "reference.npz")]):
            argv = ["evaluate", "--inception=any", "--chunk=20", "--batch-size=16", *flags]
            if name == "one":
                finish([Command(argv, environment(4), cheap_inception.patch)])
            else:
                told = pair(argv, argv, before=cheap_inception.patch)
                assert all(code == 0 for code, _ in told), told
        results.append(json.loads((folder / "scores" / "result.json").read_text()))
        assert (folder / "scores" / "grid.png").is_file()
    numbers = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
    for number in numbers:
        np.testing.assert_allclose(results[1][number], results[0][number], rtol=1e-5, atol=1e-5, err_msg=number)
    with np.load(tmp_path / "one/reference.npz") as ours, np.load(tmp_path / "two/reference.npz") as theirs:
        assert set(ours) == set(theirs)
        for name in ("mu", "sigma"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    with np.load(tmp_path / "one/scores/samples.npz") as ours, np.load(tmp_path / "two/scores/samples.npz") as theirs:
        np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])


def test_an_error_is_told_and_ends_all(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Process 0 finds the directory to be another run's; the other one stops with its words and does not wait."""
    shutil.copytree(one, tmp_path / "run")
    out = rar_jax(2, "run", tmp_path / "run", *FSDP, "--config.seed=1", code=2)
    assert "with another config" in out and "seed: 0 -> 1" in out
    assert "process 0 stopped: ConfigError" in out and "Traceback" not in out


# ---------------------------------------------------------------- storage


def pair(*argvs: list[str], before: Any = None) -> list[tuple[int | None, str]]:
    """Exit codes and output of two processes, each with its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {COORDINATOR: f"127.0.0.1:{free.getsockname()[1]}", COUNT: "2"}
    running = [Command(argv, environment(2) | place | {INDEX: str(k)}, before) for k, argv in enumerate(argvs)]
    outs = [process.communicate(timeout=300)[0] for process in running]
    return [(process.returncode, out) for process, out in zip(running, outs, strict=True)]


def test_processes_that_do_not_share_the_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b").mkdir()
    command = ["train", "--config", str(TINY), "--workdir"]
    for code, out in pair([*command, str(tmp_path / "a")], [*command, str(tmp_path / "b")]):
        assert code == 1 and "is not shared: process 1 on" in out
        assert "does not see a file that process 0 wrote there" in out and "Traceback" not in out
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


# ---------------------------------------------------------------- starting


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    yield {COORDINATOR: "10.0.0.1:1234", COUNT: "4", INDEX: "3"}


def test_flags_go_before_the_environment(environ: dict[str, str]) -> None:
    assert read_settings(None, None, None, {}) is None
    assert read_settings(None, None, None, environ) == ProcessSettings("10.0.0.1:1234", 4, 3)
    assert read_settings("[::1]:5", 8, 0, environ) == ProcessSettings("[::1]:5", 8, 0)
    assert read_settings(None, 1, None, environ) == read_settings(None, None, None, {COUNT: "1"}) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 4, None), "several processes need --coordinator-address, --process-count and --process-index"),
        (("host:1", None, 0), "got host:1, None and 0"),
        (("host", 2, 0), "'host' must be HOST:PORT"),
        (("host:", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), r"process index 2 must be in 0\.\.1"),
        (("host:1", 0, 0), "process index 0 must be in"),
    ],
)
def test_invalid_settings(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(*given, {})


def test_a_number_that_is_none() -> None:
    with pytest.raises(ConfigError, match=f"{COUNT} is 'two': it must be a whole number"):
        read_settings("host:1", None, 0, {COUNT: "two"})


def test_a_process_that_finds_no_other(tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment(1) | {COORDINATOR: f"127.0.0.1:{port}", COUNT: "2", INDEX: "1"}
    command = [sys.executable, "-m", "rar_jax", "sample", "--weights", "x", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=env | {"RAR_JAX_INITIALIZATION_SECONDS": "3"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGABRT and "did not find the other processes within 3 s" in done.stderr
    assert f"process 1 of 2 at 127.0.0.1:{port}" in done.stderr and "Traceback" not in done.stderr
