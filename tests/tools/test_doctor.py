"""`rar-jax doctor`: versions, devices, folders and disk of this machine and of broken ones."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from rar_jax.cli import main
from rar_jax.tools import doctor

REAL_REQUIRES, REAL_VERSION = importlib.metadata.requires, importlib.metadata.version
REQUIRES = {
    "jax": ["jaxlib<=0.10.2,>=0.10.1", "libtpu==0.0.42.*; extra == 'tpu'", "jax-cuda12-plugin[with-cuda]==0.10.2; extra == 'cuda12'"],
    "jax-cuda12-plugin": ["jax-cuda12-pjrt==0.10.2"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The cache that doctor checks."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_HOME", str(path))
    return path


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Make importlib.metadata report these versions besides the real ones; None is not installed."""

    def version(name: str) -> str:
        if name not in versions:
            return REAL_VERSION(name)
        if (found := versions[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: REQUIRES.get(name) or (name == "rar_jax" and REAL_REQUIRES(name)) or [],
    )


def run(*argv: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rar_jax", "doctor", *argv]
    return subprocess.run(command, env=os.environ | env, text=True, capture_output=True, timeout=300)


def test_good_machine(
    tmp_path: pathlib.Path, cache: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "run"
    assert main(["doctor", "--workdir", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}" in text
    assert text.endswith("no problem(s)\n") and f"{folder}, {cache}\n" in text
    assert f"{len(jax.devices())} x {jax.devices()[0].device_kind} (cpu)" in text
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json", "--quiet"]) == 0
    checkup = json.loads(capsys.readouterr().out)
    assert checkup["problems"] == [] and checkup["folders"][0] == str(tmp_path)
    assert checkup["disk_free_gib"] > 0 and checkup["memory_free_gib"] > 0
    assert not list(tmp_path.iterdir()) and not list(cache.iterdir()), "checking leaves nothing"
    assert main(["doctor", "--workdir", "gs://bucket/run"]) == 2
    assert "gs://bucket/run is a bucket" in capsys.readouterr().err


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("versions", "what", "remedy"),
    [
        ({"tensorboardx": None}, "rar_jax needs tensorboardx", "tensorboardx>=2.6.2"),
        ({"optax": "0.2.7"}, "rar_jax needs optax>=0.2.8, and 0.2.7 is installed", "optax>=0.2.8"),
        ({"jaxlib": "0.9.2"}, "jax needs jaxlib<=0.10.2,>=0.10.1, and 0.9.2 is installed", "jaxlib<=0.10.2,>=0.10.1"),
        ({"libtpu": "0.0.43"}, "jax needs libtpu==0.0.42.*, and 0.0.43 is installed", "libtpu==0.0.42.*"),
        ({"jax-cuda12-plugin": "0.9.0", "jax-cuda12-pjrt": "0.10.2"}, "jax needs jax-cuda12-plugin==0.10.2", "jax-cuda12-plugin==0.10.2"),
        ({"jax-cuda12-plugin": "0.10.2"}, "jax-cuda12-plugin needs jax-cuda12-pjrt==0.10.2, and none", "jax-cuda12-pjrt==0.10.2"),
    ],
)  # fmt: skip
def test_unsatisfied_requirements(
    versions: dict[str, str | None], what: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, versions)
    ((found, todo),) = doctor.check_requirements()
    assert found.startswith(what) and todo == f'pip install "{remedy}"'


def test_plugins_that_fit_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2", "libtpu": "0.0.42.1"})
    assert list(doctor.check_requirements()) == []


def test_missing_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"rar_jax": None})
    assert list(doctor.check_requirements()) == [("rar_jax is not installed", "pip install -e . in its checkout")]
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert list(doctor.check_requirements()) == [("packaging is not installed", "pip install packaging")]


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("files", "platforms", "remedy"),
    [
        ("nvidia0", "", "pip install -e '.[cuda12]'"),
        ("accel0", "", "pip install -e '.[tpu]'"),
        ("nvidia0", "cpu", "unset JAX_PLATFORMS, which is 'cpu'"),
        ("nvidia0", "cuda,cpu", "pip install -e '.[cuda12]'"),
    ],
)
def test_accelerator_that_jax_does_not_see(
    files: str, platforms: str, remedy: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    accelerators = [(file.replace("/dev", str(tmp_path)), *rest) for file, *rest in doctor.ACCELERATORS]
    monkeypatch.setattr(doctor, "ACCELERATORS", accelerators)
    assert list(doctor.check_devices([])) == []
    (tmp_path / files).touch()
    ((what, todo),) = doctor.check_devices([])
    assert "exists, and JAX sees no" in what and todo == remedy


def test_device_with_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    real, names = jax.device_put, list[str]()
    monkeypatch.setattr(jax, "device_put", lambda x, device: real(1.01 * x, device))
    problems = list(doctor.check_devices(names))
    assert len(problems) == len(names) == len(jax.local_devices())
    assert all("cannot multiply matrices (wrong numbers)" in what for what, _ in problems)


def test_device_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(jax, "device_put", fail)
    what, remedy = next(iter(doctor.check_devices([])))
    assert what.endswith("(RuntimeError: RESOURCE_EXHAUSTED: out of memory)") and "another" not in what
    assert remedy == "check that no other process holds the device"


def test_no_devices() -> None:
    done = run(env={"JAX_PLATFORMS": "nonsense"})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "PROBLEM   JAX finds no devices (RuntimeError: " in done.stdout
    assert "To do: unset JAX_PLATFORMS (it is 'nonsense')" in done.stdout


def test_jax_that_cannot_be_imported(tmp_path: pathlib.Path) -> None:
    """The rest is checked all the same."""
    (tmp_path / "jax.py").write_text("raise ImportError('jaxlib is too old')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("--workdir", str(tmp_path / "run"), env={"PYTHONPATH": path, "JAX_PLATFORMS": ""})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "JAX finds no devices (ImportError: jaxlib is too old)" in done.stdout
    assert "unset" not in done.stdout and f"folders   {tmp_path / 'run'}" in done.stdout


# ---------------------------------------------------------------- folders


def test_folder_in_which_locks_do_not_hold(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pathlib.Path.touch
    monkeypatch.setattr(pathlib.Path, "touch", lambda path, exist_ok=True: real(path))
    ((what, remedy),) = doctor.check_folder(tmp_path, "use another one")
    assert what == f"{tmp_path}: a file can be created twice, so locks do not hold" and remedy == "use another one"
    assert not list(tmp_path.iterdir())


def test_folder_in_which_names_stay(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathlib.Path, "replace", lambda path, other: other.write_bytes(b""))
    ((what, _),) = doctor.check_folder(tmp_path, "")
    assert what == f"{tmp_path}: a renamed file keeps its old name" and not list(tmp_path.iterdir())


def test_folder_that_can_only_be_read(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "rar_jax", "doctor", "--workdir", str(tmp_path)]
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"', "sh"]
    done = subprocess.run([*mount, *command], text=True, capture_output=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"PROBLEM   {tmp_path} cannot be written (Read-only file system)" in done.stdout


def test_file_as_folder_and_full_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "MIN_FREE", 1e9)
    assert main(["doctor", "--workdir", str(tmp_path / "file" / "run")]) == 1
    text = capsys.readouterr().out
    assert f"PROBLEM   {tmp_path}/file/run cannot be written (Not a directory)" in text
    assert "of disk free" in text and "To do: free space" in text and text.endswith("2 problem(s)\n")
