"""The progress line of real commands: one line that is redrawn on a terminal, none with --quiet."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from commands import TINY, environment
from terminal import frames, shown_by

STEPS = 300
LINE = re.compile(
    rf"classifier [━╸╺ ]+ (\d+)/{STEPS} steps  ([\d.e+]+) steps/s(?:  (\d+:\d\d:\d\d) left)?  loss ([\d.e-]+)(?:  accuracy [\d.]+)? *"
)


def train(workdir: pathlib.Path, *flags: str, width: int = 80) -> tuple[int, bytes]:
    """The classifier of the tiny experiment, in a terminal."""
    command = [
        sys.executable,
        "-m",
        "rar_jax",
        "train",
        "--stage",
        "classifier",
        "--config",
        str(TINY),
        "--workdir",
        str(workdir),
    ]
    command += [f"--config.classifier.train.steps={STEPS}", "--config.classifier.train.log_every=1"]
    return shown_by([*command, *flags], environment(), width=width)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, bytes]:
    """A work directory, and what the terminal of 80 columns showed."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    code, output = train(workdir)
    assert code == 0, output.decode(errors="replace")
    return workdir, output


def test_one_line_is_redrawn(trained: tuple[pathlib.Path, bytes]) -> None:
    workdir, output = trained
    screens = frames(output)
    lines = [
        [line for line in screen if "steps" in line and line.startswith("classifier ") and "━" in line]
        for screen in screens
    ]
    assert max(map(len, lines)) == 1, "never two of them on the screen"
    drawn = [screen[0] for screen in lines if screen]
    assert max(map(len, drawn)) <= 80
    told = [found for line in dict.fromkeys(drawn) if (found := LINE.fullmatch(line))]
    assert len(told) >= 2, drawn[-3:]
    done = [int(found[1]) for found in told]
    assert done == sorted(done) and done[-1] == STEPS
    # Rate, time left and the last loss in all of them but the last, at which nothing is left.
    for found in told[:-1]:
        rate, left = float(found[2]), found[3]
        minutes, seconds = left.split(":")[1:]
        assert int(minutes) * 60 + int(seconds) == pytest.approx((STEPS - int(found[1])) / rate, abs=1)
    assert told[-1][3] is None
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    for found in told:  # metrics are fetched while the next step runs: the last known loss is of the step before
        known = [f"{losses[step]:.4g}" for step in (int(found[1]) - 1, int(found[1])) if step in losses]
        assert found[4] in known


def test_it_is_gone_to_the_next_line_at_the_end(trained: tuple[pathlib.Path, bytes]) -> None:
    """The cursor is shown again, and the line stays as it was last."""
    assert trained[1].count(b"\x1b[?25l") == trained[1].count(b"\x1b[?25h") > 0
    assert any(f"{STEPS}/{STEPS} steps" in line for line in frames(trained[1])[-1])


def test_quiet_is_quiet_on_a_terminal(tmp_path: pathlib.Path) -> None:
    code, output = train(tmp_path / "run", "--quiet")
    assert (code, output) == (0, b"")


@pytest.mark.parametrize("flags", [(), ("--progress",)])
def test_a_pipe_is_quiet_unless_it_is_asked(trained: tuple[pathlib.Path, bytes], flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "rar_jax", "inspect", str(trained[0]), *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "verified" in done.stdout
    assert bool(re.search(r"verify .* checkpoints  [\d.]+ checkpoints/s", done.stderr)) == bool(flags), done.stderr
    assert flags or done.stderr == ""


# ---------------------------------------------------------------- the other verbs


def in_terminal(*argv: Any) -> str:
    """What a verb shows."""
    code, output = shown_by([sys.executable, "-m", "rar_jax", *map(str, argv)], environment())
    assert code == 0, output.decode(errors="replace")
    return "\n".join(line for screen in frames(output) for line in screen)


@pytest.mark.slow
def test_verbs_that_take_long_show_how_far_they_are(
    trained: tuple[pathlib.Path, bytes], released_pair: Any, tmp_path: pathlib.Path
) -> None:
    given = ("--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer)
    for verb, unit in (
        (("inspect", trained[0]), "checkpoints"),
        (("convert", *given, "--out", tmp_path / "converted"), "models"),
        (("sample", *given, "--classes", "1,2", "--out", tmp_path / "samples"), "batches"),
        (("bench", "loader", "--config", TINY, "--records", 2000, "--repeats", 2, "--batch-size", 8), "runs"),
    ):
        assert re.search(rf"(\d+)/\1 {unit}  [\d.e+-]+ {unit}/s", in_terminal(*verb)), verb
    quiet = in_terminal("sample", *given, "--classes", "1", "--out", tmp_path / "quiet", "--quiet")
    assert quiet == ""


@pytest.mark.slow
def test_scores_show_how_many_images_are_through(
    released_pair: Any, inception_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    given = (
        "--weights",
        released_pair.generator,
        "--tokenizer",
        released_pair.tokenizer,
        "--inception",
        inception_file,
    )
    shown = in_terminal("evaluate", *given, "--samples", 12, "--chunk", 4, "--batch-size", 4, "--out", tmp_path)
    assert re.search(r"(\d+)/12 images  [\d.e+-]+ images/s", shown), shown[-500:]
    assert "12/12 images" in shown and "inception_score" in shown
