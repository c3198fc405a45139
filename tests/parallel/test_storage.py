"""Processes that do not share a directory find out before they work in it."""

import pathlib

import jax
import pytest

from rar_jax.errors import StorageError
from rar_jax.parallel import storage


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is process 1 of two, and what process 0 does happens elsewhere."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(storage, "gather_strings", lambda text: ["", text])


def test_alone_nothing_is_written(tmp_path: pathlib.Path) -> None:
    storage.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("two")
def test_shared(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "from_main", lambda function: function())
    storage.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("two")
def test_not_shared(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "from_main", lambda function: "token")
    with pytest.raises(StorageError, match=rf"{tmp_path} is not shared: process 1 on .* does not see a file"):
        storage.check_shared(tmp_path)
