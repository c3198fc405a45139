"""The verb `report`: what a work directory holds, as one HTML file that needs nothing else. Two of them side by side.

All text that comes from files goes into the page as JSON, and page/page.js shows it as text, never as HTML.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

import rar_jax
from rar_jax.config import require
from rar_jax.errors import ConfigError
from rar_jax.experiment import STAGES
from rar_jax.runs import grids, ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir, with_added
from rar_jax.tools.inspect.workdir import inspect_workdir
from rar_jax.tools.report.tables import curves, flat, scores, side_by_side

PICTURES = ("samples.png", "reconstructions.png")
LEDGER_ROWS = 500  # the last ones
LARGE = 1_000_000  # bytes; above that a picture goes into the page as WebP
MOST_WORKDIRS = 2


def report(workdirs: Sequence[str | pathlib.Path], out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of one work directory, or of two side by side. Nothing else is changed, whatever state they are in.

    Args:
      out: the HTML file; default report.html in the first work directory.

    Returns: the file.
    Raises: ConfigError if one is no work directory, there are more than two, or the file cannot be written.
    """
    require(1 <= len(workdirs) <= MOST_WORKDIRS, f"{len(workdirs)} work directories: give one, or two to compare")
    out = out or pathlib.Path(workdirs[0]) / "report.html"
    require(not out.is_dir(), f"--out {out} is a folder: give a file, such as {out / 'report.html'}")
    runs = [read_run(pathlib.Path(path)) for path in workdirs]
    for run, name in zip(runs, _names([pathlib.Path(path).resolve() for path in workdirs]), strict=True):
        run["name"] = name
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    compared = side_by_side(*(run["scores"] for run in runs)) if len(runs) > 1 else []
    text = page({"made": made, "version": rar_jax.__version__, "runs": runs, "compared": compared})
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): give another place with --out FILE") from error
    return out


def page(data: dict[str, Any]) -> str:
    """The HTML of what `read_run` has read."""
    folder = importlib.resources.files("rar_jax.programs") / "page"
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # No "<" reaches the parser from inside the data, so nothing in it can end the script element.
    data_text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    title = html.escape(" | ".join(run["name"] for run in data["runs"]))
    marks = {"title": title, "css": parts["css"], "js": parts["js"], "data": data_text}
    return re.sub(r"\{(title|css|js|data)\}", lambda mark: marks[mark[1]], parts["html"])


def read_run(path: pathlib.Path) -> dict[str, Any]:
    """What the page shows of a work directory; "notes" says what is not there yet, "problems" what could not be read.

    Raises: ConfigError if it is no work directory.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder: give the --workdir of rar-jax run")
    workdir = Workdir(path)
    config = workdir.read_config()
    summary = inspect_workdir(str(path), problems=100, verify=False, quiet=True)
    problems = [f"{name}: {reason}" for name, reason in summary["problems"]["first"]]
    metrics = read_metrics(path)
    events = ledger.read(path)
    run = {
        "name": path.resolve().name,  # `report` says more of two that have the same
        "path": str(path),
        "summary": summary,
        "state": _state(summary),
        "curves": curves(metrics),
        "grids": [grid for stage in STAGES if (grid := _grids(path / "grids" / stage, stage, problems))],
        "pictures": [told for name in PICTURES if (told := _picture(path / name, problems))],
        "scores": scores(path, problems),
        "config": flat(with_added(config)),
        "environment": _environment(events),
        "ledger": {"rows": events[-LEDGER_ROWS:], "of": len(events)},
        "problems": problems,
    }
    return {**run, "notes": _notes(run)}


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """As much of the ends of absolute paths as tells them apart."""
    names = [path.name for path in paths]
    for parts in range(2, max(len(path.parts) for path in paths) + 1):
        if len(set(names)) == len(names):
            break
        names = [str(pathlib.Path(*path.parts[-parts:])) for path in paths]
    return names


def _state(summary: dict[str, Any]) -> str:
    if summary["running"]:
        return "running"
    if summary["last_stop"] not in (None, "done"):
        return "stopped"
    return "done" if summary["result"] else "unfinished"


def _notes(run: dict[str, Any]) -> dict[str, str]:
    """A sentence for each part of the page that has nothing to show."""
    said = {
        "curves": "No step has been told yet: metrics.jsonl is not there, or empty.",
        "grids": "No samples yet: they are drawn at each evaluation (config.evaluate.live_grid, and train.eval_every).",
        "pictures": "No final pictures yet: the run draws samples.png and reconstructions.png at its end.",
        "scores": "No scores yet: result.json is written at the end of a run, evaluation/ by rar-jax evaluate.",
        "environment": "The ledger says of no start what it ran on.",
        "ledger": "No ledger yet: nothing has run here.",
    }
    there = {name: run[name]["of"] if name == "ledger" else len(run[name]) for name in said}
    return {name: text for name, text in said.items() if not there[name]}


# ---------------------------------------------------------------- images


def _grids(folder: pathlib.Path, stage: str, problems: list[str]) -> dict[str, Any] | None:
    """The grids of a stage by step, of the layout of the newest; others are of another config, and left out."""
    shown: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    for step in reversed(grids.list_grid_steps(folder)):
        path = folder / f"{step}.png"
        try:
            grid = grids.load_grid(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        this = {"rows": grid.rows, "columns": grid.columns, "cell": grid.images.shape[2:4]}
        if this == (layout := layout or this):
            shown.append({"step": step, "image": _uri(path.read_bytes(), "png")})
    return {"stage": stage, **layout, "steps": shown[::-1]} if shown else None


def _picture(path: pathlib.Path, problems: list[str]) -> dict[str, str] | None:
    """{"name", "image"}; None if it is not there, or no picture, which `problems` then says."""
    if not path.is_file():
        return None
    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.load()
            if small := path.stat().st_size <= LARGE:
                file.write(path.read_bytes())
            else:
                image.save(file, "webp", quality=90)
    except (OSError, ValueError, SyntaxError) as error:  # the last is Pillow's of a damaged PNG
        problems.append(f"{path} cannot be read ({error}): remove it")
        return None
    return {"name": path.name, "image": _uri(file.getvalue(), "png" if small else "webp")}


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---------------------------------------------------------------- where it ran


def _environment(events: list[ledger.Row]) -> list[dict[str, Any]]:
    """What the starts ran on, each once, in the order of the first."""
    found: list[dict[str, Any]] = []
    for row in events:
        if row["event"] == "start" and "versions" in row:
            this = {name: row.get(name) for name in ("device", "devices", "processes", "host", "versions")}
            if this not in found:
                found.append(this)
    return found
