"""What no file of rar_jax may do, read off its syntax tree, and what importing all of it must not bring in.

Which package may import which is import-linter's to say (pyproject.toml).
"""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "rar_jax").rglob("*.py")) + sorted((ROOT / "experiments").glob("*.py"))
THE_READER = "rar_jax/weights/torch_file.py"
PRIVATE = ".".join(("jax", "_src"))  # put together, so that a search for it finds offenders only
EXECUTING = {
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "torch.serialization.load",
    "pandas.read_pickle",
    "numpy.lib.format.read_array",
    "eval",
    "exec",
}
# Modules that are there to read objects, under any name of theirs. pickle itself is needed: to write, and by the reader.
READERS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def offences(source: str, *, may_subclass_unpickler: bool = False) -> list[str]:
    """Strings "line: what", for every use of what the house rules forbid, under whatever name it was imported."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # local name -> what it stands for
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                wrong = alias.name.startswith(PRIVATE) or alias.name.split(".")[0] in READERS
                found += [f"{node.lineno}: {alias.name}"] if wrong else []
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                wrong = full.startswith(PRIVATE) or alias.name in ("pmap", "*") or full in EXECUTING
                wrong = wrong or full.split(".")[0] in READERS
                found += [f"{node.lineno}: {full}"] if wrong else []

    def full_name(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        name = full_name(node)
        if name.endswith(".pmap") or name == "pmap" or name in EXECUTING or name.endswith(PRIVATE):
            found.append(f"{node.lineno}: {name}")  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not safe:
                    found.append(f"{node.lineno}: allow_pickle")
            if full_name(node.func) == "numpy.load" and (
                len(node.args) > 2 or any(keyword.arg is None for keyword in node.keywords)
            ):
                found.append(f"{node.lineno}: allow_pickle")  # by its place, or in what ** holds
            if full_name(node.func) == "getattr" and full_name(node.args[0]) in ("pickle", "torch"):
                found.append(f"{node.lineno}: getattr of {full_name(node.args[0])}")
            if full_name(node.func) in ("pickle.Unpickler", "pickle._Unpickler", "numpy.random.seed"):
                found.append(f"{node.lineno}: {full_name(node.func)}")
        if isinstance(node, ast.ClassDef) and not may_subclass_unpickler:
            found += [f"{node.lineno}: Unpickler" for base in node.bases if full_name(base).endswith("Unpickler")]
    return sorted(set(found), key=lambda x: int(x.split(":")[0]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"import jax\n{PRIVATE}.core", [f"2: {PRIVATE}"]),
        (f"from {PRIVATE} import core", [f"1: {PRIVATE}.core"]),
        (f"import {PRIVATE}.core as c", [f"1: {PRIVATE}.core"]),
        ("import jax\nf = jax.pmap(g)", ["2: jax.pmap"]),
        ("from jax import pmap as p\np(f)", ["1: jax.pmap", "2: jax.pmap"]),
        ("import torch\ntorch.load(p)", ["2: torch.load"]),
        ("import pickle as q\nq.loads(b)", ["2: pickle.loads"]),
        ("from pickle import load\nload(f)", ["1: pickle.load", "2: pickle.load"]),
        ("import pickle\npickle.Unpickler(f).load()", ["2: pickle.Unpickler"]),
        ("import pickle\nclass U(pickle.Unpickler): pass", ["2: Unpickler"]),
        ("from pickle import Unpickler as V\nclass U(V): pass", ["2: Unpickler"]),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", ["2: allow_pickle"]),
        ("import numpy as np\nnp.load(p, allow_pickle=x)", ["2: allow_pickle"]),
        ("import numpy as np\nnp.load(p, None, True)", ["2: allow_pickle"]),
        ("from numpy import load\nload(p, **{'allow_pickle': True})", ["2: allow_pickle"]),
        ("import numpy as np\nnp.lib.format.read_array(f, True)", ["2: numpy.lib.format.read_array"]),
        ("import pickle\npickle._Unpickler(f).load()", ["2: pickle._Unpickler"]),
        ("import pickle\ngetattr(pickle, 'load')(f)", ["2: getattr of pickle"]),
        ("import _pickle\n_pickle.load(f)", ["1: _pickle"]),
        ("from pickle import *\nload(f)", ["1: pickle.*"]),
        ("import marshal as m\nm.load(f)", ["1: marshal"]),
        ("from shelve import open\nopen(p)", ["1: shelve.open"]),
        ("import pandas as pd\npd.read_pickle(p)", ["2: pandas.read_pickle"]),
        ("eval(text)", ["1: eval"]),
        ("import torch.serialization as s\ns.load(p)", ["2: torch.serialization.load"]),
        ("import numpy as np\nnp.random.seed(0)", ["2: numpy.random.seed"]),
        ("import numpy as np\nnp.load(p, allow_pickle=False); np.load(p)\nimport json; json.load(f)", []),
        ("import pickletools, pickle\npickle.dumps(3)", []),
    ],
)
def test_the_test_sees_what_it_looks_for(source: str, expected: list[str]) -> None:
    assert offences(source) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_or_dangerous_calls(path: pathlib.Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert offences(path.read_text(), may_subclass_unpickler=name == THE_READER) == []


def test_the_reader_is_there() -> None:
    assert len(FILES) > 30 and any("Unpickler" in x for x in offences((ROOT / THE_READER).read_text()))


@pytest.mark.parametrize("folder", ["rar_jax", "experiments", "launch", "tests"])
def test_no_file_is_over_400_lines(folder: str) -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_experiments_import_ml_collections_only(path: pathlib.Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= {"ml_collections"}


def test_the_core_imports_neither_tensorflow_nor_torch() -> None:
    """Even an attempt that is caught counts: a finder before all others notes it."""
    modules = [
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in (ROOT / "rar_jax").rglob("*.py")
    ]
    modules = sorted(m.removesuffix(".__init__") for m in modules if not m.endswith("__main__"))
    code = f"""
import importlib, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if name in ("tensorflow", "torch") and frame.f_globals["__name__"].startswith("rar_jax"):
            print(frame.f_globals["__name__"], "asks for", name)
sys.meta_path.insert(0, Watch())
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(m for m in sys.modules if m in ("tensorflow", "torch")), len({modules!r}))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[] {len(modules)}\n" and len(modules) > 30


CONTRACT = {  # functions that every model, or every file of released weights, defines under the same name
    *(
        "Config",
        "init",
        "axes",
        "decay_mask",
        "loss",
        "token_spec",
        "store_spec",
        "image_spec",
        "encode",
        "decode",
        "sample",
    ),
    *("load", "save", "open_params"),
}
FUNCTIONS = [
    (path.relative_to(ROOT).as_posix(), node)
    for path in sorted((ROOT / "rar_jax").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
]


def test_no_function_is_over_60_lines() -> None:
    """The main function of a program may have 100."""
    lengths = {f"{name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1 for name, node in FUNCTIONS}
    limits = {name: 100 if name.startswith("rar_jax/programs/") else 60 for name in lengths}
    assert {name: length for name, length in lengths.items() if length > limits[name]} == {}


def test_one_public_name_has_one_meaning() -> None:
    homes: dict[str, set[str]] = {}
    for path in sorted((ROOT / "rar_jax").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in homes.items() if len(where) > 1 and name not in CONTRACT} == {}


def test_every_guarantee_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/\S+?)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) >= 20
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()] == []
