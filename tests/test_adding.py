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

from rar_jax.runs.checkpoint import load_params
from rar_jax.tokens.store import TokenStore

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding.md").read_text()
RUNS = {"mine": "pictures", "floats": "pictures_of_floats"}
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
    assert [command.split()[0] for command in commands] == [
        "pytest",
        "pytest",
        "rar-jax",
        "rar-jax",
        "pytest",
        "rar-jax",
        "rar-jax",
    ]
    passed: dict[str, set[str]] = {}
    for command in commands:
        out = give(command + " -rA" * command.startswith("pytest"), project)
        for test, name in re.findall(r"PASSED \S+::(test_\w+)\[(?:\S*-)?(places|patches|linear|normals)\b", out):
            passed.setdefault(name, set()).add(test)
    for name, tests in passed.items():  # all of the contract: nothing was left out
        kind = "test_generators.py" if name in ("places", "normals") else "test_tokenizers.py"
        contract = (ROOT / "tests" / "contracts" / kind).read_text()
        assert tests == set(re.findall(r"^def (test_\w+)\(\w+: ModuleType", contract, re.MULTILINE)), name
    assert len(passed) == 4

    validation = {run: json.loads((project / f"runs/{run}/result.json").read_text())["last_validation"] for run in RUNS}
    # What a class and a place tell of a token; knowing nothing, it would be log2(32) = 5 bits.
    assert 1 < validation["mine"]["generator"]["validation/bits"] < 0.8 * math.log2(32)
    assert all(validation[run]["tokenizer"]["validation/psnr"] > 15 for run in RUNS)
    for folder in RUNS.values():
        pictures = [np.asarray(Image.open(path)) for path in sorted((project / folder).glob("0*.png"))]
        assert len(pictures) == 80 and {picture.shape for picture in pictures} == {(8, 8)}
        assert len({picture.tobytes() for picture in pictures}) > 70


def test_normals_are_those_of_the_data(project: pathlib.Path) -> None:
    """The trained means and spreads, by class and place, against NumPy on the stored latents."""
    folder = project / "runs" / "floats"
    params = load_params(folder / "checkpoints" / "generator", 400)
    store = TokenStore(folder / "tokens" / "train")
    rows = store.gather(np.arange(len(store)))
    of_class = rows["tokens"][rows["labels"] == 3]
    assert np.corrcoef((params["mean"][3] + params["shift"]).ravel(), of_class.mean(axis=0).ravel())[0, 1] > 0.95
