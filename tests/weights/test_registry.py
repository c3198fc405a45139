"""Released files by name, where they are looked up, and a download from a hub that is a server in this process."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import huggingface_hub.constants
import pytest
from hub import CONTENT, SHA256, Hub, served

from rar_jax.errors import ConfigError, WeightsError
from rar_jax.generators import rar
from rar_jax.generators.rar import TINY
from rar_jax.models import Model, find_module
from rar_jax.weights import registry


def test_each_file_has_its_own_name_and_config() -> None:
    files = registry.list_released()
    for name, (system, file) in files.items():
        kind, _ = registry.list_systems()[system]
        assert registry.find_named(name) == registry.find_named(file.file) == (system, file)
        assert file.tokenizer is None or file.tokenizer in files
        if kind != "networks":
            assert registry.find_released(Model(find_module(kind, system), file.config)) is file
    assert registry.find_released(Model(rar, dataclasses.replace(rar.Config(), depth=23))) is None
    assert registry.find_released(Model(rar, TINY)) is registry.find_named("rar_s") is None


def test_the_system_of_a_file_never_depends_on_the_hash_seed() -> None:
    """Of tensors that several systems claim, in processes of four seeds."""
    code = """
from rar_jax.weights import registry
keys = {key for _, module in registry.list_systems().values() for key in module.KEYS}
print(list(registry.list_systems()), list(registry.list_released()), registry.recognize_system(keys))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "0123"
    }
    assert len(said) == 1 and said.pop().strip().endswith(b"('generators', 'rar')")


def test_a_path_is_a_path(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rar_b.bin").touch()
    assert registry.find_file(tmp_path / "rar_b.bin") == tmp_path / "rar_b.bin"
    with pytest.raises(ConfigError, match=r"x\.bin: no such directory or weights file, .* those are rar_b, rar_l"):
        registry.find_file(tmp_path / "x.bin")
    with pytest.raises(ConfigError, match=r"is not here: get https://github\.com/mseitzer/\S+\.pth and give its path"):
        registry.find_file("inception", download=True)


# ---------------------------------------------------------------- a hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[type[Hub]]:
    with served(monkeypatch, tmp_path / "cache") as running:
        yield running


def test_download_checks_and_is_found_again(hub: type[Hub]) -> None:
    with pytest.raises(ConfigError, match=r"rar_b\.bin is not here .*--download.*resolve/main/rar_b\.bin"):
        registry.find_file("rar_b")
    path = registry.find_file("rar_b", download=True)
    assert path.read_bytes() == CONTENT
    assert registry.find_file("rar_b") == registry.find_file("rar_b.bin") == path  # now without asking
    with pytest.raises(ConfigError, match=r"somewhere/rar_b\.bin: no such directory or weights file"):
        registry.find_file("somewhere/rar_b.bin")  # a mistyped path is not another model


def test_what_is_in_the_cache_needs_no_network(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    path = registry.find_file("rar_b", download=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert registry.find_file("rar_b", download=True) == path
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(CONTENT[:-1] + b"X")
    with pytest.raises(WeightsError, match="it has been removed, give the command again"):
        registry.find_file("rar_b", download=True)


def test_a_wrong_sha256(hub: type[Hub]) -> None:
    """And what the message says to do gives the right file."""
    hub.content = CONTENT[:-1] + b"X"
    with pytest.raises(
        WeightsError, match=rf"had sha256 [0-9a-f]{{64}}, the hub says {SHA256}: .* give the command again"
    ):
        registry.find_file("rar_b", download=True)
    hub.content = CONTENT
    assert registry.find_file("rar_b", download=True).read_bytes() == CONTENT


def test_a_hub_that_gives_no_sha256(hub: type[Hub]) -> None:
    hub.etag = "abc"
    with pytest.raises(WeightsError, match="the hub gave no sha256 to check the download by"):
        registry.find_file("rar_b", download=True)


def test_a_file_that_the_hub_does_not_have(hub: type[Hub]) -> None:
    with pytest.raises(WeightsError, match=r"rar_l\.bin could not be downloaded .*copy it here and give its path"):
        registry.find_file("rar_l", download=True)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match=r"rar_b\.bin could not be downloaded .*on a machine with a network"
    ) as caught:
        registry.find_file("rar_b", download=True)
    assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ConfigError,
        match=r"pip install -e '\.\[hub\]' in the checkout of rar_jax; or get https://huggingface\.co/yucornetto/RAR",
    ):
        registry.find_file("rar_b", download=True)
