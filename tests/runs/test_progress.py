"""How far a job is: plain lines, and one live line on a terminal."""

import pathlib
import sys

import pytest
import rich.console

from rar_jax.runs import progress
from rar_jax.runs.logging import RunLogger


class _Clock:
    """With plain lines, since the tests' stderr is no terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.log, "isEnabledFor", lambda level: True)
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_plain_lines_at_the_start_every_ten_seconds_and_at_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock(monkeypatch)
    with RunLogger(tmp_path, "generator", total_steps=100) as reporter:
        for step in range(1, 101):
            reporter.show_progress(step, loss=1.25)
            clock.now += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generator  1/100 steps  loss 1.25"
    assert lines[1] == "generator  21/100 steps  2 steps/s  0:00:40 left  loss 1.25"
    assert lines[-1] == "generator  100/100 steps  2 steps/s  loss 1.25"
    assert len(lines) == 6


def test_an_interrupted_stage_still_prints_where_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt), RunLogger(tmp_path, "generator", total_steps=100) as reporter:
        reporter.show_progress(1)
        clock.now += 1
        reporter.show_progress(2)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1] == "generator  2/100 steps  1 steps/s  0:01:38 left"


def test_quiet_prints_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLogger(tmp_path, "generator", total_steps=1, quiet=True) as reporter:
        reporter.show_progress(1, loss=1.0)
    assert list(progress.track_progress([1, 2], quiet=True)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_no_terminal_is_quiet_unless_it_is_asked(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, lines in ((False, []), (True, ["0/2 items", "2/2 items"])):
        progress.show_progress_in_files(asked)
        assert list(progress.track_progress([1, 2])) == [1, 2]
        assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == lines
    progress.show_progress_in_files(False)


def test_a_terminal_gets_one_live_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = rich.console.Console
    monkeypatch.setattr(
        progress.rich.console,
        "Console",
        lambda **_: make(file=sys.stderr, force_terminal=True, width=120, color_system=None),
    )
    with RunLogger(tmp_path, "generator", total_steps=3) as reporter:
        for step in (1, 2, 3):
            reporter.show_progress(step, loss=0.5)
    shown = capsys.readouterr().err
    assert "3/3 steps" in shown and "loss 0.5" in shown
    assert shown.count("\n") == 1


def test_progress_over_an_iterable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = _Clock(monkeypatch)
    seen = []
    for item in progress.track_progress(range(4), description="tokenize", unit="batches"):
        seen.append(item)
        clock.now += 6
    assert seen == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        "tokenize  0/4 batches",
        "tokenize  2/4 batches  0.167 batches/s  0:00:12 left",
        "tokenize  4/4 batches  0.167 batches/s",
    ]
