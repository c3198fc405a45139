"""What the promises cost: as docs/measurements/guard.py measures it, in turns. Alone on the machine: other work moves the ratio."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_guard_and_checksums() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/measurements/guard.py"), "digits"],
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ratio, share = (re.findall(pattern, done.stdout) for pattern in (r"median ratio (\S+)", r"(\S+)% of the"))
    cost = float(ratio[0]) - 1 + float(share[0]) / 100
    assert cost < 0.03, done.stdout
