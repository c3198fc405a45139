"""What the promises cost: as docs/measurements/guard.py measures it, in turns. Alone on the machine: other work moves the ratio."""

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.promise(8, "guard and checksums together take under 3 % of a training step of digits")
def test_guard_and_checksums(record_property: Any) -> None:
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
    record_property("count", f"{cost:+.2%} of a step")
    assert cost < 0.03, done.stdout
