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
from collections.abc import Mapping
from typing import Any

PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
SHOWN = ("rar_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", *PLUGINS)
# Device files of the drivers; the extra of rar_jax and the packages with which JAX sees the device.
DEVICE_FILES = {"gpu": ("/dev/nvidia[0-9]*",), "tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")}
EXTRAS = {"gpu": ("cuda12", ("jax-cuda12-plugin", "jax-cuda13-plugin")), "tpu": ("tpu", ("libtpu",))}
MIN_FREE = 1 << 30  # bytes of disk

Problem = dict[str, str]


def run_doctor(workdir: pathlib.Path | None = None) -> dict[str, Any]:
    """Check this machine and a folder (default: the current one). Sizes are in bytes. Nothing stays behind."""
    versions = {name: version for name in SHOWN if (version := find_version(name))}
    folders = {
        "--workdir": workdir or pathlib.Path.cwd(),
        "HF_HOME": pathlib.Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(),
    }
    devices, problems = _check_devices()
    if not problems:
        problems = find_hidden_accelerators({device["platform"] for device in devices}, versions)
    problems += check_requirements()
    for option, folder in folders.items():
        problems += check_folder(folder, f"use another {option}")
    disk = shutil.disk_usage(_find_existing(folders["--workdir"]))
    if disk.free < MIN_FREE:
        problems.append(_problem(f"{_format_size(disk.free)} of disk free", "free space, or use another --workdir"))
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices,
        "memory_free": _read_free_memory(),
        "disk": {"free": disk.free, "total": disk.total},
        "folders": [str(folder) for folder in folders.values()],
        "problems": problems,
    }


def format_checkup(checkup: Mapping[str, Any]) -> str:
    """Lines of text for the result of `run_doctor`."""
    memory, disk = checkup["memory_free"], checkup["disk"]
    kinds = collections.Counter((d["kind"], d["platform"], d["memory"]) for d in checkup["devices"])
    devices = [
        f"{n} x {kind} ({on}{size and ', ' + _format_size(size) or ''})" for (kind, on, size), n in kinds.items()
    ]
    lines = [
        f"versions  python {checkup['python']}, " + ", ".join(f"{k} {v}" for k, v in checkup["versions"].items()),
        f"devices   {', '.join(devices) or 'none'}",
        f"memory    {_format_size(memory)} free" if memory else "memory    unknown",
        f"disk      {_format_size(disk['free'])} of {_format_size(disk['total'])} free",
        f"folders   {', '.join(checkup['folders'])}",
        *(f"PROBLEM   {problem['what']}\n          To do: {problem['remedy']}" for problem in checkup["problems"]),
    ]
    return "\n".join([*lines, f"{len(checkup['problems'])} problem(s)" if checkup["problems"] else "no problems"])


def find_version(name: str) -> str | None:
    """The installed version of a distribution, if any."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirements() -> list[Problem]:
    """Compare installed versions with the requirements of rar_jax, JAX and JAX's plugins."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return [_problem("packaging is not installed", "pip install packaging")]
    if find_version("rar_jax") is None:
        return [_problem("rar_jax is not installed", "pip install -e . in its checkout")]
    problems = []
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
                what = f"{owner} needs {name}{specifiers[0]}, and {version or 'none'} is installed"
                problems.append(_problem(what, f'pip install "{name}{specifiers[0]}"'))
    return problems


def find_hidden_accelerators(platforms: set[str], versions: Mapping[str, str]) -> list[Problem]:
    """Find accelerators whose driver is there, but which are not among the platforms of JAX's devices."""
    problems = []
    for kind, patterns in DEVICE_FILES.items():
        if platforms & {kind, "cuda" if kind == "gpu" else kind} or not any(map(glob.glob, patterns)):
            continue
        chosen, (extra, packages) = os.environ.get("JAX_PLATFORMS", ""), EXTRAS[kind]
        remedy = "run `python -c 'import jax; jax.devices()'`, and check that no other process holds the device"
        if chosen and kind not in chosen and "cuda" not in chosen:
            remedy = f"unset JAX_PLATFORMS, which is '{chosen}'"
        elif not any(package in versions for package in packages):
            remedy = f"pip install -e '.[{extra}]' in the checkout of rar_jax"
        problems.append(_problem(f"a {kind.upper()} is installed, and JAX sees only {', '.join(platforms)}", remedy))
    return problems


def check_folder(folder: pathlib.Path, otherwise: str) -> list[Problem]:
    """Create, lock and rename a file in a folder, or in the nearest existing one above it."""
    own = _find_existing(folder) / f".rar_jax_doctor_{os.getpid()}"
    renamed = own.with_suffix(".renamed")
    try:
        own.touch(exist_ok=False)
        with contextlib.suppress(FileExistsError):
            own.touch(exist_ok=False)
            return [_problem(f"{folder}: a file could be created twice, so locks do not hold", otherwise)]
        own.replace(renamed)
        if own.exists() or not renamed.exists():
            return [_problem(f"{folder}: a renamed file keeps its old name", otherwise)]
    except OSError as error:
        return [
            _problem(f"{folder} cannot be written ({error.strerror})", f"check owner, mode and mount, or {otherwise}")
        ]
    finally:
        for path in (own, renamed):
            with contextlib.suppress(OSError):
                path.unlink()
    return []


def _check_devices() -> tuple[list[dict[str, Any]], list[Problem]]:
    """The local devices, and problems: none found, or a matmul that fails."""
    try:
        import jax
        import jax.numpy as jnp

        found = jax.local_devices()
    except Exception as error:  # a broken installation raises anything
        chosen = None if isinstance(error, ImportError) else os.environ.get("JAX_PLATFORMS")
        remedy = "pip install -e '.[cuda12]' or '.[tpu]' in the checkout of rar_jax"
        remedy = f"unset JAX_PLATFORMS (it is '{chosen}'), or {remedy}" if chosen else "reinstall jax"
        return [], [_problem(f"JAX finds no devices ({_shorten(error)})", remedy)]
    devices, problems = [], []
    for device in found:
        stats = device.memory_stats() if device.platform != "cpu" else None
        memory = (stats or {}).get("bytes_limit")
        devices.append({"kind": device.device_kind, "platform": device.platform, "memory": memory})
        try:
            ones = jax.device_put(jnp.ones((256, 256)), device)
            wrong = "" if (ones @ ones == 256).all() else "wrong numbers"
        except Exception as error:
            wrong = _shorten(error)
        if wrong:
            what = f"{device} cannot multiply matrices ({wrong})"
            problems.append(_problem(what, "check that no other process holds the device, and the versions above"))
    return devices, problems


def _shorten(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no plugin'])[0]}"


def _problem(what: str, remedy: str) -> Problem:
    return {"what": what, "remedy": remedy}


def _find_existing(path: pathlib.Path) -> pathlib.Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _read_free_memory() -> int | None:
    meminfo = pathlib.Path("/proc/meminfo")  # of Linux
    found = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else None


def _format_size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
