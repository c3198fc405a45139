"""Times a part of an experiment with random weights, against what this machine can do: sampling, a training step, tokenizing,
Inception, reading tokens. Needs no files and leaves none but the trace that --profile asks for."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rar_jax.config import require
from rar_jax.experiment import Experiment
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.progress import track_progress
from rar_jax.tools.bench import cases as bench_cases
from rar_jax.tools.bench.cases import Case, Cases, Options
from rar_jax.tools.bench.ceilings import Ceilings, Cost, measure_ceilings

CASES: dict[str, Cases] = {
    "sample": bench_cases.sample_cases,
    "train": bench_cases.train_cases,
    "evaluate": bench_cases.evaluate_cases,
    "loader": bench_cases.loader_cases,
    "tokenize": bench_cases.tokenize_cases,
}


def bench(
    experiment: Experiment, options: Options, *, profile: pathlib.Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Times each batch size: one run to warm up, then `options.repeats`.

    Args:
      profile: folder for a jax.profiler trace of one more run, in batch_<size>.

    Returns: what --json prints. {"bench", "config", "platform", "device_kind", "devices", "jax_version", "dtype", "guided",
      "ceilings": {"flops_per_second", "bytes_per_second"}, "results": a dict for each batch size, see `_result` and
      `_share`}. The dtype of the loader is None.
    Raises: ConfigError for sizes that do not fit the mesh, or a `profile` that is no folder.
    """
    # What cannot be is refused before anything is measured.
    require(profile is None or profile.is_dir() or not profile.exists(), f"--profile {profile} is not a folder")
    mesh = make_mesh(experiment.mesh)
    bench_cases.batch_sizes(experiment, mesh, options)
    dtype = None if options.what == "loader" else bench_cases.computes_in(experiment, options)
    ceilings = measure_ceilings(mesh, dtype or "float32")
    results = _results(experiment, mesh, options, profile, quiet)
    # Once more, and the better counts: what else runs on a machine must not make a ceiling that is too low.
    ceilings = ceilings.or_better(measure_ceilings(mesh, dtype or "float32"))
    device = mesh.devices.flat[0]
    return {
        "bench": options.what,
        "config": experiment.name,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "jax_version": jax.__version__,
        "dtype": dtype,
        "guided": experiment.guidance.enabled,
        "ceilings": vars(ceilings),
        "results": [{**result, **_share(result, ceilings)} for result in results],
    }


def _results(
    experiment: Experiment, mesh: Mesh, options: Options, profile: pathlib.Path | None, quiet: bool
) -> list[dict[str, Any]]:
    """Of each batch size. Cases, with the memory they hold, are gone when it returns."""
    results: list[dict[str, Any]] = []
    with contextlib.closing(CASES[options.what](experiment, mesh, options)) as cases:  # pyright: ignore[reportArgumentType]
        for case in cases:
            results.append(_result(case, _time(case, options, quiet)))
            if profile is not None:
                with jax.profiler.trace(str(profile / f"batch_{case.batch_size}")):
                    jax.block_until_ready(case.run())
    return results


def _time(case: Case, options: Options, quiet: bool) -> list[float]:
    """Seconds of a step, of each repeat."""
    name, seconds = f"bench {options.what}, batch {case.batch_size}", []
    for _ in track_progress(range(1 + options.repeats), description=name, unit="runs", quiet=quiet):
        seconds.append(bench_cases.seconds_of(case.run) / case.steps)
    return seconds[1:]  # the first one warms up


def _result(case: Case, seconds: list[float]) -> dict[str, Any]:
    """Of one batch size. "rate" is in "unit" per second, "seconds" of one step (a batch), rates are of the median step.

    Without a known cost "flops" to "bytes_per_second" are None.
    """
    median = statistics.median(seconds)
    flops, moved = (None, None) if case.cost is None else (case.cost.flops, case.cost.bytes)
    return {
        "batch_size": case.batch_size,
        "unit": case.unit,
        "rate": case.items / median,
        "repeats": len(seconds),
        "seconds": {"min": min(seconds), "median": median, "max": max(seconds)},
        "compile_seconds": case.compile_seconds,
        "flops": flops,
        "bytes": moved,
        "flops_per_second": flops and flops / median,
        "bytes_per_second": moved and moved / median,
        **case.more(),
    }


def _share(result: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """Adds "share_of_ceiling", the time at the limit over the time measured, and "limited_by", which says whether the limit is
    of "flops" or of "bytes"; None without a known cost."""
    if result["flops"] is None:
        return {"share_of_ceiling": None, "limited_by": None}
    limit, limited_by = ceilings.limit(Cost(result["flops"], result["bytes"]))
    return {"share_of_ceiling": limit / result["seconds"]["median"], "limited_by": limited_by}


def table(report: Mapping[str, Any]) -> str:
    """What `bench` returned, for people."""
    r, ceilings = report, report["ceilings"]
    head = f"bench {r['bench']} of {r['config']}, random weights: {r['devices']} {r['device_kind']} device(s), "
    head += f"jax {r['jax_version']}" + (f", {r['dtype']}" if r["dtype"] else "")
    if r["bench"] in ("sample", "evaluate"):
        head += ", guided" if r["guided"] else ", without guidance"
    lines = [head]
    lines.append(
        f"this machine, measured: {_short(ceilings['flops_per_second'])}FLOP/s in a large matmul, "
        f"{_short(ceilings['bytes_per_second'])}B/s of memory"
    )
    rows: list[tuple[str, ...]] = [
        ("batch", "rate", "a step: min", "median", "max", "compiling", "FLOP/s", "B/s", "of the ceiling")
    ]
    for result in r["results"]:
        share, seconds, compiling = result["share_of_ceiling"], result["seconds"], result["compile_seconds"]
        rows.append(
            (
                str(result["batch_size"]),
                f"{result['rate']:.4g} {result['unit']}/s",
                *(f"{_short(seconds[name])}s" for name in ("min", "median", "max")),
                "-" if compiling is None else f"{compiling:.1f} s",
                _short(result["flops_per_second"]),
                _short(result["bytes_per_second"]),
                "-" if share is None else f"{share:.1%} ({result['limited_by']})",
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for result in r["results"]:
        if "longest_wait_seconds" in result:
            longest = _short(result["longest_wait_seconds"])
            lines.append(f"batch {result['batch_size']}: the longest wait for one was {longest}s")
    return "\n".join(lines)


def _short(number: float | None) -> str:
    """Three digits and an SI prefix, "1.23 G"; "-" for None and for nothing."""
    if not number:
        return "-"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number * 1e6:.3g} u"
