"""The look at the work directory before the work, on storage on which one thing does not hold."""

import pathlib
import shutil

import pytest

from rar_jax.parallel import storage


def test_all_is_well(tmp_path: pathlib.Path) -> None:
    assert storage.trouble(tmp_path) == "" and not list(tmp_path.iterdir())


def test_exclusive_creation_that_is_not(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_create", lambda path, text: path.write_text(text))
    assert storage.trouble(tmp_path) == "could make a file that was there already: locks do not hold on this storage"
    assert not list(tmp_path.iterdir())


def test_a_rename_that_copies(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathlib.Path, "replace", lambda path, target: shutil.copy(path, target))
    assert storage.trouble(tmp_path) == "renamed a file there and found it under its old name"
    assert not list(tmp_path.iterdir())


def test_what_was_written_is_read_as_it_was_before(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: "old")
    assert storage.trouble(tmp_path).startswith("reads 'old' where process 0 wrote '")


def test_no_folder(tmp_path: pathlib.Path) -> None:
    assert storage.trouble(tmp_path / "none").startswith("cannot create a file there (")
