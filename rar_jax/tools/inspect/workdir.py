"""`inspect` of a work directory: where its time went, how far it is, which checkpoints are good, and what to do next."""

from __future__ import annotations

import pathlib
import time
from typing import Any

from rar_jax.errors import CheckpointError
from rar_jax.experiment import STAGES
from rar_jax.runs import ledger
from rar_jax.runs import lock as lease
from rar_jax.runs.checkpoint import best_steps
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.manifest import verify_manifest
from rar_jax.runs.object_store import is_url
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.tools.inspect.text import LISTED, Report, problem_lines, readable


def is_workdir(what: str) -> bool:
    """Whether it is a folder that `run` or `train` has made, or a place in a bucket."""
    return is_url(what) or (pathlib.Path(what) / "config.json").is_file()


def inspect_workdir(what: str, *, problems: int = LISTED, verify: bool = True, quiet: bool = False) -> Report:
    """Verifies every checkpoint of a work directory, and sums up its ledger and metrics. Nothing is changed.

    Args:
      verify: read every checkpoint, which takes a while for large ones; else none is said to be bad.

    Returns: a report; "seconds" is `ledger.goodput`, "stages" for each stage its last rows and checkpoints, "next" what to do.
    Raises: ConfigError if config.json is damaged.
    """
    workdir = Workdir(what).fetch()
    config, rows = workdir.read_config(), ledger.read(workdir.path)
    holder = _writer(workdir)
    damaged: list[str] = []
    metrics = read_metrics(workdir.path, problems=damaged)
    found = [["metrics", problem] for problem in damaged]
    stages = {}
    for stage in STAGES:
        if (recipe := _recipe(config, stage)) is None and not workdir.checkpoints(stage).is_dir():
            continue
        told = [row for row in metrics if row["stage"] == stage]
        stages[stage] = {
            "steps": (recipe or {}).get("steps", 0),
            "last": _last(told, lambda name: name in ("loss", "grad_norm", "skipped")),
            "last_validation": _last(
                told, lambda name: name.startswith("validation/") and name.endswith(("loss", "bits", "psnr"))
            ),
            "checkpoints": _checkpoints(workdir.checkpoints(stage), found, verify, quiet),
        }
    seconds = ledger.goodput(rows, signs=[row["time"] for row in metrics], now=time.time() if holder else None)
    counted = {
        name: sum(row["event"] == name for row in rows) for name in ("start", "skipped", "rollback", "save_failed")
    }
    starts, stops = ([row for row in rows if row["event"] == name] for name in ("start", "stop"))
    counted["preempted"] = sum(row["reason"] == "preempted" for row in stops)
    counted["killed"] = len(starts) - len(stops) - bool(holder)
    report = {
        "kind": "work directory",
        "name": what,
        "experiment": config.get("name"),
        "running": holder,
        "seconds": seconds,
        "goodput": sum(seconds[kind] for kind in ledger.PRODUCTIVE) / seconds["wall"] if seconds["wall"] else None,
        "events": counted,
        "last_stop": stops[-1]["reason"] if stops and rows[-1]["event"] == "stop" else None,
        "command": starts[-1].get("command") if starts else None,
        "stages": stages,
        "result": workdir.result.is_file(),
        "problems": {"total": len(found), "first": found[:problems]},
    }
    return {**report, "next": _next(report)}


def tell_workdir(report: Report) -> list[str]:
    """The report of `inspect_workdir` as lines."""
    lines = [f"{report['name']}, a work directory of {report['experiment']}"]
    if holder := report["running"]:
        since = f" since {holder['since']}" if "since" in holder else ""
        lines.append(f"  running    {holder['verb']}, process {holder['pid']} on {holder['host']}{since}")
    seconds, wall = report["seconds"], report["seconds"]["wall"]
    if wall:
        rest = [
            (kind, s)
            for kind, s in sorted(seconds.items(), key=lambda item: -item[1])
            if kind != "wall" and s >= 0.0005 * wall
        ]
        where = ", ".join(f"{kind} {s / wall:.1%}" for kind, s in rest)
        lines.append(f"  goodput    {report['goodput']:.1%} of {wall:,.0f} s: {where}")
    named = {"preempted": "preempted", "killed": "killed", "skipped": "updates left out", "rollback": "rollbacks"}
    named["save_failed"] = "saves without room"
    told = [f"{text} {report['events'][event]}" for event, text in named.items() if report["events"][event]]
    lines.append(f"  runs       {', '.join([str(report['events']['start']), *told])}")
    if not report["running"] and report["events"]["start"]:
        lines.append(f"  last stop  {report['last_stop'] or 'killed: it left no word'}")
    for name, stage in report["stages"].items():
        last = stage["last"]
        step = f"step {last['step']} of {stage['steps']}" if last else "no steps told"
        lines.append(f"  {name:10} {step}{_numbers(last)}")
        if validation := stage["last_validation"]:
            lines.append(f"    validation at step {validation['step']}{_numbers(validation)}")
        for found in stage["checkpoints"]:
            best = f", best by {', '.join(found['best_by'])}" if found["best_by"] else ""
            lines.append(f"    checkpoint {found['step']}: {found['state']}, {readable(found['bytes'])}{best}")
    lines += problem_lines(report)
    return [*lines, f"  next       {report['next']}"]


def _writer(workdir: Workdir) -> dict[str, Any] | None:
    """Who works in the folder, or else who said last that it writes to the bucket, with its "beat"."""
    path = workdir.path / lease.NAME
    if (holder := lease.read(path)) and lease.alive(path, holder):
        return holder
    return workdir.mirror.writer() if workdir.mirror else None


def _recipe(config: dict[str, Any], stage: str) -> dict[str, Any] | None:
    return config.get({"tokenizer": "tokenizer_train", "classifier": "classifier_train", "generator": "train"}[stage])


def _last(rows: list[dict[str, Any]], wanted: Any) -> dict[str, Any]:
    """The last row that has such numbers, and its step; {} if there is none."""
    for row in reversed(rows):
        if numbers := {name: value for name, value in row.items() if wanted(name)}:
            return {"step": row["step"], **numbers}
    return {}


def _numbers(values: dict[str, Any]) -> str:
    shown = [
        f"{name.removeprefix('validation/')} {'none' if x is None else f'{x:.4g}'}"
        for name, x in values.items()
        if name != "step"
    ]
    return ": " + ", ".join(shown) if shown else ""


def _checkpoints(folder: pathlib.Path, found: list[list[str]], verify: bool, quiet: bool) -> list[dict[str, Any]]:
    steps = sorted(int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdigit())
    best = best_steps(folder)
    told = []
    for step in track_progress(
        steps, description=f"verify {folder.name}", unit="checkpoints", quiet=quiet or not steps
    ):
        state = "verified" if verify else "not verified"
        try:
            if verify:
                verify_manifest(folder / str(step))
        except CheckpointError as error:
            state = "bad"
            found.append([f"{folder.name} step {step}", str(error)])
        size = sum(p.stat().st_size for p in (folder / str(step)).rglob("*") if p.is_file())
        marked = [name for name, marked in best.items() if marked["step"] == step]
        told.append({"step": step, "state": state, "bytes": size, "best_by": marked})
    aside = [p for p in folder.glob("*.*") if p.is_dir()]
    found += [[f"{folder.name}", f"{p.name} was set aside: look at it, then remove it"] for p in sorted(aside)]
    return told


def _next(report: Report) -> str:
    """One sentence for a person who has just come."""
    name = report["name"]
    stop = report["last_stop"] or ""
    # A verb that is done would do nothing again.
    again = report["command"] if stop != "done" else None
    again = again or f"rar-jax run --config {report['experiment']} --workdir {name}, and what else was given"
    if holder := report["running"]:
        if "beat" not in holder:
            return "it runs: nothing to do"
        return f"it runs on {holder['host']}, or died without a word: leave it alone; a start would wait a minute for a sign of life"
    if "updates in a row were bad" in stop:
        return f"it gave up: look into {name}/dump and {name}/ledger.jsonl, then train in a new --workdir"
    if report["result"]:
        return f"it is done: rar-jax sample --weights {name} --out PICTURES"
    checkpoints = [
        (stage, found["step"], found["state"])
        for stage, told in report["stages"].items()
        for found in told["checkpoints"]
    ]
    good = [f"{stage} {step}" for stage, step, state in checkpoints if state == "verified"]
    if len(good) < len(checkpoints) and not good:
        return "no checkpoint is good: bring the files named above back from a copy, or move the folder away"
    room = "make room on the disk; then " if "the disk is full" in stop else ""
    return f"{room}{again}    (goes on from {good[-1] if good else 'the beginning'})"
