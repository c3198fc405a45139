import json
import math
import pathlib
import sys

import numpy as np
import pytest
import rich.console
from events import pictures, read_events, scalars

from rar_jax.runs import logging as report
from rar_jax.runs.grids import Grid
from rar_jax.runs.logging import Reporter, read_metrics


def _write(workdir: pathlib.Path, stage: str, steps: list[int]) -> None:
    with Reporter(workdir, stage, total_steps=10, quiet=True) as reporter:
        for step in steps:
            reporter.metrics(step, {"loss": step / 10})


def test_rows_are_read_back(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "tokenizer", [1, 2])
    _write(tmp_path, "generator", [1])
    rows = read_metrics(tmp_path)
    assert [(r["stage"], r["step"], r["loss"]) for r in rows] == [
        ("tokenizer", 1, 0.1),
        ("tokenizer", 2, 0.2),
        ("generator", 1, 0.1),
    ]
    assert rows == sorted(rows, key=lambda r: r["time"])
    assert [r["step"] for r in read_metrics(tmp_path, "tokenizer")] == [1, 2]
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_row_is_on_disk_before_the_reporter_closes(tmp_path: pathlib.Path) -> None:
    with Reporter(tmp_path, "generator", total_steps=2, quiet=True) as reporter:
        reporter.metrics(1, {"loss": np.float32(0.5)})
        assert read_metrics(tmp_path)[0]["loss"] == 0.5


def test_numbers_that_are_not_finite_become_null(tmp_path: pathlib.Path) -> None:
    with Reporter(tmp_path, "generator", total_steps=2, quiet=True) as reporter:
        reporter.metrics(1, {"nan": math.nan, "inf": np.float32("inf"), "one": np.ones(())})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["nan"], row["inf"], row["one"]) == (None, None, 1.0)


def test_resume_drops_only_rows_of_this_stage_after_the_step(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "tokenizer", [10, 500])
    _write(tmp_path, "generator", [10, 20, 30])
    with Reporter(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        reporter.resume_from(20)
        reporter.metrics(30, {"loss": -1.0})
    assert [(r["stage"], r["step"]) for r in read_metrics(tmp_path)] == [
        ("tokenizer", 10),
        ("tokenizer", 500),
        ("generator", 10),
        ("generator", 20),
        ("generator", 30),
    ]
    assert read_metrics(tmp_path)[-1]["loss"] == -1.0
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["metrics.jsonl"]


def test_a_failed_rewrite_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "generator", [10, 20])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "fsync", crash)
    with Reporter(tmp_path, "generator", total_steps=40, quiet=True) as reporter, pytest.raises(OSError, match="full"):
        reporter.resume_from(10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("tail", ['{"stage": "gener', '{"stage": "generator", "step": 20, "loss": 1', "\0\0\0", "\n"])
def test_a_half_written_last_line_is_forgotten(tmp_path: pathlib.Path, tail: str) -> None:
    _write(tmp_path, "generator", [10])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail.rstrip("\n"))
    assert [r["step"] for r in read_metrics(tmp_path)] == [10]
    _write(tmp_path, "generator", [20])  # no resume_from: the new row must still start its own line
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20]


def test_a_last_row_that_lacks_only_its_newline_is_kept(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "generator", [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    _write(tmp_path, "generator", [30])
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "generator", [10])
    path = tmp_path / "metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(tmp_path)


def test_tensorboard_gets_scalars_and_images_and_a_purge_step(tmp_path: pathlib.Path) -> None:
    with Reporter(tmp_path, "generator", total_steps=2, quiet=True) as reporter:
        reporter.resume_from(6)
        reporter.metrics(7, {"loss": 0.5, "bad": math.nan})
        reporter.image("samples", np.zeros((8, 8, 1), np.uint8), 7)
    events = read_events(tmp_path / "tensorboard" / "generator")
    tags = [(e.step, value.tag) for e in events for value in e.summary.value]
    assert tags == [(7, "loss"), (7, "samples")]
    assert [e.step for e in events if e.session_log.status == e.session_log.START] == [7]


def test_tensorboard_files_hold_the_values_and_pixels(tmp_path: pathlib.Path) -> None:
    """Read back by the record format, checksums included, and not by what wrote them."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), np.uint8)
    with Reporter(tmp_path, "tokenizer", total_steps=2, quiet=True) as reporter:
        reporter.metrics(1, {"loss": 0.1, "psnr": math.inf})
        reporter.metrics(2, {"loss": 3e-7})
        reporter.grid("reconstructions", Grid(images, ("original", "reconstruction"), ("a", "b", "c")), 2)
        reporter.image("colours", np.arange(48, dtype=np.uint8).reshape(4, 4, 3), 1)
    events = read_events(tmp_path / "tensorboard" / "tokenizer")
    told = scalars(events)
    assert told == {("loss", 1): pytest.approx(0.1), ("loss", 2): pytest.approx(3e-7)}
    shown = pictures(events)
    assert shown.keys() == {("reconstructions", 2), ("colours", 1)}
    np.testing.assert_array_equal(shown["colours", 1], np.arange(48).reshape(4, 4, 3))
    by_hand = np.concatenate([np.concatenate(list(row), axis=1) for row in images]).repeat(6, 0).repeat(6, 1)
    np.testing.assert_array_equal(
        shown["reconstructions", 2], by_hand.repeat(3, axis=-1)
    )  # grey; 8 pixels six times: 48 are seen


# ---------------------------------------------------------------- a full disk


def test_a_row_that_a_full_disk_cut_does_not_spoil_the_next(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(tmp_path, "generator", [10])
    with Reporter(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        for cut, step in (('{"st', 20), ('{"stage": "generator", "step": 21', 30)):
            with path.open("a") as file:
                file.write(cut)
            reporter.metrics(step, {"loss": 1.0})
        assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30]
    _write(tmp_path, "generator", [40])
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30, 40] and len(path.read_text().splitlines()) == 4


def test_a_full_disk_costs_the_row_and_is_said_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path, grid = tmp_path / "metrics.jsonl", Grid(np.zeros((1, 1, 8, 8, 1), np.uint8), ("a",), ("b",))
    with Reporter(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        path.symlink_to("/dev/full")
        (tmp_path / "grids" / "generator").mkdir(parents=True)
        (tmp_path / "grids" / "generator" / "new.tmp").symlink_to("/dev/full")
        for step in (1, 2):
            reporter.metrics(step, {"loss": 1.0})
            reporter.grid("samples", grid, step)
        path.unlink()
        (tmp_path / "grids" / "generator" / "new.tmp").unlink()
        reporter.metrics(3, {"loss": 1.0})
        reporter.grid("samples", grid, 3)
    assert [r["step"] for r in read_metrics(tmp_path)] == [3]
    assert [p.name for p in (tmp_path / "grids" / "generator").iterdir()] == ["3.png"]
    assert [r.getMessage() for r in caplog.records] == [
        f"the disk of {tmp_path} is full: rows and pictures are left out until there is room; the training goes on"
    ]
    assert {step for _, step in scalars(read_events(tmp_path / "tensorboard" / "generator"))} == {1, 2, 3}


# ---------------------------------------------------------------- the line


class _Clock:
    """With plain lines, since the tests' stderr is no terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(report, "_in_files", True)
        monkeypatch.setattr(report.time, "monotonic", lambda: self.now)


def test_plain_lines_at_the_start_every_ten_seconds_and_at_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock(monkeypatch)
    with Reporter(tmp_path, "generator", total_steps=100) as reporter:
        for step in range(1, 101):
            reporter.progress(step, loss=1.25)
            clock.now += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generator  1/100 steps  loss 1.25"
    assert lines[1] == "generator  21/100 steps  2 steps/s  0:40 left  loss 1.25"
    assert lines[-1] == "generator  100/100 steps  2 steps/s  loss 1.25"
    assert len(lines) == 6


def test_an_interrupted_stage_still_prints_where_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Reporter(tmp_path, "generator", total_steps=100) as reporter:
        reporter.progress(1)
        clock.now += 1
        reporter.progress(2)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1] == "generator  2/100 steps  1 steps/s  1:38 left"


def test_quiet_prints_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(tmp_path, "generator", total_steps=1, quiet=True) as reporter:
        reporter.progress(1, loss=1.0)
    assert list(report.progress([1, 2], quiet=True)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_no_terminal_is_quiet_unless_it_is_asked(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, lines in ((False, []), (True, ["0/2 items", "2/2 items"])):
        report.progress_in_files(asked)
        assert list(report.progress([1, 2])) == [1, 2]
        assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == lines
    report.progress_in_files(False)


def test_a_terminal_gets_one_live_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = rich.console.Console
    monkeypatch.setattr(
        report.rich.console,
        "Console",
        lambda **_: make(file=sys.stderr, force_terminal=True, width=120, color_system=None),
    )
    with Reporter(tmp_path, "generator", total_steps=3) as reporter:
        for step in (1, 2, 3):
            reporter.progress(step, loss=0.5)
    shown = capsys.readouterr().err
    assert "3/3 steps" in shown and "loss 0.5" in shown
    assert shown.count("\n") == 1


def test_progress_over_an_iterable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = _Clock(monkeypatch)
    seen = []
    for item in report.progress(range(4), description="tokenize", unit="batches"):
        seen.append(item)
        clock.now += 6
    assert seen == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        "tokenize  0/4 batches",
        "tokenize  2/4 batches  0.167 batches/s  0:12 left",
        "tokenize  4/4 batches  0.167 batches/s",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (61, "1:01"), (59.7, "1:00"), (3700, "1:01:40")])
def test_durations(seconds: float, text: str) -> None:
    assert report._duration(seconds) == text
