"""The verb `report`: the content of a work directory, or of two side by side, as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import json
import pathlib
import string
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rar_jax
from rar_jax.config import flatten, require
from rar_jax.errors import ConfigError
from rar_jax.experiment import STAGES
from rar_jax.runs import grids, ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.tools.inspect.workdir import inspect_workdir
from rar_jax.tools.report.curves import draw_curves
from rar_jax.tools.report.tags import Tag, make_html_table, make_tag

LEDGER_ROWS = 500  # the last ones
CELL = 52  # pixels; smaller images of a grid are enlarged
PICTURES = ("samples.png", "reconstructions.png")


@dataclasses.dataclass
class Run:
    """What the page shows of a work directory. rows: the ledger. problems: what could not be read."""

    name: str
    path: pathlib.Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    rows: list[ledger.Row]
    problems: list[str]


def write_report(workdirs: Sequence[str | pathlib.Path], out: pathlib.Path | None = None) -> pathlib.Path:
    """Write the page of one work directory, or of two side by side, and return its file.

    Args:
      out: the HTML file; default report.html in the first work directory.

    Raises: ConfigError if one is not a work directory, there are more than two, or the file cannot be written.
    """
    require(len(workdirs) <= 2, f"{len(workdirs)} work directories: give one, or two to compare")
    paths = [pathlib.Path(path) for path in workdirs]
    out = out or paths[0] / "report.html"
    unique = len({path.resolve().name for path in paths}) == len(paths)
    runs = [read_run(path, path.resolve().name if unique else str(path)) for path in paths]
    template = (importlib.resources.files("rar_jax.tools.report") / "page.html").read_text(encoding="utf-8")
    title = make_tag("title", " | ".join(run.name for run in runs))
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        page = string.Template(template).substitute(title=title, body=make_body(runs))
        temporary.write_text(page, "utf-8", "backslashreplace")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another file with --out") from error
    return out


def read_run(path: pathlib.Path, name: str) -> Run:
    """Read a work directory in any state. Raises: ConfigError if it is none."""
    require(path.is_dir(), f"{path} is not a folder: give the --workdir of rar-jax run")
    config = Workdir(path).read_config()
    summary = inspect_workdir(str(path), max_problems=100, verify=False, quiet=True)
    problems = [f"{row['name']}: {row['reason']}" for row in summary["problems"]]
    return Run(name, path, config, summary, read_metrics(path), ledger.read_ledger(path), problems)


def make_body(runs: Sequence[Run]) -> Tag:
    """Make the body of the page."""
    sections = {
        "Curves": list(_make_curves(runs)),
        "Samples": _make_cards(runs, lambda run: [_make_grid(run, stage) for stage in STAGES[::-1]]),
        "Final pictures": _make_cards(runs, lambda run: [_make_picture(run.path / name) for name in PICTURES]),
        "Scores": list(_make_scores(runs)),
        "Config": list(_make_config(runs)),
        "Environment": _make_cards(runs, _make_environment),
        "Ledger": _make_cards(runs, _make_ledger),
    }
    # The overview is made last, since the other sections add to the problems.
    sections = {"Overview": _make_cards(runs, _make_overview), **sections}
    parts = [make_tag("section", make_tag("h2", name), *content, id=name) for name, content in sections.items()]
    made = f"made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by rar_jax {rar_jax.__version__}"
    heading = make_tag("h1", " | ".join(run.name for run in runs))
    links = make_tag("nav", *(make_tag("a", name, href=f"#{name}") for name in sections))
    return make_tag("main", heading, links, *parts, make_tag("p", made, class_="note"))


def _make_cards(runs: Sequence[Run], make: Callable[[Run], Sequence[Tag | None]]) -> list[Tag]:
    """A card for each run, with the elements that `make` returns."""
    cards = []
    for run in runs:
        content = [element for element in make(run) if element] or [make_tag("p", "Nothing yet.", class_="note")]
        cards.append(make_tag("div", make_tag("h3", run.name) if len(runs) > 1 else None, *content, class_="card"))
    return [make_tag("div", *cards, class_="side")]


def _make_overview(run: Run) -> list[Tag]:
    summary = run.summary
    state = "running" if summary["running"] else "finished" if summary["finished"] else "not finished"
    shown = {"state": state, "last stop": summary["last_stop"], "next": summary["next"], "folder": run.path}
    facts = [["experiment", summary["experiment"]], *shown.items(), *summary["events"].items()]
    stages = []
    for stage, found in summary["stages"].items():
        last = max((row["step"] for row in run.metrics if row["stage"] == stage), default=0)
        done = f"step {last} of {found['steps']}" if found["steps"] else "from existing weights"
        stages.append([stage, done, make_tag("progress", value=last, max=found["steps"]) if found["steps"] else None])
    spent, wall = summary["seconds"], summary["seconds"].get("wall", 0)
    kinds = [
        [kind, f"{s:,.0f} s", make_tag("progress", value=s, max=wall)] for kind, s in spent.items() if kind != "wall"
    ]
    goodput = [["total", f"{wall:,.0f} s", f"goodput {summary['goodput']:.1%}"]] if wall else []
    tables = [make_html_table(["stage", "", ""], stages), make_html_table(["time spent", "", ""], [*kinds, *goodput])]
    problems = [make_tag("p", text, class_="problem") for text in run.problems]
    return [*problems, make_tag("div", make_html_table(["run", ""], facts), make_tag("div", *tables), class_="side")]


def _make_curves(runs: Sequence[Run]) -> Iterator[Tag]:
    for stage in STAGES[::-1]:
        if panels := draw_curves({run.name: [row for row in run.metrics if row["stage"] == stage] for run in runs}):
            yield make_tag("h3", stage)
            yield make_tag("div", *panels, class_="panels")


def _make_grid(run: Run, stage: str) -> Tag | None:
    """The grids of a stage with a slider over the steps. Grids of another layout than the newest are left out."""
    shown: dict[int, bytes] = {}
    newest = None
    for step in reversed(grids.list_grid_steps(run.path / "grids" / stage)):
        path = run.path / "grids" / stage / f"{step}.png"
        try:
            grid = grids.load_grid(path)
        except ValueError as error:
            run.problems.append(str(error))
            continue
        newest = newest or grid
        if (grid.rows, grid.columns, grid.images.shape) == (newest.rows, newest.columns, newest.images.shape):
            shown = {step: path.read_bytes(), **shown}
    if newest is None:
        return None
    scale = max(1, round(CELL / min(newest.images.shape[2:4])))
    height, width = (scale * size for size in newest.sheet().shape[:2])
    rows, columns = ([make_tag("span", name, title=name) for name in names] for names in (newest.rows, newest.columns))
    images = [
        _make_image(png, alt=f"step {step}", width=width, height=height, hidden=None if step == max(shown) else "")
        for step, png in shown.items()
    ]
    named = columns if any(newest.columns) else ()
    top = make_tag("span"), make_tag("div", *named, class_="columns", style=f"width: {width}px")
    cells = make_tag("div", *top, make_tag("div", *rows, class_="rows"), make_tag("div", *images), class_="cells")
    last = len(shown) - 1
    slider = make_tag("input", type="range", min=0, max=last, value=last, aria_label="step")
    return make_tag(
        "div", make_tag("h3", stage), slider, make_tag("output", f"step {max(shown)}"), cells, class_="grid"
    )


def _make_picture(path: pathlib.Path) -> Tag | None:
    return _make_image(path.read_bytes(), alt=path.name, class_="picture") if path.is_file() else None


def _make_image(png: bytes, **attributes: Any) -> Tag:
    return make_tag("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", **attributes)


def _make_scores(runs: Sequence[Run]) -> Iterator[Tag]:
    """Each result file: its scores, and what they depend on. What differs between two runs is marked."""
    results: dict[str, list[dict[str, Any]]] = {}
    for i, run in enumerate(runs):
        for path in (run.path / "result.json", *sorted((run.path / "evaluation").rglob("result.json"))):
            try:
                result = flatten(json.loads(path.read_text())) if path.is_file() else {}
            except (OSError, ValueError, AttributeError) as error:
                run.problems.append(f"{path} cannot be read ({error}): remove it, and run the same command again")
                continue
            results.setdefault(str(path.relative_to(run.path)), [{} for _ in runs])[i] = result
    for file, found in results.items():
        keys = dict.fromkeys(key for result in found for key in result if key != "seconds")
        rows = [[key, *(result.get(key) for result in found)] for key in keys]
        facts = [row for row in rows if row[0].startswith(("made_from.", "made_on.")) or row[0] in ("n", "reference")]
        # The top level of result.json repeats scores of evaluation/result.json, which depend on other things.
        repeated = [row for row in rows if file == "result.json" and "_n" in row[0] and "." not in row[0]]
        scores = [row for row in rows if row not in facts and row not in repeated]
        names = [run.name for run in runs] if len(runs) > 1 else [""]
        tables = make_html_table(["score", *names], scores), make_html_table(["depends on", *names], facts, mark=True)
        yield make_tag("div", make_tag("h3", file), make_tag("div", *tables, class_="side"), class_="card")


def _make_config(runs: Sequence[Run]) -> Iterator[Tag]:
    configs = [flatten(run.config) for run in runs]
    rows = [[key, *(config.get(key) for config in configs)] for key in dict.fromkeys(key for x in configs for key in x)]
    head = ["key", *(run.name for run in runs)] if len(runs) > 1 else ["key", ""]
    if len(runs) > 1:
        yield make_tag(
            "div", make_html_table(head, [row for row in rows if row[1] != row[2]]), class_="card", id="differences"
        )
    yield make_tag(
        "details", make_tag("summary", "resolved config"), make_html_table(head, rows, mark=True), class_="card"
    )


def _make_environment(run: Run) -> list[Tag]:
    keys = ("device", "devices", "processes", "host", "versions")
    starts = [flatten({key: row[key] for key in keys if key in row}) for row in run.rows if row["event"] == "start"]
    return [make_html_table(["", ""], facts.items()) for i, facts in enumerate(starts) if facts not in starts[:i]]


def _make_ledger(run: Run) -> list[Tag]:
    rows = []
    for row in run.rows[-LEDGER_ROWS:]:
        known = ("time", "run", "event", "seconds", "versions")
        details = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known and value is not None)
        spent = ", ".join(f"{kind} {s:g} s" for kind, s in row.get("seconds", {}).items())
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"]))
        rows.append([at, row["run"], row["event"], details, spent])
    return (
        [make_html_table(["time (UTC)", "run", "event", "details", "time since the row before"], rows)] if rows else []
    )
