"""Published files: which there are, where they are, and whose a file is. Each system's are in its own module."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from rar_jax.errors import ConfigError, WeightsError
from rar_jax.models import Model, find_module, module_names
from rar_jax.runs.manifest import file_sha256

KINDS = ("generators", "tokenizers", "networks")


@dataclasses.dataclass(frozen=True)
class Released:
    """A published file and the score that was published for it.

    Attributes:
      repository: on the Hugging Face hub, or the URL of a folder. licence: of the code; of the weights.
      config: of the model, as it is read from the file. bytes: size of the file, if known.
      tokenizer: name of the published tokenizer that the score was made with.
      sampling: settings that the score was drawn with.
      scores: published numbers by name. The remaining fields are their protocol:
      rounding: to uint8, "truncate" or "round". resize: pixels that images are resized to before, None: not resized.
      labels: "balanced": the same number of images of each class, interleaved. class_names: as in `config.data`.
    """

    repository: str
    file: str
    licence: str
    config: Any = None
    bytes: int | None = None
    tokenizer: str | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rounding: str | None = None
    resize: int | None = None
    labels: str | None = None
    class_names: str = "imagenet"

    @property
    def url(self) -> str:
        on_hub = f"https://huggingface.co/{self.repository}/resolve/main"
        return f"{self.repository if '://' in self.repository else on_hub}/{self.file}"


def list_systems() -> dict[str, tuple[str, ModuleType]]:
    """Return kind and weights/ module of each system that has released files, by name in a fixed order."""
    names = set(module_names("weights"))
    pairs = [(kind, name) for kind in KINDS for name in module_names(kind) if name in names]
    return {name: (kind, find_module("weights", name)) for kind, name in pairs}


def list_released() -> dict[str, tuple[str, Released]]:
    """Return system and description of each published file, by name."""
    systems = list_systems().items()
    return {name: (system, file) for system, (_, module) in systems for name, file in module.FILES.items()}


def recognize_system(tensors: Collection[str]) -> tuple[str, str] | None:
    """Return kind and name of the first system whose keys are all among these names of tensors."""
    systems = list_systems().items()
    return next(((kind, name) for name, (kind, module) in systems if all(k in tensors for k in module.KEYS)), None)


def check_system(tensors: Collection[str], kind: str, name: str) -> None:
    """Raise WeightsError if these are the tensors of another system."""
    if (found := recognize_system(tensors)) not in (None, (kind, name)):
        raise WeightsError(f"it is a {found[0][:-1]} ({found[1]}), not a {kind[:-1]} ({name})")


def find_released(model: Model) -> Released | None:
    """Return the published file of the same Config, if there is one."""
    files = (file for system, file in list_released().values() if system == model.name and file.config == model.config)
    return next(files, None)


def find_named(name: str | pathlib.Path) -> tuple[str, Released] | None:
    """Return system and description of a published file, by its name ("rar_b", "rar_b.bin")."""
    return next((found for key, found in list_released().items() if str(name) in (key, found[1].file)), None)


def find_file(path_or_name: str | pathlib.Path, *, download: bool = False) -> pathlib.Path:
    """Return an existing path, or the cached file of a published name.

    With `download`, fetch a file that is not cached, and check its sha256 against the hub's.
    Raises: ConfigError that says how to get the file; WeightsError for a wrong sha256.
    """
    path = pathlib.Path(path_or_name)
    try:
        if str(path_or_name) and path.exists():
            return path
    except OSError as error:  # a name that no file can have
        raise ConfigError(f"{str(path)[:100]}...: {error.strerror}") from None
    # Only a bare name is a published file's: a mistyped path must not become another model.
    if (named := find_named(path_or_name)) is None:
        missing = f"{path_or_name or '(nothing)'}: no such directory or weights file, and no released one"
        raise ConfigError(f"{missing}: those are {', '.join(list_released())}")
    return _find_in_hub(named[1], download)


def _find_in_hub(released: Released, download: bool) -> pathlib.Path:
    file, url = released.file, released.url
    if "://" in released.repository:
        raise ConfigError(f"{file} is not here: get {url} and give its path")
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ImportError:
        install = "pip install -e '.[hub]' in the checkout of rar_jax"
        raise ConfigError(f"{file} is not here. To download it: {install}; or get {url} and give its path") from None
    hub.utils.logging.set_verbosity_error()  # our errors say what its warnings would
    try:
        path = pathlib.Path(hub.hf_hub_download(released.repository, file, local_files_only=not download))
    # No network, a proxy, a full disk, no such file: the remedy is the same.
    except Exception as error:
        if not download and isinstance(error, hub.errors.LocalEntryNotFoundError):
            raise ConfigError(
                f"{file} is not here and was not downloaded before: `rar-jax sample` and `convert` fetch it with "
                f"--download, Python with load(..., download=True); or get {url} and give its path"
            ) from None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{file} could not be downloaded ({reason}): give the command again, or get {url} on a machine with a "
            "network, copy it here and give its path"
        ) from error
    if download:
        _check_sha256(path)
    return path


def _check_sha256(path: pathlib.Path) -> None:
    """Remove a cached file whose sha256 is not the hub's, so that it is downloaded again."""
    content = path.resolve()  # the cache links to the content, and calls it by the hub's sha256
    if not re.fullmatch("[0-9a-f]{64}", content.name):
        raise WeightsError(f"{path}: the hub gave no sha256 to check the download by (but '{content.name}')")
    if (found := file_sha256(path)) != content.name:
        content.unlink()
        path.unlink(missing_ok=True)
        raise WeightsError(
            f"{path} had sha256 {found}, the hub says {content.name}: it has been removed, give the command again"
        )
