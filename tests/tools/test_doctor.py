"""`rar-jax doctor`: what it says of this machine, of versions that are known to be bad, and of devices that jax does not see."""

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
from rar_jax.parallel import storage
from rar_jax.tools import doctor
from rar_jax.tools.doctor import bad_versions, missing_accelerator

GOOD = {
    "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "tensorstore": "0.1.86", "grain": "0.2.18",
    "numpy": "2.4.6", "libtpu": "0.0.42.1", "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2",
}  # fmt: skip
ASKED = {
    "jax": [("jaxlib", "<=0.10.2,>=0.10.1"), ("jaxlib", "==0.10.1"), ("libtpu", "==0.0.42.*"), ("jax-cuda12-plugin", "<=0.10.2,>=0.10.2"), ("numpy", ">=2.0")],
    "jax-cuda12-plugin": [("jax-cuda12-pjrt", "==0.10.2")],
}  # fmt: skip
NOTHING = {"gpu": False, "tpu": False}


def bad(**versions: str | None) -> list[doctor.Problem]:
    changed = GOOD | {name.replace("_", "-"): version for name, version in versions.items()}
    return bad_versions({k: v for k, v in changed.items() if v}, lambda name: ASKED.get(name, []))


def test_a_package_that_is_not_there() -> None:
    found = doctor.missing(lambda name: None if name.lower() == "tensorboardx" else "1.0")
    assert [problem.what.lower() for problem in found] == ["tensorboardx is not installed"]
    assert found[0].remedy.startswith('pip install "tensorboard')
    assert doctor.missing(importlib.metadata.version) == []
    (problem,) = doctor.missing(lambda name: None)
    assert problem.what == "rar_jax is not installed" and problem.remedy.startswith("pip install -e .")


def test_versions_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packaging.specifiers", "packaging.requirements"):
        monkeypatch.setitem(sys.modules, name, None)
    told = [problem["what"] for problem in doctor.doctor()["problems"]]
    assert told == ["versions cannot be compared"]


def test_a_work_directory_below_a_file(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["doctor", "--workdir", str(tmp_path / "file" / "run")]) == 1
    text = capsys.readouterr().out
    assert f"BAD        {tmp_path / 'file' / 'run'} is not a folder: {tmp_path / 'file'} is a file" in text
    assert "files are made" not in text and text.count("BAD") == 1


def test_this_machine_is_well(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--workdir", str(tmp_path / "new" / "run")]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}" in text and text.endswith(
        "all is well\n"
    )
    assert f"devices    4 x {jax.devices()[0].device_kind} (cpu)" in text
    assert not list(tmp_path.iterdir()), "looking leaves nothing"
    assert f"workdir    {tmp_path / 'new' / 'run'}: files are made, renamed and locked\n" in text
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    assert f"folder     {tmp_path}: files are made, renamed and locked\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main(["doctor", "--workdir", "gs://bucket/run"]) == 2
    assert "gs://bucket/run is a bucket" in capsys.readouterr().err
    assert main(["doctor", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and 0 < report["disk"]["free"] <= report["disk"]["total"]
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < report["memory_free"] <= total


# ---------------------------------------------------------------- versions


def test_good_versions_are_good() -> None:
    assert bad() == []
    assert bad(jax="0.11.0", jaxlib="0.10.2", libtpu=None, jax_cuda12_plugin=None, jax_cuda12_pjrt=None) == []


@pytest.mark.parametrize(
    ("versions", "what", "remedy"),
    [
        ({"jax": "0.9.1"}, "jax 0.9.1 is older than 0.10.2", 'pip install -U "jax>=0.10.2"'),
        ({"grain": "0.2.17"}, "grain 0.2.17 is older than 0.2.18", 'pip install -U "grain>=0.2.18"'),
        ({"tensorstore": "0.1.80"}, "tensorstore 0.1.80 is older than 0.1.86", 'pip install -U "tensorstore>=0.1.86"'),
        ({"flax": "0.12.7"}, "flax 0.12.7 is older than 0.12.8", 'pip install -U "flax>=0.12.8"'),
        ({"optax": None}, "optax is not installed", 'pip install "optax>=0.2.8"'),
        ({"numpy": "1.26.4"}, "numpy 1.26.4 is older than 2.0", 'pip install -U "numpy>=2.0"'),
        ({"libtpu": "0.0.43"}, "libtpu 0.0.43 does not belong to jax 0.10.2, which asks for ==0.0.42.*", 'pip install "libtpu==0.0.42.*"'),
        ({"jaxlib": "0.9.2"}, "jaxlib 0.9.2 does not belong to jax 0.10.2, which asks for <=0.10.2,>=0.10.1", 'pip install "jaxlib<=0.10.2,>=0.10.1"'),
        ({"jax_cuda12_plugin": "0.9.0", "jax_cuda12_pjrt": None}, "jax-cuda12-plugin 0.9.0 does not belong to jax 0.10.2, which asks for <=0.10.2,>=0.10.2", 'pip install "jax-cuda12-plugin<=0.10.2,>=0.10.2"'),
        ({"jax_cuda12_pjrt": "0.9.0"}, "jax-cuda12-pjrt 0.9.0 does not belong to jax-cuda12-plugin 0.10.2, which asks for ==0.10.2", 'pip install "jax-cuda12-pjrt==0.10.2"'),
    ],
)  # fmt: skip
def test_bad_versions(versions: dict[str, Any], what: str, remedy: str) -> None:
    (problem,) = bad(**versions)
    assert (problem.what, problem.remedy) == (what, remedy) and len(problem.reason) > 20


def test_an_old_python() -> None:
    (problem,) = bad_versions(GOOD, lambda name: [], python=(3, 10))
    assert problem.what == "python 3.10" and problem.remedy == "install Python 3.11"


def test_the_tables_are_those_of_the_package() -> None:
    """What pip asks for and what doctor calls too old are the same versions, and jax does pin what the table says."""
    asked = dict(doctor._requirements("rar_jax"))
    assert {rule.package: f">={rule.below}" for rule in doctor.TOO_OLD} == {
        rule.package: asked[rule.package] for rule in doctor.TOO_OLD
    }
    pinned = {name for name, specifier in doctor._requirements("jax") if specifier}
    assert {rule.package for rule in doctor.PINNED if rule.by == "jax"} <= pinned | {"jax-cuda13-plugin"}


# ---------------------------------------------------------------- devices


def test_an_accelerator_that_jax_does_not_see() -> None:
    gpu = NOTHING | {"gpu": True}
    (problem,) = missing_accelerator({"cpu"}, gpu, {}, {})
    assert (
        problem.what == "a GPU is here, and jax sees only cpu"
        and problem.remedy == "pip install -e '.[cuda12]' in the checkout of rar_jax"
    )
    (problem,) = missing_accelerator({"cpu"}, gpu, GOOD, {"JAX_PLATFORMS": "cpu"})
    assert problem.remedy == "unset JAX_PLATFORMS, which is 'cpu'"
    (problem,) = missing_accelerator({"cpu"}, NOTHING | {"tpu": True}, GOOD, {})
    assert problem.what.startswith("a TPU is here") and "another process holds" in problem.remedy
    (problem,) = missing_accelerator(set(), NOTHING | {"tpu": True}, {}, {})
    assert (
        problem.what.endswith("sees only nothing")
        and problem.remedy == "pip install -e '.[tpu]' in the checkout of rar_jax"
    )
    assert missing_accelerator({"gpu"}, gpu, GOOD, {}) == missing_accelerator({"cuda"}, gpu, GOOD, {}) == []
    assert missing_accelerator({"cpu"}, NOTHING, GOOD, {}) == []


def test_device_files_are_looked_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(
        doctor, "DEVICE_FILES", {"gpu": (f"{tmp_path}/nvidia[0-9]*",), "tpu": (f"{tmp_path}/accel[0-9]*",)}
    )
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "BAD        a GPU is here, and jax sees only cpu" in text and text.endswith("1 problem(s)\n")


def test_no_devices_at_all() -> None:
    env = os.environ | {"JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", "rar_jax", "doctor"], env=env, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 1 and "BAD        jax finds no devices: RuntimeError" in done.stdout
    assert "unset JAX_PLATFORMS (it is 'nonsense')" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_that_is_asked_for_and_not_there(
    platform: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def devices() -> Any:
        raise AssertionError  # as JAX does where no plugin is

    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setattr(doctor, "_devices", devices)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "AssertionError: no plugin of that name is installed" in text
    assert f"unset JAX_PLATFORMS (it is '{platform}'), or pip install -e '.[cuda12]'" in text


def test_a_jax_that_cannot_be_imported(tmp_path: pathlib.Path) -> None:
    """All the rest is looked at as ever."""
    (tmp_path / "jax.py").write_text("raise ImportError('jaxlib is too old')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "rar_jax", "doctor", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "BAD        jax finds no devices: ImportError: jaxlib is too old" in done.stdout
    assert "unset JAX_PLATFORMS" not in done.stdout
    assert f"workdir    {tmp_path / 'run'}: files are made, renamed and locked" in done.stdout


# ---------------------------------------------------------------- work directory


def test_a_folder_in_which_locks_do_not_hold(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "_create", lambda path, text: path.write_text(text))
    assert main(["doctor", "--workdir", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert f"BAD        {tmp_path} cannot be worked in: this process could make a file that was there already" in text
    assert "files are made" not in text and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: pathlib.Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(storage, "_create", refuse)  # root, which tests may run as, is refused nothing
    assert main(["doctor", "--workdir", str(tmp_path)]) == 1
    assert "cannot create a file there ([Errno 13] Permission denied" in capsys.readouterr().out


def test_a_folder_that_can_only_be_read(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "rar_jax", "doctor", "--workdir", str(tmp_path)]
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"', "sh"]
    done = subprocess.run([*mount, *command], text=True, capture_output=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot create a file there ([Errno 30] Read-only file system" in done.stdout


def test_a_file_in_its_place_and_a_full_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 60)
    assert main(["doctor", "--workdir", str(tmp_path / "file")]) == 1
    text = capsys.readouterr().out
    assert (
        f"BAD        {tmp_path}/file is not a folder" in text
        and "free on the disk: the next checkpoint may not fit" in text
    )
