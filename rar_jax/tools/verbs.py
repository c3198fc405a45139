"""The verbs of tools/: run a tool and print its result. Imports are local, so that `doctor` runs where others fail."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rar_jax.experiment import Experiment


def print_bench(
    experiment: Experiment,
    *,
    batch_size: str | None,
    json: bool,
    profile: pathlib.Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Print a table, with `json` on stderr and JSON on stdout. options: fields of `bench.cases.Options`."""
    from rar_jax.errors import ConfigError
    from rar_jax.tools.bench.bench import bench_experiment, format_bench
    from rar_jax.tools.bench.cases import Options

    try:
        sizes = tuple(int(x) for x in batch_size.split(",")) if batch_size else ()
    except ValueError:
        raise ConfigError(f"--batch-size {batch_size}: give a number, or several as 1,8,64") from None
    result = bench_experiment(experiment, Options(batch_sizes=sizes, **options), profile=profile, quiet=quiet)
    if not (json and quiet):
        print(format_bench(result), file=sys.stderr if json else sys.stdout)
    if json:
        _print_json(result)


def print_plan(
    experiment: Experiment,
    *,
    topology: str,
    slices: int,
    only: str | None,
    sample_rows: int,
    as_is: bool,
    search: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Print the plan of each step as soon as it is compiled, which takes minutes."""
    import jax

    from rar_jax.tools.plan.plan import list_parts, plan_experiment, search_meshes
    from rar_jax.tools.plan.text import format_plan, format_search
    from rar_jax.tools.plan.topology import parse_topology

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    jax.config.update("jax_platforms", "cpu")  # the accelerators are not here
    chips = parse_topology(topology, slices)
    if search:
        found = search_meshes(experiment, chips, say=say)
        _print_json(found) if json else print(format_search(found))
        return
    result: dict[str, Any] = {}
    for part in (only,) if only else list_parts(experiment):
        found = plan_experiment(experiment, chips, sample_rows=sample_rows, parts=(part,), remedies=not as_is, say=say)
        if not json:
            print(format_plan(found, heading=not result), flush=True)
        result |= found
    if json:
        _print_json(result)


def print_inspect(what: str, *, json: bool, **options: Any) -> int:
    """Print the summary of `inspect`. Returns 1 if there are problems."""
    import jax

    from rar_jax.tools.inspect.inspect import inspect_target
    from rar_jax.tools.inspect.layout import print_summary

    jax.config.update("jax_platforms", "cpu")  # a training may hold the accelerator
    summary = inspect_target(what, **options)
    _print_json(summary) if json else print_summary(summary)
    return 1 if summary["num_problems"] else 0


def print_report(workdirs: Sequence[str], *, out: pathlib.Path | None, quiet: bool) -> None:
    """Write the page and print its path."""
    del quiet
    from rar_jax.runs.bucket import is_url
    from rar_jax.runs.workdir import Workdir
    from rar_jax.tools.report.report import write_report

    print(write_report([Workdir(path).fetch().path if is_url(path) else path for path in workdirs], out))


def print_doctor(workdir: pathlib.Path | str | None, *, json: bool, quiet: bool) -> int:
    """Print the problems of this machine. Returns 1 if there are any, 2 for a bucket."""
    from rar_jax.tools.doctor import check_machine, format_checkup

    if isinstance(workdir, str):
        print(f"rar-jax doctor: {workdir} is a bucket: give a folder, such as RAR_JAX_SCRATCH", file=sys.stderr)
        return 2
    checkup = check_machine(workdir)
    if json or not quiet or checkup["problems"]:
        _print_json(checkup) if json else print(format_checkup(checkup))
    return 1 if checkup["problems"] else 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
