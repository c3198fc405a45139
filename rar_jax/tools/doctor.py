"""The verb `doctor`: whether this machine can do the work, and what to do where it cannot.

It has to say so even where the rest of rar_jax cannot be imported: everything but the standard library is imported late.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

SHOWN = (
    "rar_jax", "jax", "jaxlib", "flax", "optax", "tensorstore", "grain", "numpy", "libtpu", "jax-cuda12-plugin",
    "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt",
)  # fmt: skip
LEAST_DISK = 1 << 30  # bytes free; below that the next checkpoints of anything but a toy do not fit

# Where a driver shows itself, as globs: what jax should then see.
DEVICE_FILES: dict[str, tuple[str, ...]] = {
    "gpu": ("/dev/nvidia[0-9]*",),
    "tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"),
}
EXTRA = {"gpu": "cuda12", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class TooOld:
    """A package below a version, why that is bad; the remedy is the newer one."""

    package: str
    below: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A package that must be the version which `by` asks for in its metadata."""

    package: str
    by: str
    reason: str


TOO_OLD = (
    TooOld(
        "jax",
        "0.10.2",
        "meshes, sharding rules and the unrolled decoder were written for it; older ones were never tried",
    ),
    TooOld("flax", "0.12.8", "the logical axes of parameters were written for it; older ones were never tried"),
    TooOld("optax", "0.2.8", "the optimizer's state is cut over the mesh as it lies there"),
    TooOld(
        "tensorstore",
        "0.12.8",
        "saves that are killed, and a full disk, were tested with it: older ones may lose steps",
    ),
    TooOld("grain", "0.2.18", "the shared-memory loader was tested with it"),
    TooOld("numpy", "2.0", "arrays are read and written with its promotion rules"),
)
PINNED = (
    Pinned("jaxlib", "jax", "jax and jaxlib are released in pairs"),
    Pinned(
        "libtpu",
        "jax",
        "with a newer libtpu than jax pins, reading a compiled program back failed; older ones lack instructions",
    ),
    Pinned(
        "jax-cuda12-plugin", "jax", "a plugin of another release does not load, and jax then runs on the CPU in silence"
    ),
    Pinned("jax-cuda12-pjrt", "jax-cuda12-plugin", "plugin and runtime are released in pairs"),
    Pinned(
        "jax-cuda13-plugin", "jax", "a plugin of another release does not load, and jax then runs on the CPU in silence"
    ),
    Pinned("jax-cuda13-pjrt", "jax-cuda13-plugin", "plugin and runtime are released in pairs"),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong, why that matters, and what to do."""

    what: str
    reason: str
    remedy: str


def doctor(workdir: pathlib.Path | None = None) -> dict[str, Any]:
    """Looks at versions, devices, memory, disk and, if given, a work directory, in which nothing stays behind.

    Returns: what --json prints: {"versions", "python", "devices", "memory_free", "disk", "workdir", "notes", "problems"}; bytes.
    """
    installed = {name: version for name in SHOWN if (version := _version(name))}
    try:
        problems = bad_versions(installed, _requirements) + missing(_version)
    except ImportError as error:  # packaging, by which versions are read
        remedy = "pip install -e . in the checkout of rar_jax"
        problems = [Problem("versions cannot be compared", str(error), remedy)]
    devices: list[dict[str, Any]] = []
    try:
        devices = _devices()
    except Exception as error:  # whatever a broken installation raises
        reason = str(error).strip().splitlines() or ["no plugin of that name is installed"]
        asked = None if isinstance(error, ImportError) else os.environ.get("JAX_PLATFORMS")
        remedy = "install jax again"
        if asked:
            remedy = f"unset JAX_PLATFORMS (it is '{asked}'), or pip install -e '.[cuda12]' or '.[tpu]' in the checkout of rar_jax"
        problems.append(Problem("jax finds no devices", f"{type(error).__name__}: {reason[0]}", remedy))
    files = {kind: any(_glob(pattern) for pattern in patterns) for kind, patterns in DEVICE_FILES.items()}
    problems += missing_accelerator({device["platform"] for device in devices}, files, installed, os.environ)
    notes = _notes(installed, files, devices)
    folder = _existing(workdir or pathlib.Path.cwd())
    disk = shutil.disk_usage(folder)
    problems += _of_folder(workdir or folder, folder)
    if workdir is not None and disk.total and disk.free < LEAST_DISK:
        remedy = f"make room under {folder}, or give another --workdir"
        problems.append(Problem(f"{_size(disk.free)} free on the disk", "the next checkpoint may not fit", remedy))
    return {
        "python": platform.python_version(),
        "versions": installed,
        "devices": devices,
        "memory_free": _memory(),
        "disk": {"folder": str(folder), "free": disk.free, "total": disk.total},
        "workdir": str(workdir) if workdir else None,
        "notes": notes,
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }


def tell_doctor(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"versions   python {report['python']}, {versions}"]
    kinds: dict[tuple[str, str, int | None], int] = {}
    for device in report["devices"]:
        key = device["kind"], device["platform"], device["memory"]
        kinds[key] = kinds.get(key, 0) + 1
    for (kind, of, memory), count in kinds.items():
        told = f", {_size(memory)} each" if memory else ""
        lines.append(f"devices    {count} x {kind} ({of}){told}")
    if report["memory_free"]:
        lines.append(f"memory     {_size(report['memory_free'])} free on this host")
    disk = report["disk"]
    lines.append(f"disk       {_size(disk['free'])} of {_size(disk['total'])} free at {disk['folder']}")
    name, place = ("workdir", report["workdir"]) if report["workdir"] else ("folder", disk["folder"])
    if not any(problem["what"].startswith(place) for problem in report["problems"]):
        lines.append(f"{name:10} {place}: files are made, renamed and locked")
    lines += [f"note       {note}" for note in report["notes"]]
    for problem in report["problems"]:
        lines += [f"BAD        {problem['what']}: {problem['reason']}", f"           do: {problem['remedy']}"]
    return "\n".join([*lines, f"{len(report['problems'])} problem(s)" if report["problems"] else "all is well"])


# ---------------------------------------------------------------- versions


def bad_versions(
    installed: Mapping[str, str],
    requirements: Callable[[str], list[tuple[str, str]]],
    python: tuple[int, int] | None = None,
) -> list[Problem]:
    """What the tables above say of these versions.

    Args:
      requirements: of a package's metadata, (name, specifier) pairs, those of its extras too.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found = []
    if (python := python or sys.version_info[:2]) < (3, 11):
        found.append(
            Problem(f"python {python[0]}.{python[1]}", "rar_jax is written for 3.11 and newer", "install Python 3.11")
        )
    for rule in TOO_OLD:
        if rule.package not in installed:
            remedy = f'pip install "{rule.package}>={rule.below}"'
            found.append(Problem(f"{rule.package} is not installed", rule.reason, remedy))
        elif Version(installed[rule.package]) < Version(rule.below):
            what = f"{rule.package} {installed[rule.package]} is older than {rule.below}"
            found.append(Problem(what, rule.reason, f'pip install -U "{rule.package}>={rule.below}"'))
    for rule in PINNED:
        if rule.package not in installed or rule.by not in installed:
            continue
        asked = [specifier for name, specifier in requirements(rule.by) if name == rule.package and specifier]
        version = installed[rule.package]
        # An extra may ask for more than the package itself: any of them will do, and the first is the package's own.
        if asked and not any(version in SpecifierSet(specifier, prereleases=True) for specifier in asked):
            what = (
                f"{rule.package} {version} does not belong to {rule.by} {installed[rule.by]}, which asks for {asked[0]}"
            )
            found.append(Problem(what, rule.reason, f'pip install "{rule.package}{asked[0]}"'))
    return found


def missing(version: Callable[[str], str | None]) -> list[Problem]:
    """What rar_jax needs by its metadata, extras left out, and `version` knows nothing of. TOO_OLD has said its own."""
    from packaging.requirements import Requirement

    if version("rar_jax") is None:
        what = "what it needs is written in its metadata, without which nothing can be said of the other packages"
        return [Problem("rar_jax is not installed", what, "pip install -e . in its checkout")]
    told = {rule.package for rule in TOO_OLD}
    needed = [Requirement(text) for text in importlib.metadata.requires("rar_jax") or ()]
    return [
        Problem(f"{each.name} is not installed", "rar_jax needs it", f'pip install "{each}"')
        for each in needed
        if each.marker is None and each.name not in told and version(each.name) is None
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(package: str) -> list[tuple[str, str]]:
    from packaging.requirements import Requirement

    parsed = (Requirement(text) for text in importlib.metadata.requires(package) or ())
    return [(re.sub(r"[-_.]+", "-", each.name).lower(), str(each.specifier)) for each in parsed]


# ---------------------------------------------------------------- devices


def _devices() -> list[dict[str, Any]]:
    import jax

    told = []
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        told.append(
            {"kind": device.device_kind, "platform": device.platform, "memory": (stats or {}).get("bytes_limit")}
        )
    return told


def missing_accelerator(
    platforms: set[str], files: Mapping[str, bool], installed: Mapping[str, str], environ: Mapping[str, str]
) -> list[Problem]:
    """Whether a driver shows an accelerator ("gpu", "tpu") that jax does not see.

    Args:
      platforms: of jax's devices. files: whether there are device files of each kind.
    """
    found = []
    for kind, there in files.items():
        if not there or platforms & {kind, "cuda" if kind == "gpu" else kind}:
            continue
        hidden = environ.get("JAX_PLATFORMS", "")
        plugins = ("libtpu",) if kind == "tpu" else ("jax-cuda12-plugin", "jax-cuda13-plugin")
        if hidden and kind not in hidden and "cuda" not in hidden:
            remedy = f"unset JAX_PLATFORMS, which is {hidden!r}"
        elif not any(name in installed for name in plugins):
            remedy = f"pip install -e '.[{EXTRA[kind]}]' in the checkout of rar_jax"
        else:
            remedy = "look at what `python -c 'import jax; jax.devices()'` says, and whether another process holds the device"
        what = f"a {kind.upper()} is here, and jax sees only {', '.join(sorted(platforms)) or 'nothing'}"
        found.append(
            Problem(what, f"{' or '.join(DEVICE_FILES[kind])} exists; training would be slow and say nothing", remedy)
        )
    return found


def _notes(installed: Mapping[str, str], files: Mapping[str, bool], devices: list[dict[str, Any]]) -> list[str]:
    said = []
    if "libtpu" in installed and not files["tpu"]:
        said.append(
            "libtpu is installed and no TPU is here: `rar-jax plan` compiles with it; on a TPU machine that would be wrong"
        )
    if fake := re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        said.append(f"XLA_FLAGS makes {fake[1]} devices of one CPU: for tests")
    if devices and {device["platform"] for device in devices} == {"cpu"}:
        said.append("only CPUs: enough for the digits, not for RAR on ImageNet")
    return said


def _glob(pattern: str) -> list[pathlib.Path]:
    path = pathlib.Path(pattern)
    return list(path.parent.glob(path.name)) if path.parent.is_dir() else []


# ---------------------------------------------------------------- memory and disk


def _of_folder(workdir: pathlib.Path, folder: pathlib.Path) -> list[Problem]:
    path = workdir.absolute()
    if file := next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None):
        return [Problem(f"{workdir} is not a folder", f"{file} is a file", "give another --workdir")]
    file = folder / f".doctor-{os.getpid()}"
    try:
        file.write_text("")
        file.rename(file.with_suffix(".renamed")).unlink()
    except OSError as error:
        remedy = "look at its owner, its mode and how it is mounted, or give another --workdir"
        return [
            Problem(
                f"{workdir} cannot be worked in",
                f"this process cannot create and rename a file there ({error})",
                remedy,
            )
        ]
    return []


def _existing(path: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _memory() -> int | None:
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:  # no Linux
        return None
    found = re.search(r"^MemAvailable: +(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
