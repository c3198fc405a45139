"""Errors as a person meets them: the exit code, one line on stderr without a traceback, and the name of what is wrong."""

import errno
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from rar_jax import cli, errors
from rar_jax.errors import ConfigError, RarJaxError, describe_import_error, describe_os_error
from rar_jax.runs.lock import Lock

ROOT = pathlib.Path(__file__).parents[1]
RUN = ("run", "--config", str(ROOT / "tests" / "experiments" / "tiny.py"), "--quiet", "--workdir")


def line(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """The one line on stderr of a command that ends with this code."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"rar-jax {argv[0]}: "), err
    return err


def in_a_process(before: str, *argv: object, **environ: str) -> tuple[int, str]:
    script = f"import sys\n{before}\nfrom rar_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    command = [sys.executable, "-c", script, *map(str, argv)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_a_wrong_command_ends_with_2_and_a_failure_with_1() -> None:
    classes = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, RarJaxError)]
    assert len(classes) > 10 and {x for x in classes if x.exit_code != 1} == {ConfigError}
    assert ConfigError.exit_code == 2 and issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EXDEV])
def test_an_error_of_the_system_names_its_path(number: int) -> None:
    own = describe_os_error(OSError(number, os.strerror(number), "runs/x"), "elsewhere")
    assert own.startswith("runs/x: ") and "\n" not in own
    assert describe_os_error(OSError(number, os.strerror(number)), "elsewhere").startswith("elsewhere: ")
    assert describe_os_error(OSError(number, os.strerror(number)))


def test_a_missing_package_is_named() -> None:
    assert "'grain'" in describe_import_error(ModuleNotFoundError("no", name="grain.experimental"))
    assert "symbol" in describe_import_error(ImportError("undefined symbol"))


def test_a_second_writer(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Lock(tmp_path, "run")
    try:
        assert str(os.getpid()) in line(capsys, 1, *RUN, tmp_path)
    finally:
        held.release()


def test_a_full_disk_while_sampling(
    released_pair: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    weights = ("--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer)
    said = line(capsys, 1, "sample", *weights, "--classes", "3", "--out", tmp_path / "x", "--quiet")
    assert str(tmp_path / "x") in said and "disk is full" in said


def test_a_folder_that_may_not_be_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(path: pathlib.Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, "mkdir", denied)  # root may do everything
    assert str(tmp_path / "w") in line(capsys, 2, *RUN, tmp_path / "w")


def test_no_accelerator_where_one_was_requested(tmp_path: pathlib.Path) -> None:
    code, err = in_a_process("", *RUN, tmp_path / "w", JAX_PLATFORMS="cuda")
    assert code == 2 and "JAX_PLATFORMS" in err and not (tmp_path / "w").exists()


def test_a_package_that_is_not_installed(tmp_path: pathlib.Path) -> None:
    code, err = in_a_process("sys.modules['tensorboardX'] = None", *RUN, tmp_path / "w")
    assert code == 1 and "'tensorboardX'" in err and err.count("\n") == 1
