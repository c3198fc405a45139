"""Format the reports of `rar-jax plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rar_jax.tools.plan.topology import GIB


def format_plan(report: Mapping[str, Any], *, heading: bool = True) -> str:
    """Format the report of `plan_experiment`."""
    lines = [f"{_format_subject(report)}; compiled by libtpu {report['versions']['libtpu']}"] if heading else []
    if "train" in report:
        lines += ["", f"training step, mesh {_format_mesh(report['mesh'])}", *_format_training(report["train"])]
        if remedy := report.get("remedy"):
            lines += ["", f"it fits with {' '.join(remedy['flags'])}, mesh {_format_mesh(remedy['mesh'])}"]
            lines += _format_training(remedy["train"])
        elif "remedy" in report:
            lines.append("  no tested change (remat, fsdp, accumulation) makes it fit: use more or larger chips")
    if tokens := report.get("tokenize"):
        lines += ["", f"tokenizing, {tokens['rows']} images at a time on each chip", *_format_program(tokens)]
        if tokens["fits"]:
            lines.append(
                f"  {tokens['images_per_second']:.0f} images/s, if the hosts decode as many: {tokens['images']} in "
                f"{tokens['minutes']:.3g} minutes (--config.data.crop=ten: ten crops per image)"
            )
        else:
            lines.append("  give tokenize a smaller --batch-size, which counts the images of all chips")
    if sample := report.get("sample"):
        size, mesh = sample["batch_size"], _format_mesh(sample["mesh"])
        lines += ["", f"sampling and FID, {size} images at a time, mesh {mesh}", *_format_program(sample)]
        if sample["fits"]:
            rate, minutes = sample["images_per_second"], sample["minutes"]
            lines.append(f"  {rate:.1f} images/s: {sample['images']} in {minutes:.1f} minutes")
        else:
            lines.append("  give a smaller --sample-rows, or shard the model with --config.mesh.tensor")
    return "\n".join(lines)


def format_search(report: Mapping[str, Any]) -> str:
    """Format the report of `search_meshes`, one row per mesh, the best first."""
    lines = [
        f"{_format_subject(report)}, training step by the compiler's estimate",
        f"{'mesh':32} {'peak per chip':>22} {'s a step':>9} {'exposed':>7} {'MFU':>6} {'images/s':>9} {'days':>6}",
    ]
    for one in report["meshes"]:
        train, row = one["train"], f"{_format_mesh(one['mesh']):32}"
        if not train["fits"]:
            lines.append(f"{row} {'state ' + _format_gib(one['state']):>22}  does not fit")
            continue
        memory, seconds, mfu = train["memory"], train["seconds"], f"{train['mfu']:.1%}" if train["mfu"] else "-"
        peak = f"{_format_gib(memory['peak'])} of {_format_gib(memory['available'])}"
        lines.append(
            f"{row} {peak:>22} {seconds['all']:9.3f} {seconds['exposed']:7.3f} {mfu:>6} "
            f"{train['images_per_second']:9.0f} {train['days']:6.1f}"
        )
    return "\n".join(lines)


def _format_subject(report: Mapping[str, Any]) -> str:
    return f"{report['config']} on {report['topology']}: {report['chips']} chips; jax {report['versions']['jax']}"


def _format_mesh(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items())


def _format_program(part: Mapping[str, Any]) -> list[str]:
    if not part["fits"]:
        lines = [f"  does NOT fit: {part['why']}"]
        state = f"  parameters and optimizer alone take {_format_gib(part.get('state', 0))} per chip"
        return [*lines, state] if "state" in part else lines
    memory, seconds = part["memory"], part["seconds"]
    lines = [
        f"  fits: peak {_format_gib(memory['peak'])} of {_format_gib(memory['available'])} per chip "
        f"(arguments {_format_gib(memory['arguments'])}, temporaries {_format_gib(memory['temporaries'])}); "
        f"compiled in {part['compile_seconds']:.0f} s"
    ]
    for kind, row in part["collectives"].items():
        network = f", {_format_si(row['network_bytes'])}B between slices" if row["network_bytes"] else ""
        lines.append(
            f"  {kind:20} {row['count']:6.0f} times, {_format_si(row['bytes'])}B; a chip sends "
            f"{_format_si(row['sent_bytes'])}B{network}, {row['seconds'] * 1e3:.3g} ms"
        )
    lines.append(
        f"  estimate {seconds['all']:.4g} s: computing {seconds['computing']:.4g} s, exposed communication "
        f"{seconds['exposed']:.3g} s, overlapped communication {seconds['overlapped']:.3g} s"
    )
    return lines


def _format_training(train: Mapping[str, Any]) -> list[str]:
    if not train["fits"]:
        return _format_program(train)
    mfu = f"MFU {train['mfu']:.1%}, " if train["mfu"] else ""
    return [
        *_format_program(train),
        f"  {train['seconds']['all']:.3g} s a step: {mfu}{train['images_per_second']:.0f} images/s; "
        f"{train['steps']} steps take {train['days']:.1f} days, {train['chip_hours']:.0f} chip-hours",
    ]


def _format_gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _format_si(number: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.0f} "
