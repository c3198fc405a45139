"""The verb `doctor`: check versions, devices, memory, disk and folders, and say what to do about each problem.

It also runs where rar_jax cannot be imported: everything but the standard library is imported late.
"""

from __future__ import annotations

import collections
import contextlib
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
SHOWN = ("rar_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy", *PLUGINS)
# Device files of the driver, platforms of JAX, and the extra of rar_jax with which JAX sees the device.
ACCELERATORS = (
    ("/dev/nvidia[0-9]*", ("gpu", "cuda"), "cuda12"),
    ("/dev/accel[0-9]*", ("tpu",), "tpu"),
    ("/dev/vfio/[0-9]*", ("tpu",), "tpu"),
)
MIN_FREE = 1.0  # GiB of disk

Problems = Iterator[tuple[str, str]]  # what is wrong, and what to do


def check_machine(workdir: pathlib.Path | None = None) -> dict[str, Any]:
    """Check this machine and a folder (default: the current one). Nothing stays behind."""
    folder = workdir or pathlib.Path.cwd()
    cache = pathlib.Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    disk = shutil.disk_usage(_find_existing(folder))
    found = {
        "python": platform.python_version(),
        "versions": {name: version for name in SHOWN if (version := find_version(name))},
        "devices": [],
        "memory_free_gib": _read_free_memory(),
        "disk_free_gib": round(disk.free / 2**30, 1),
        "folders": [str(folder), str(cache)],
    }
    problems = [
        *check_devices(found["devices"]),
        *check_requirements(),
        *check_folder(folder, "use another --workdir"),
        *check_folder(cache, "set HF_HOME to another folder"),
    ]
    if found["disk_free_gib"] < MIN_FREE:
        problems.append((f"only {found['disk_free_gib']} GiB of disk free", "free space, or use another --workdir"))
    return {**found, "problems": [{"what": what, "remedy": remedy} for what, remedy in problems]}


def format_checkup(checkup: Mapping[str, Any]) -> str:
    """Lines of text for the result of `check_machine`."""
    counted = collections.Counter(checkup["devices"])
    shown = {
        "versions": ", ".join(f"{k} {v}" for k, v in {"python": checkup["python"], **checkup["versions"]}.items()),
        "devices": ", ".join(f"{n} x {device}" for device, n in counted.items()) or "none",
        "memory": f"{checkup['memory_free_gib']} GiB free",
        "disk": f"{checkup['disk_free_gib']} GiB free",
        "folders": ", ".join(checkup["folders"]),
    }
    lines = [f"{name:10}{text}" for name, text in shown.items()]
    lines += [f"PROBLEM   {each['what']}\n          To do: {each['remedy']}" for each in checkup["problems"]]
    return "\n".join([*lines, f"{len(checkup['problems']) or 'no'} problem(s)"])


def find_version(name: str) -> str | None:
    """The installed version of a distribution, if any."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirements() -> Problems:
    """Compare installed versions with the requirements of rar_jax, JAX and JAX's plugins."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        yield "packaging is not installed", "pip install packaging"
        return
    if find_version("rar_jax") is None:
        yield "rar_jax is not installed", "pip install -e . in its checkout"
    for owner in filter(find_version, ("rar_jax", "jax", *PLUGINS)):
        asked: dict[str, list[Any]] = collections.defaultdict(list)
        for requirement in map(Requirement, importlib.metadata.requires(owner) or ()):
            name = canonicalize_name(requirement.name)
            if requirement.marker is None or (owner == "jax" and name in PLUGINS):  # extras of JAX pin its plugins
                asked[name].append(requirement.specifier)
        for name, specifiers in asked.items():
            version = find_version(name)
            fits = version and any(specifier.contains(version, prereleases=True) for specifier in specifiers)
            if not fits and (version or name not in PLUGINS or owner != "jax"):
                needed = f"{name}{specifiers[0]}"
                yield f"{owner} needs {needed}, and {version or 'none'} is installed", f'pip install "{needed}"'


def check_devices(names: list[str]) -> Problems:
    """Multiply matrices on each local device, and look for accelerators that JAX does not see.

    Args:
      names: the names of the devices are added to it.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "")
    try:
        import jax
        import jax.numpy as jnp

        devices = jax.local_devices()
    except Exception as error:  # a broken installation raises anything
        unset = f"unset JAX_PLATFORMS (it is '{chosen}'), or " if chosen else ""
        yield f"JAX finds no devices ({_shorten(error)})", f"{unset}reinstall jax, with its extra for the accelerator"
        return
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        names.append(f"{device.device_kind} ({device.platform}{f', {limit / 2**30:.1f} GiB' if limit else ''})")
        try:
            ones = jax.device_put(jnp.ones((256, 256)), device)
            wrong = "" if (ones @ ones == 256).all() else "wrong numbers"
        except Exception as error:
            wrong = _shorten(error)
        if wrong:
            yield f"{device} cannot multiply matrices ({wrong})", "check that no other process holds the device"
    for files, platforms, extra in ACCELERATORS:
        if glob.glob(files) and not {device.platform for device in devices} & set(platforms):
            hidden = chosen and not any(name in chosen for name in platforms)
            remedy = f"unset JAX_PLATFORMS, which is '{chosen}'" if hidden else f"pip install -e '.[{extra}]'"
            yield f"{files} exists, and JAX sees no {platforms[0].upper()}", remedy


def check_folder(folder: pathlib.Path, otherwise: str) -> Problems:
    """Create, lock and rename a file in a folder, or in the nearest existing one above it."""
    own = _find_existing(folder) / f".rar_jax_doctor_{os.getpid()}"
    renamed = own.with_suffix(".renamed")
    try:
        own.touch(exist_ok=False)
        with contextlib.suppress(FileExistsError):
            own.touch(exist_ok=False)
            yield f"{folder}: a file can be created twice, so locks do not hold", otherwise
        own.replace(renamed)
        if own.exists() or not renamed.exists():
            yield f"{folder}: a renamed file keeps its old name", otherwise
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror})", f"check its owner, mode and mount, or {otherwise}"
    finally:
        for path in (own, renamed):
            with contextlib.suppress(OSError):
                path.unlink()


def _shorten(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no plugin'])[0]}"


def _find_existing(path: pathlib.Path) -> pathlib.Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _read_free_memory() -> float | None:
    """GiB; None where there is no /proc."""
    meminfo = pathlib.Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return found and round(int(found[1]) / 2**20, 1)
