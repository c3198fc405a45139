"""`inspect` of a work directory: time spent, progress, checkpoints, and the next command to run."""

from __future__ import annotations

import pathlib
import time
from typing import Any

from rar_jax.errors import CheckpointError
from rar_jax.experiment import STAGES
from rar_jax.runs import ledger
from rar_jax.runs.bucket import BucketPath, Path, is_url
from rar_jax.runs.checkpoint import best_steps, list_steps
from rar_jax.runs.lock import read_holder
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.manifest import verify_manifest
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.tools.inspect.layout import LISTED, Summary

Problem = dict[str, str]


def is_workdir(target: str) -> bool:
    """Whether it is a folder that `run` or `train` has made, or a bucket URL."""
    return is_url(target) or (pathlib.Path(target) / "config.json").is_file()


def inspect_workdir(target: str, *, max_problems: int = LISTED, verify: bool = True, quiet: bool = False) -> Summary:
    """Verify the checkpoints of a work directory, and summarize its ledger and metrics. Nothing is changed.

    Args:
      verify: read every checkpoint, which takes a while for large ones.

    Raises: ConfigError if config.json is damaged.
    """
    workdir = Workdir(target).fetch()
    config, rows, writer = workdir.read_config(), ledger.read_ledger(workdir.path), read_holder(workdir.root)
    damaged: list[str] = []
    metrics = read_metrics(workdir.path, problems=damaged)
    problems: list[Problem] = [{"name": "metrics", "reason": reason} for reason in damaged]
    stages = {}
    for stage in STAGES:
        recipe = config.get("train" if stage == "generator" else f"{stage}_train")
        if recipe or workdir.checkpoints(stage).is_dir():
            own = [row for row in metrics if row["stage"] == stage]
            stages[stage] = {
                "steps": (recipe or {}).get("steps", 0),
                "last": _find_last(own, ("loss", "grad_norm", "skipped")),
                "last_validation": _find_last(own, ("validation/",)),
                "checkpoints": _inspect_checkpoints(workdir.checkpoints(stage), problems, verify, quiet),
            }
    seconds = ledger.goodput(rows, signs=[row["time"] for row in metrics], now=time.time() if writer else None)
    events = [row["event"] for row in rows]
    stops = [row["reason"] for row in rows if row["event"] == "stop"]
    killed = events.count("start") - len(stops) - bool(writer)
    named = {"starts": "start", "skipped_updates": "skipped", "rollbacks": "rollback", "failed_saves": "save_failed"}
    last_stop = None if writer or not rows else stops[-1] if events[-1] == "stop" else "killed (no exit record)"
    summary = {
        "kind": "work directory",
        "name": target,
        "experiment": config.get("name"),
        "running": writer,
        "goodput": sum(seconds[kind] for kind in ledger.PRODUCTIVE) / seconds["wall"] if seconds["wall"] else None,
        "seconds": {kind: round(s, 1) for kind, s in seconds.items() if s > 0},
        "events": {name: events.count(event) for name, event in named.items()}
        | {"preempted": stops.count("preempted"), "killed": killed},
        "last_stop": last_stop,
        "command": next((row.get("command") for row in reversed(rows) if row["event"] == "start"), None),
        "stages": stages,
        "finished": workdir.result.is_file(),
        "num_problems": len(problems),
        "problems": problems[:max_problems],
    }
    return {**summary, "next": _suggest_next(summary)}


def _find_last(rows: list[dict[str, Any]], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The metrics with such names in the last row that has any, with its step; {} if there is none."""
    for row in reversed(rows):
        if values := {name: value for name, value in row.items() if name.startswith(prefixes)}:
            return {"step": row["step"], **values}
    return {}


def _inspect_checkpoints(folder: Path, problems: list[Problem], verify: bool, quiet: bool) -> list[dict[str, Any]]:
    steps = list_steps(folder)[::-1]
    best, rows = best_steps(folder), []
    for step in track_progress(
        steps, description=f"verify {folder.name}", unit="checkpoints", quiet=quiet or not steps
    ):
        state = "verified" if verify else "not verified"
        try:
            if verify:
                verify_manifest(folder / str(step))
        except CheckpointError as error:
            state = "bad"
            problems.append({"name": f"{folder.name} step {step}", "reason": str(error)})
        files = [] if isinstance(folder, BucketPath) else (folder / str(step)).rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        best_by = [name for name, found in best.items() if found["step"] == step]
        rows.append({"step": step, "state": state, "bytes": size, "best_by": best_by})
    return rows


def _suggest_next(summary: Summary) -> str:
    """The command to run next, or why there is none."""
    name, stop = summary["name"], summary["last_stop"] or ""
    checkpoints = [(stage, row) for stage, found in summary["stages"].items() for row in found["checkpoints"]]
    good = [f"{stage} step {row['step']}" for stage, row in checkpoints if row["state"] != "bad"]
    if summary["running"]:
        return "nothing to do: it is running"
    if "updates in a row were bad" in stop:
        return f"training gave up: see {name}/dump and {name}/ledger.jsonl, then train in a new --workdir"
    if summary["finished"]:
        return f"rar-jax sample --weights {name} --out PICTURES"
    if checkpoints and not good:
        return "no checkpoint is good: restore the files listed above from a copy, or use a new --workdir"
    # The command of a verb that is done would do nothing again.
    command = None if stop == "done" else summary["command"]
    command = (
        command or f"rar-jax run --config {summary['experiment']} --workdir {name}, with the same --config.* flags"
    )
    room = "free space on the disk; then " if "the disk is full" in stop else ""
    return f"{room}{command}    (continues from {good[-1] if good else 'the beginning'})"
