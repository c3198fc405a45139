"""The authors' released files: names, repositories, and the sampling settings of the published FID."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from rar_jax.errors import ConfigError, WeightsError
from rar_jax.generators import rar
from rar_jax.runs.manifest import file_sha256


@dataclasses.dataclass(frozen=True)
class Released:
    """A file on the Hugging Face hub; for a generator also its size and sampling settings (arXiv 2411.00776 and its code)."""

    repository: str
    file: str
    width: int = 0
    depth: int = 0
    mlp_width: int = 0
    sampling: dict[str, float] | None = None


GENERATORS = {
    "rar_b": Released("yucornetto/RAR", "rar_b.bin", 768, 24, 3072, dict(scale=16.0, power=2.75, temperature=1.0)),
    "rar_l": Released("yucornetto/RAR", "rar_l.bin", 1024, 24, 4096, dict(scale=15.5, power=2.5, temperature=1.02)),
    "rar_xl": Released("yucornetto/RAR", "rar_xl.bin", 1280, 32, 5120, dict(scale=6.9, power=1.5, temperature=1.02)),
    "rar_xxl": Released("yucornetto/RAR", "rar_xxl.bin", 1408, 40, 6144, dict(scale=8.0, power=1.2, temperature=1.02)),
}
TOKENIZER = "maskgit-vqgan-imagenet-f16-256"
FILES = GENERATORS | {TOKENIZER: Released("fun-research/TiTok", f"{TOKENIZER}.bin")}


def preset(config: Any) -> Released | None:
    """Return the released generator of the same size, tokens and classes, if there is one."""
    if not isinstance(config, rar.Config):
        return None
    if (config.num_tokens, config.codebook_size, config.num_classes) != (256, 1024, 1000):
        return None
    sizes = config.width, config.depth, config.mlp_width
    return next((r for r in GENERATORS.values() if (r.width, r.depth, r.mlp_width) == sizes), None)


def locate(path_or_name: str | pathlib.Path, *, download: bool = False) -> pathlib.Path:
    """Return an existing path, or the cached file of a released name ("rar_b", "rar_b.bin").

    With `download`, fetch a file that is not cached, and check its sha256 against the hub's.
    Raises: ConfigError that says how to get the file; WeightsError for a wrong sha256.
    """
    path = pathlib.Path(path_or_name)
    try:
        if str(path_or_name) and path.exists():
            return path
    except OSError as error:  # a name that no file can have
        raise ConfigError(f"{str(path)[:100]}...: {error.strerror}") from None
    # Only a bare name is a released file's: a mistyped path must not become another model.
    released = FILES.get(str(path_or_name).removesuffix(".bin"))
    if released is None:
        missing = f"{path_or_name or '(nothing)'}: no such directory or weights file, and no released one"
        raise ConfigError(f"{missing}: those are {', '.join(FILES)}")
    return _find_in_hub(released, download)


def _find_in_hub(released: Released, download: bool) -> pathlib.Path:
    file, url = released.file, f"https://huggingface.co/{released.repository}/resolve/main/{released.file}"
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
