"""Every system against its golden files, and the command that measures any other folder of them."""

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import tests.golden
from tests.golden import HERE, Check, list_systems, max_relative_difference, measure_parity
from tests.golden.__main__ import main


@pytest.mark.parametrize("name", list_systems())
def test_parity(name: str, parity: Any) -> None:
    checks = measure_parity(name, HERE / name)
    assert [check for check in checks if not check.passed] == []
    for check in checks:
        parity.check(f"{name}: {check.quantity}", check.measured, check.bound)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("rarr", "", "there are no golden files of 'rarr'. Did you mean 'rar'?\n"),
        ("maskgit_vq", "", "FOLDER/config.json is missing: 'maskgit_vq' needs config.json, maskgit_vq_tiny.bin, "),
        ("maskgit_vq", "maskgit_vq_tiny.bin", "FOLDER/maskgit_vq_tiny.npz has no array 'images_nchw'\n"),
    ],
)
def test_unusable_files_are_one_clear_line(
    name: str, file: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if file:  # all files are there, one array is not
        for path in (HERE / name).iterdir():
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "maskgit_vq_tiny.npz").unlink()
        np.savez(tmp_path / "maskgit_vq_tiny.npz", tokens=np.zeros(3))
    assert main([name, str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(message.replace("FOLDER", str(tmp_path)))


def test_a_missed_bound_is_printed_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("a", 1e-5, 9e-6), Check("b", 1e-5, 2e-5), Check("a", 1e-5, 1e-6), Check("c", 0, float("nan"))]
    monkeypatch.setattr("tests.golden.maskgit_vq.measure", lambda folder: iter(checks))
    assert main(["maskgit_vq"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["a", "1e-05", "9e-06", "ok"],
        ["b", "1e-05", "2e-05", "MISSED"],
        ["c", "0", "nan", "MISSED"],
        ["maskgit_vq:", "1", "of", "3", "bounds", "hold"],
    ]


def test_the_command_needs_the_project_folder_alone(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "tests.golden", "rar", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE.parents[1], env={}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"{tmp_path}/config.json is missing")


def test_relative_differences() -> None:
    assert max_relative_difference([0.0, 2.2], [0.0, 2.0]) == pytest.approx(0.1)
    assert max_relative_difference([1e-12], [0.0]) > 1e200
    assert max_relative_difference([1.0, 2.0], [1.0]) == np.inf == tests.golden.max_difference([[1.0]], [1.0])
