"""Time a part of an experiment against what this machine can do.

The parts are sampling, the training step, tokenizing, evaluating and the loader. No files are needed. Only --profile
leaves one.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.config import require, to_dict
from rar_jax.experiment import Experiment
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.progress import track_progress
from rar_jax.tools.bench.cases import Case, Options, make_cases, select_batch_sizes, select_dtype
from rar_jax.tools.bench.ceilings import Ceilings, measure_ceilings


def bench_experiment(
    experiment: Experiment, options: Options, *, profile: pathlib.Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Time each batch size: one run to warm up, then `options.repeats`.

    Args:
      profile: folder for a jax.profiler trace of one more run, in batch_<size>.

    Returns: what --json prints. "dtype" is None for the loader; for "results" see `describe_case` and
      `compare_to_ceilings`.
    Raises: ConfigError for sizes that do not divide over the mesh, or a `profile` that is not a folder.
    """
    require(profile is None or profile.is_dir() or not profile.exists(), f"--profile {profile} is not a folder")
    mesh = make_mesh(experiment.mesh)
    select_batch_sizes(experiment, mesh, options)  # raises before anything is measured
    dtype = None if options.what == "loader" else select_dtype(experiment, options)
    ceilings = measure_ceilings(mesh, dtype or "float32")
    results = _time_cases(experiment, mesh, options, profile, quiet)
    # Again, and the better one counts: other work on the machine must not lower a ceiling.
    ceilings = Ceilings(*map(max, ceilings, measure_ceilings(mesh, dtype or "float32")))
    device = mesh.devices.flat[0]
    return {
        "bench": options.what,
        "config": experiment.name,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "jax_version": jax.__version__,
        "dtype": dtype,
        "sampling": to_dict(experiment.sampling),
        "ceilings": ceilings._asdict(),
        "results": [{**result, **compare_to_ceilings(result, ceilings)} for result in results],
    }


def _time_cases(
    experiment: Experiment, mesh: Mesh, options: Options, profile: pathlib.Path | None, quiet: bool
) -> list[dict[str, Any]]:
    """Results of each batch size. The memory of the cases is free when it returns."""
    results: list[dict[str, Any]] = []
    with contextlib.closing(make_cases(experiment, mesh, options)) as cases:  # pyright: ignore[reportArgumentType]
        for case in cases:
            results.append(describe_case(case, time_case(case, options, quiet)))
            if profile is not None:
                with jax.profiler.trace(str(profile / f"batch_{case.batch_size}")):
                    jax.block_until_ready(case.run())
    return results


def time_case(case: Case, options: Options, quiet: bool) -> list[float]:
    """Seconds of one step, for each repeat."""
    name, seconds = f"bench {options.what}, batch {case.batch_size}", []
    for _ in track_progress(range(1 + options.repeats), description=name, unit="runs", quiet=quiet):
        began = time.perf_counter()
        jax.block_until_ready(case.run())
        seconds.append((time.perf_counter() - began) / case.steps)
    return seconds[1:]  # the first one warms up


def describe_case(case: Case, seconds: list[float]) -> dict[str, Any]:
    """Results of one batch size. Rates are per second of the median step.

    "flops" to "bytes_per_second" are None if the cost is unknown.
    """
    median, cost = statistics.median(seconds), case.cost._asdict() if case.cost else {"flops": None, "bytes": None}
    return {
        "batch_size": case.batch_size,
        "unit": case.unit,
        "rate": case.items / median,
        "repeats": len(seconds),
        "seconds": {"min": min(seconds), "median": median, "max": max(seconds)},
        "compile_seconds": case.compile_seconds,
        **cost,
        **{f"{name}_per_second": count and count / median for name, count in cost.items()},
        **case.more(),
    }


def compare_to_ceilings(result: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """Divide the least possible time by the measured one.

    Returns: {"share_of_ceiling", "limited_by"}, the latter "flops" or "bytes"; None if the cost is unknown.
    """
    if result["flops"] is None:
        return {"share_of_ceiling": None, "limited_by": None}
    limits = zip((result["flops"], result["bytes"]), ceilings, ("flops", "bytes"), strict=True)
    least, limited_by = max((count / rate, name) for count, rate, name in limits)
    return {"share_of_ceiling": least / result["seconds"]["median"], "limited_by": limited_by}


# ---------------------------------------------------------------- text


def format_bench(report: Mapping[str, Any]) -> str:
    """The report of `bench_experiment` as a table."""
    ceilings = report["ceilings"]
    sampling = "".join(f", {name} {value}" for name, value in report["sampling"].items() if value is not None)
    lines = [
        f"bench {report['bench']} of {report['config']}, random weights: "
        f"{report['devices']} {report['device_kind']} device(s), "
        f"jax {report['jax_version']}{', ' + report['dtype'] if report['dtype'] else ''}"
        f"{sampling if report['bench'] in ('sample', 'evaluate') else ''}",
        f"this machine, measured: {_format_si(ceilings['flops_per_second'])}FLOP/s in a large matmul, "
        f"{_format_si(ceilings['bytes_per_second'])}B/s of memory",
    ]
    rows = [("batch", "rate", "a step: min", "median", "max", "compiling", "FLOP/s", "B/s", "of the ceiling")]
    rows += [_format_row(result) for result in report["results"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for result in report["results"]:
        if "longest_wait_seconds" in result:
            longest = _format_si(result["longest_wait_seconds"])
            lines.append(f"batch {result['batch_size']}: the longest wait for a batch was {longest}s")
    return "\n".join(lines)


def _format_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    share, compiling = result["share_of_ceiling"], result["compile_seconds"]
    return (
        str(result["batch_size"]),
        f"{result['rate']:.4g} {result['unit']}/s",
        *(f"{_format_si(result['seconds'][name])}s" for name in ("min", "median", "max")),
        "-" if compiling is None else f"{compiling:.1f} s",
        _format_si(result["flops_per_second"]),
        _format_si(result["bytes_per_second"]),
        "-" if share is None else f"{share:.1%} ({result['limited_by']})",
    )


def _format_si(number: float | None) -> str:
    """Three digits and an SI prefix, "1.23 G"; "-" for None and 0."""
    if not number:
        return "-"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number * 1e6:.3g} u"
