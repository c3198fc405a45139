import json
import math
import pathlib

import numpy as np
import pytest
from events import pictures, read_events, scalars

from rar_jax.runs import logging as report
from rar_jax.runs.grids import Grid
from rar_jax.runs.logging import RunLogger, read_metrics


def _write(workdir: pathlib.Path, stage: str, steps: list[int]) -> None:
    with RunLogger(workdir, stage, total_steps=10, quiet=True) as reporter:
        for step in steps:
            reporter.write_metrics(step, {"loss": step / 10})


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
    with RunLogger(tmp_path, "generator", total_steps=2, quiet=True) as reporter:
        reporter.write_metrics(1, {"loss": np.float32(0.5)})
        assert read_metrics(tmp_path)[0]["loss"] == 0.5


def test_numbers_that_are_not_finite_become_null(tmp_path: pathlib.Path) -> None:
    with RunLogger(tmp_path, "generator", total_steps=2, quiet=True) as reporter:
        reporter.write_metrics(1, {"nan": math.nan, "inf": np.float32("inf"), "one": np.ones(())})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["nan"], row["inf"], row["one"]) == (None, None, 1.0)


def test_resume_drops_only_rows_of_this_stage_after_the_step(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "tokenizer", [10, 500])
    _write(tmp_path, "generator", [10, 20, 30])
    with RunLogger(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        reporter.resume_from(20)
        reporter.write_metrics(30, {"loss": -1.0})
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
    with RunLogger(tmp_path, "generator", total_steps=40, quiet=True) as reporter, pytest.raises(OSError, match="full"):
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


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", "3", "[" * 100_000, '{"step": 1}', '{"stage": "generator", "step": "x", "time": 1}']
)
def test_damaged_lines_do_not_stop_a_run(tmp_path: pathlib.Path, line: str) -> None:
    _write(tmp_path, "generator", [10])
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    problems: list[str] = []
    assert [r["step"] for r in read_metrics(tmp_path, problems=problems)] == [10]
    assert problems == [f"{path} line 1 is not a row of metrics: delete that line"]
    with RunLogger(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        reporter.resume_from(10)
        reporter.write_metrics(20, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(tmp_path, problems=problems)] == [10, 20] and len(problems) == 1


def test_tensorboard_gets_scalars_and_images_and_a_purge_step(tmp_path: pathlib.Path) -> None:
    with RunLogger(tmp_path, "generator", total_steps=2, quiet=True) as reporter:
        reporter.resume_from(6)
        reporter.write_metrics(7, {"loss": 0.5, "bad": math.nan})
        reporter.write_image(7, "samples", np.zeros((8, 8, 1), np.uint8))
    events = read_events(tmp_path / "tensorboard" / "generator")
    tags = [(e.step, value.tag) for e in events for value in e.summary.value]
    assert tags == [(7, "loss"), (7, "samples")]
    assert [e.step for e in events if e.session_log.status == e.session_log.START] == [7]


def test_tensorboard_files_hold_the_values_and_pixels(tmp_path: pathlib.Path) -> None:
    """Read back by the record format, checksums included, and not by what wrote them."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), np.uint8)
    with RunLogger(tmp_path, "tokenizer", total_steps=2, quiet=True) as reporter:
        reporter.write_metrics(1, {"loss": 0.1, "psnr": math.inf})
        reporter.write_metrics(2, {"loss": 3e-7})
        reporter.write_grid(2, "reconstructions", Grid(images, ("original", "reconstruction"), ("a", "b", "c")))
        reporter.write_image(1, "colours", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
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
    with RunLogger(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        for cut, step in (('{"st', 20), ('{"stage": "generator", "step": 21', 30)):
            with path.open("a") as file:
                file.write(cut)
            reporter.write_metrics(step, {"loss": 1.0})
        assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30]
    _write(tmp_path, "generator", [40])
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 30, 40] and len(path.read_text().splitlines()) == 4


def test_a_full_disk_costs_the_row_and_is_said_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path, grid = tmp_path / "metrics.jsonl", Grid(np.zeros((1, 1, 8, 8, 1), np.uint8), ("a",), ("b",))
    with RunLogger(tmp_path, "generator", total_steps=40, quiet=True) as reporter:
        path.symlink_to("/dev/full")
        (tmp_path / "grids" / "generator").mkdir(parents=True)
        (tmp_path / "grids" / "generator" / "new.tmp").symlink_to("/dev/full")
        for step in (1, 2):
            reporter.write_metrics(step, {"loss": 1.0})
            reporter.write_grid(step, "samples", grid)
        path.unlink()
        (tmp_path / "grids" / "generator" / "new.tmp").unlink()
        reporter.write_metrics(3, {"loss": 1.0})
        reporter.write_grid(3, "samples", grid)
    assert [r["step"] for r in read_metrics(tmp_path)] == [3]
    assert [p.name for p in (tmp_path / "grids" / "generator").iterdir()] == ["3.png"]
    assert [r.getMessage() for r in caplog.records] == [
        f"the disk of {tmp_path} is full: rows and images are skipped until there is room"
    ]
    assert {step for _, step in scalars(read_events(tmp_path / "tensorboard" / "generator"))} == {1, 2, 3}
