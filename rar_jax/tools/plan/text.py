"""What `rar-jax plan` found, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rar_jax.tools.plan.plan import GPU_SHARE
from rar_jax.tools.plan.topology import GIB


def plan_text(report: Mapping[str, Any], *, heading: bool = True) -> str:
    """Lines of what `plan` returned; what it is of and by what it was found, in the heading."""
    compiled = report["from"] == "compiler"
    by = f"compiled by libtpu {report['versions'].get('libtpu')}" if compiled else "arithmetic alone, nothing compiled"
    lines = [
        f"{report['config']} on {report['topology']}: {report['chips']} chips; {by}, jax {report['versions']['jax']}"
    ]
    lines = lines if heading else []
    if "train" in report:
        lines += ["", f"training step, mesh {mesh_text(report['mesh'])}", *_program(report["train"], compiled)]
        lines += _rates(report["train"], compiled)
        remedy = report.get("remedy")
        if remedy:
            lines += ["", f"it fits with {' '.join(remedy['flags'])}, mesh {mesh_text(remedy['mesh'])}"]
            lines += [*_program(remedy["train"], compiled), *_rates(remedy["train"], compiled)]
        elif "remedy" in report:
            lines += [
                "  nothing that was tried makes it fit (remat, fsdp, accumulation): take more chips or larger ones"
            ]
    if tokens := report.get("tokenize"):
        lines += ["", f"tokenizing, {tokens['rows']} images at a time on each chip"]
        lines += _program(tokens, compiled) if compiled else []
        if not tokens.get("fits", True):
            lines.append("  give tokenize a smaller --batch-size, which is of all chips together")
        if "minutes" in tokens:
            at = f" at {GPU_SHARE:.0%} of the peak, which is assumed (memory is not counted)"
            lines.append(
                f"  {tokens['images_per_second']:.0f} images/s{'' if compiled else at}, if the hosts decode as many: "
                f"{tokens['images']} in {tokens['minutes']:.3g} minutes (--config.data.crop=ten: ten of each image)"
            )
    if sample := report.get("sample"):
        lines += ["", f"sampling and FID, {sample['batch_size']} images at a time, mesh {mesh_text(sample['mesh'])}"]
        lines += _program(sample, compiled)
        if not sample["fits"]:
            lines.append(
                "  give fewer images a chip with --sample-rows, or cut the model with --config.mesh.tensor (evaluate, sample: --tensor)"
            )
        elif "images_per_second" in sample:
            at = (
                ""
                if compiled
                else " of tokens alone (nor is the decoder's memory counted), by the bytes or by FLOPs in float32, the slower of the two"
            )
            lines.append(
                f"  {sample['images_per_second']:.1f} images/s{at}: {sample['images']} in {sample['minutes']:.1f} minutes"
            )
    return "\n".join(lines)


def mesh_text(mesh: Mapping[str, int]) -> str:
    """Axes and their sizes: "data 16 x fsdp 4 x tensor 1"."""
    return " x ".join(f"{name} {size}" for name, size in mesh.items())


def _program(told: Mapping[str, Any], compiled: bool) -> list[str]:
    if "why" in told:
        lines = [f"  does NOT fit: {told['why']}"]
        return (
            [*lines, f"  parameters and optimizer alone are {gib(told['state'])} a chip"] if "state" in told else lines
        )
    memory = told["memory"]
    fits = "fits" if compiled else "should fit, by formulas that are rough"
    lines = [
        f"  {fits if told['fits'] else 'does NOT fit'}: peak {gib(memory['peak'])} of {gib(memory['available'])} a chip "
        f"(arguments {gib(memory['arguments'])}, temporaries {gib(memory['temporaries'])})"
    ]
    if not compiled:
        return lines
    lines.append(
        f"  compiled in {told['compile_seconds']:.0f} s; {told['flops']:.4g} FLOPs in matmuls, loops multiplied out"
    )
    for kind, row in told["collectives"].items():
        network = f", {_short(row['network_bytes'])}B between slices" if row["network_bytes"] else ""
        lines.append(
            f"  {kind:20} {row['count']:6.0f} times, {_short(row['bytes'])}B; a chip sends {_short(row['wire_bytes'])}B{network}, "
            f"{row['seconds'] * 1e3:.3g} ms"
        )
    seconds = told["seconds"]
    lines.append(
        f"  estimate {seconds['all']:.4g} s: {seconds['computing']:.4g} s by the compiler's cycles (matmuls at their peak "
        f"{seconds['matmuls_at_peak']:.4g} s), {seconds['wire']:.3g} s waiting for the wire, {seconds['wire_overlapped']:.3g} s of "
        "the wire beside other work"
    )
    return lines


def _rates(told: Mapping[str, Any], compiled: bool) -> list[str]:
    if "days" not in told:
        return []
    at = "" if compiled else f" at {GPU_SHARE:.0%} of the peak, which is assumed"
    mfu = f"MFU {told['mfu']:.1%}, " if told["mfu"] else ""
    return [
        f"  {told['seconds']['all']:.3g} s a step{at}: {mfu}{told['images_per_second']:.0f} images/s; "
        f"{told['steps']} steps take {told['days']:.1f} days, {told['chip_hours']:.0f} chip-hours"
    ]


def gib(size: float) -> str:
    """Bytes as "1.50 GiB"."""
    return f"{size / GIB:.2f} GiB"


def _short(number: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.0f} "
