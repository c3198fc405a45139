"""Released files by name: presets, where they are looked up, and a download from a hub that is a server in this process."""

import pathlib
import sys
from collections.abc import Iterator

import huggingface_hub.constants
import pytest
from hub import CONTENT, SHA256, Hub, served

from rar_jax.errors import ConfigError, WeightsError
from rar_jax.generators.rar import TINY, Config, Sampling
from rar_jax.weights import registry as released


@pytest.mark.parametrize(
    ("name", "sizes", "sampling"),
    [
        ("rar_b", (768, 24, 3072), (16.0, 2.75, 1.0)),
        ("rar_l", (1024, 24, 4096), (15.5, 2.5, 1.02)),
        ("rar_xl", (1280, 32, 5120), (6.9, 1.5, 1.02)),
        ("rar_xxl", (1408, 40, 6144), (8.0, 1.2, 1.02)),
    ],
)
def test_presets(name: str, sizes: tuple[int, int, int], sampling: tuple[float, float, float]) -> None:
    """rar.md, sections 2 and 4."""
    width, depth, mlp_width = sizes
    found = released.preset(Config(width=width, depth=depth, mlp_width=mlp_width))
    assert found is released.GENERATORS[name] and Sampling(**found.sampling) == Sampling(*sampling)
    assert found.file == f"{name}.bin"
    assert released.preset(Config(width=width, depth=depth, mlp_width=mlp_width, num_classes=10)) is None
    assert released.preset(Config(width=width, depth=depth + 1, mlp_width=mlp_width)) is None


def test_another_model_has_no_preset() -> None:
    assert released.preset(TINY) is None and released.preset("a config of another generator") is None


def test_a_path_is_a_path(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rar_b.bin").touch()
    assert released.locate(tmp_path / "rar_b.bin") == tmp_path / "rar_b.bin"
    with pytest.raises(ConfigError, match=r"x\.bin: no such directory or weights file, .* those are rar_b, rar_l"):
        released.locate(tmp_path / "x.bin")


# ---------------------------------------------------------------- a hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[type[Hub]]:
    with served(monkeypatch, tmp_path / "cache") as running:
        yield running


def test_download_checks_and_is_found_again(hub: type[Hub]) -> None:
    with pytest.raises(ConfigError, match=r"rar_b\.bin is not here .*--download.*resolve/main/rar_b\.bin"):
        released.locate("rar_b")
    path = released.locate("rar_b", download=True)
    assert path.read_bytes() == CONTENT
    assert released.locate("rar_b") == released.locate("rar_b.bin") == path  # now without asking
    with pytest.raises(ConfigError, match=r"somewhere/rar_b\.bin: no such directory or weights file"):
        released.locate("somewhere/rar_b.bin")  # a mistyped path is not another model


def test_what_is_in_the_cache_needs_no_network(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    path = released.locate("rar_b", download=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert released.locate("rar_b", download=True) == path
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(CONTENT[:-1] + b"X")
    with pytest.raises(WeightsError, match="it has been removed, give the command again"):
        released.locate("rar_b", download=True)


def test_a_wrong_sha256(hub: type[Hub]) -> None:
    """And what the message says to do gives the right file."""
    hub.content = CONTENT[:-1] + b"X"
    with pytest.raises(
        WeightsError, match=rf"had sha256 [0-9a-f]{{64}}, the hub says {SHA256}: .* give the command again"
    ):
        released.locate("rar_b", download=True)
    hub.content = CONTENT
    assert released.locate("rar_b", download=True).read_bytes() == CONTENT


def test_a_hub_that_gives_no_sha256(hub: type[Hub]) -> None:
    hub.etag = "abc"
    with pytest.raises(WeightsError, match="the hub gave no sha256 to check the download by"):
        released.locate("rar_b", download=True)


def test_a_file_that_the_hub_does_not_have(hub: type[Hub]) -> None:
    with pytest.raises(WeightsError, match=r"rar_l\.bin could not be downloaded .*copy it here and give its path"):
        released.locate("rar_l", download=True)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match=r"rar_b\.bin could not be downloaded .*on a machine with a network"
    ) as caught:
        released.locate("rar_b", download=True)
    assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ConfigError,
        match=r"pip install -e '\.\[hub\]' in the checkout of rar_jax; or get https://huggingface\.co/yucornetto/RAR",
    ):
        released.locate("rar_b", download=True)
