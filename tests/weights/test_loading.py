"""Which module reads a file."""

import pathlib
import types

import pytest

from rar_jax.errors import WeightsError
from rar_jax.weights import loading


def test_modules_are_tried_in_alphabetical_order(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever PYTHONHASHSEED is; and the error is that of the first."""
    (tmp_path / "w.safetensors").touch()
    names = [f"model_{letter}" for letter in "hcbeadgf"]
    tried: list[str] = []

    def refuse(path: pathlib.Path, name: str) -> None:
        tried.append(name)
        raise WeightsError(f"not of {name}")

    def find(kind: str, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(open_params=lambda path: refuse(path, name))

    monkeypatch.setattr(loading, "module_names", lambda kind: names)
    monkeypatch.setattr(loading, "find_module", find)
    with pytest.raises(WeightsError, match="not of model_a"):
        loading.open_weights(tmp_path / "w.safetensors", "generators")
    assert tried == sorted(names)
