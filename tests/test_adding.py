"""docs/adding.md followed to the letter: its files written into a copy of the project, its commands given there."""

from __future__ import annotations

import json
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import environment
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding.md").read_text()
PROGRAMS = {"pytest": ["-m", "pytest", "-p", "no:cacheprovider"], "rar-jax": ["-m", "rar_jax"]}


def blocks(pattern: str) -> list[tuple[str, ...]]:
    return [m.groups() for m in re.finditer(rf"^```{pattern}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The copy, with the page's files in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("rar_jax", "tests/contracts", "tests/helpers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in blocks(r'python title="(\S+)"'):
        assert not (folder / name).exists(), f"{name} is a file of the project already"
        (folder / name).write_text(text)
    return folder


def give(command: str, project: pathlib.Path) -> str:
    """A line of the page in a process of its own."""
    program, *argv = shlex.split(command)
    # Of a person, and not of this run of the tests: the end of that pytest would remove this one's cache, or write its table.
    ours = ("RAR_JAX_TEST_CACHE", "PYTEST_")
    env = {name: value for name, value in environment().items() if not name.startswith(ours)}
    env["PYTHONPATH"] = str(project)
    done = subprocess.run(
        [sys.executable, *PROGRAMS[program], *argv], cwd=project, env=env, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_the_page_from_top_to_bottom(project: pathlib.Path) -> None:
    commands = [line for (block,) in blocks("bash") for line in block.splitlines()]
    contracts = [command for command in commands if command.startswith("pytest")]
    assert [len(contracts), len(commands)] == [2, 4]
    for name, command in zip(("places", "patches"), contracts, strict=True):
        out = give(f"{command} -rA", project)
        # All of the contract, of this file: nothing was left out but what is optional.
        passed, known = re.findall(rf"PASSED \S+::(test_\w+)\[\S*{name}\S*\]", out), ROOT / "tests" / "contracts"
        kind = known / ("test_generators.py" if name == "places" else "test_tokenizers.py")
        optional = {"test_counts_for_bench_grow_with_the_batch"}
        assert set(passed) == set(re.findall(r"^def (test_\w+)", kind.read_text(), re.MULTILINE)) - optional, out
    for command in commands[2:]:
        give(command, project)
    result = json.loads((project / "runs/mine/result.json").read_text())["last_validation"]
    # What a class and a place tell of a token; knowing nothing, it would be log2(32) = 5 bits.
    assert 1 < result["generator"]["validation/bits"] < 0.8 * math.log2(32)
    assert result["tokenizer"]["validation/psnr"] > 15
    pictures = [np.asarray(Image.open(path)) for path in sorted((project / "pictures").glob("0*.png"))]
    assert len(pictures) == 80 and {picture.shape for picture in pictures} == {(8, 8)}
    assert len({picture.tobytes() for picture in pictures}) > 70
