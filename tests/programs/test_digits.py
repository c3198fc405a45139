"""The README's first command as it stands there, and the figures it has to reach. Minutes: `bash .ci/run long`."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_digits_reaches_its_figures(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a user has
    command = [
        sys.executable,
        "-m",
        "rar_jax",
        "run",
        "--config",
        "experiments/digits.py",
        "--workdir",
        str(tmp_path / "digits"),
    ]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
    seconds = time.monotonic() - start
    result = json.loads((tmp_path / "digits" / "result.json").read_text())
    print(json.dumps(result, indent=1), f"\n{seconds:.0f} s")
    assert result["classifier_accuracy_heldout_n360"] >= 0.97
    assert result["asked_class_share_n1000"] >= 0.90
    distance = result["fd_classifier"]
    assert distance["samples_n360"] <= distance["untrained_n360"] / 4
    assert distance["samples_n1000"] <= distance["untrained_n1000"] / 4
    assert seconds <= 240
