"""The verb `report`: the content of a work directory, or of two side by side, as one HTML file."""

from __future__ import annotations

import base64
import collections
import dataclasses
import html
import importlib.resources
import io
import json
import pathlib
import string
import time
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

from PIL import Image

import rar_jax
from rar_jax.config import flatten, require
from rar_jax.errors import ConfigError
from rar_jax.runs import grids, ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.tools.inspect.workdir import inspect_workdir
from rar_jax.tools.report.curves import COLORS, draw_stage
from rar_jax.tools.report.tags import make_table, make_tag
from rar_jax.weights.stages import STAGES

LEDGER_ROWS = 500  # the last ones
CELL = 52  # pixels; smaller images of a grid are enlarged
PICTURES = ("samples.png", "reconstructions.png")


@dataclasses.dataclass
class Run:
    """What the page shows of a work directory. problems: what could not be read."""

    name: str
    path: pathlib.Path
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    rows: list[ledger.Row]
    problems: list[str]


def write_report(workdirs: Sequence[str | pathlib.Path], out: pathlib.Path | None = None) -> pathlib.Path:
    """Write the page of one work directory, or of two side by side. Return its file.

    Args:
      out: the HTML file; default report.html in the first work directory.

    Raises: ConfigError if one is not a work directory, there are more than two, or the file cannot be written.
    """
    require(1 <= len(workdirs) <= 2, f"{len(workdirs)} work directories: give one, or two to compare")
    paths = [pathlib.Path(path) for path in workdirs]
    out = out or paths[0] / "report.html"
    names = [path.resolve().name for path in paths]
    runs = [
        _read_run(path, name if len(set(names)) == len(names) else str(path))
        for path, name in zip(paths, names, strict=True)
    ]
    template = (importlib.resources.files("rar_jax.tools.report") / "page.html").read_text(encoding="utf-8")
    title = html.escape(" | ".join(run.name for run in runs))
    body = tostring(make_page(runs), encoding="unicode", method="html")
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        temporary.write_text(string.Template(template).substitute(title=title, body=body), "utf-8", "backslashreplace")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another file with --out") from error
    return out


def make_page(runs: Sequence[Run]) -> Element:
    """Make the body of the page."""
    sections = {
        "Overview": [_side_by_side(runs, _make_overview)],
        "Curves": list(_make_curves(runs)),
        "Samples": [
            _side_by_side(runs, lambda run: [grid for stage in STAGES[::-1] if (grid := _make_grid(run, stage))])
        ],
        "Final pictures": [
            _side_by_side(runs, lambda run: [p for name in PICTURES if (p := _make_picture(run, name))])
        ],
        "Scores": list(_make_scores(runs)),
        "Config": list(_make_config(runs)),
        "Environment": [_side_by_side(runs, _make_environment)],
        "Ledger": [_side_by_side(runs, lambda run: [_make_ledger(run)])],
    }
    # Last, since the other sections add to the problems.
    sections["Overview"].extend(make_tag("p", text, class_="problem") for run in runs for text in run.problems)
    links = [make_tag("a", name, href=f"#{name}") for name in sections]
    made = f"made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by rar_jax {rar_jax.__version__}"
    title = make_tag("h1", " | ".join(run.name for run in runs))
    return make_tag(
        "main",
        title,
        make_tag("nav", *links),
        *(make_tag("section", make_tag("h2", name), *content, id=name) for name, content in sections.items()),
        make_tag("p", made, class_="note"),
    )


def _read_run(path: pathlib.Path, name: str) -> Run:
    require(path.is_dir(), f"{path} is not a folder: give the --workdir of rar-jax run")
    config = Workdir(path).read_config()
    summary = inspect_workdir(str(path), max_problems=100, verify=False, quiet=True)
    problems = [f"{row['name']}: {row['reason']}" for row in summary["problems"]]
    try:
        metrics = read_metrics(path)
    except ValueError:  # one of the problems
        metrics = []
    return Run(name, path, config, summary, metrics, ledger.read(path), problems)


def _side_by_side(runs: Sequence[Run], make: Any) -> Element:
    """A card for each run, with what `make` makes of it."""
    cards = []
    for run in runs:
        content = make(run) or [make_tag("p", "Nothing yet.", class_="note")]
        cards.append(make_tag("div", make_tag("h3", run.name) if len(runs) > 1 else None, *content, class_="card"))
    return make_tag("div", *cards, class_="side")


def _make_overview(run: Run) -> list[Element]:
    summary = run.summary
    state = "running" if summary["running"] else "finished" if summary["finished"] else "not finished"
    lines = [make_tag("p", f"{state}, experiment {summary['experiment']}, {run.path}", class_="note")]
    for stage, found in summary["stages"].items():
        last = max((row["step"] for row in run.metrics if row["stage"] == stage), default=0)
        share = min(1.0, last / found["steps"]) if found["steps"] else float(bool(found["checkpoints"]))
        text = f"{stage}: step {last} of {found['steps']}" if found["steps"] else f"{stage}: from existing weights"
        lines += [make_tag("div", text), _make_bar({COLORS[0]: share})]
    seconds = {kind: s for kind, s in summary["seconds"].items() if kind != "wall"}
    if wall := sum(seconds.values()):
        hues = dict(zip((*ledger.KINDS, "lost", "stopped"), COLORS, strict=True))
        legend = [
            make_tag("span", make_tag("i", style=f"background: {hues[kind]}"), f"{kind} {s:,.0f} s ({s / wall:.1%})")
            for kind, s in seconds.items()
        ]
        lines += [make_tag("div", f"time: {wall:,.0f} s, goodput {summary['goodput']:.1%}")]
        lines += [
            _make_bar({hues[kind]: s / wall for kind, s in seconds.items()}),
            make_tag("div", *legend, class_="legend"),
        ]
    events = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in summary["events"].items())
    lines.append(make_tag("p", events, class_="note"))
    if summary["last_stop"] not in (None, "done"):
        lines.append(make_tag("p", f"last stop: {summary['last_stop']}", class_="problem"))
    return [*lines, make_tag("p", f"next: {summary['next']}", class_="note")]


def _make_bar(shares: dict[str, float]) -> Element:
    parts = [make_tag("i", style=f"width: {share:.2%}; background: {color}") for color, share in shares.items()]
    return make_tag("div", *parts, class_="bar")


def _make_curves(runs: Sequence[Run]) -> Iterator[Element]:
    for stage in STAGES[::-1]:
        if panels := draw_stage([(run.name, run.metrics) for run in runs], stage):
            yield make_tag("h3", stage)
            yield make_tag("div", *panels, class_="panels")


# ---------------------------------------------------------------- images


def _make_grid(run: Run, stage: str) -> Element | None:
    """The grids of a stage with a slider over the steps. Grids of another layout than the newest are left out."""
    shown: list[tuple[int, str]] = []
    newest: Any = None
    for step in reversed(grids.steps(folder := run.path / "grids" / stage)):
        path = folder / f"{step}.png"
        try:
            grid = grids.load(path)
        except ValueError as error:
            run.problems.append(str(error))
            continue
        newest = newest or grid
        if (grid.rows, grid.columns, grid.images.shape) == (newest.rows, newest.columns, newest.images.shape):
            shown.insert(0, (step, _encode_uri(path.read_bytes())))
    if newest is None:
        return None
    height, width = (size * max(1, round(CELL / min(newest.images.shape[2:4]))) for size in newest.images.shape[2:4])
    last, size = len(shown) - 1, f"width: {width * len(newest.columns)}px; height: {height * len(newest.rows)}px"
    rows, columns = ([make_tag("span", name, title=name) for name in names] for names in (newest.rows, newest.columns))
    images = [make_tag("img", src=uri, alt=f"step {step}", style=size) for step, uri in shown]
    for image in images[:-1]:
        image.set("hidden", "")
    cells = [
        make_tag("span"),
        make_tag("div", *(columns if any(newest.columns) else ()), class_="columns", style=size.split(";")[0]),
        make_tag("div", *rows, class_="rows"),
        make_tag("div", *images),
    ]
    slider = make_tag("input", type="range", min=0, max=last, value=last, aria_label="step")
    controls = make_tag("div", slider, make_tag("output", f"step {shown[-1][0]}"))
    return make_tag("div", make_tag("h3", stage), controls, make_tag("div", *cells, class_="cells"), class_="grid")


def _make_picture(run: Run, name: str) -> Element | None:
    path = run.path / name
    if not path.is_file():
        return None
    data = path.read_bytes()
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, ValueError, SyntaxError) as error:
        run.problems.append(f"{path} cannot be read ({error}): remove it")
        return None
    return make_tag("div", make_tag("h3", name), make_tag("img", src=_encode_uri(data), alt=name, class_="picture"))


def _encode_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# ---------------------------------------------------------------- tables


def _make_scores(runs: Sequence[Run]) -> Iterator[Element]:
    """Each result file: its numbers, and what they were made from and on. Rows that differ between runs are marked."""
    results: dict[str, list[dict[str, Any]]] = collections.defaultdict(lambda: [{} for _ in runs])
    for i, run in enumerate(runs):
        for path in [run.path / "result.json", *sorted((run.path / "evaluation").rglob("result.json"))]:
            try:
                results[str(path.relative_to(run.path))][i] = flatten(json.loads(path.read_text()))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, AttributeError) as error:
                run.problems.append(f"{path} cannot be read ({error}): remove it, and run the same command again")
    for file, found in results.items():
        keys = [key for key in dict.fromkeys(key for result in found for key in result) if key != "seconds"]
        facts = [key for key in keys if key in ("n", "reference") or key.startswith(("made_from.", "made_on."))]
        # result.json repeats the scores of evaluation/, which have other conditions, at its top level.
        numbers = [
            key for key in keys if key not in facts and not (file == "result.json" and "_n" in key and "." not in key)
        ]
        names = [run.name for run in runs] if len(runs) > 1 else [""]

        def table(head: str, keys: list[str], found: Any = found, names: list[str] = names) -> Element:
            return make_table(
                [head, *names], [[key, *(each.get(key) for each in found)] for key in keys], mark=head == "depends on"
            )

        tables = make_tag("div", table("metric", numbers), table("depends on", facts), class_="side")
        yield make_tag("div", make_tag("h3", file), tables, class_="card", data_file=file)


def _make_config(runs: Sequence[Run]) -> Iterator[Element]:
    configs = [flatten(run.config) for run in runs]
    rows = [
        [key, *(config.get(key) for config in configs)]
        for key in dict.fromkeys(key for each in configs for key in each)
    ]
    head = ["key", *(run.name for run in runs)] if len(runs) > 1 else ["key", ""]
    if len(runs) > 1:
        differing = [row for row in rows if row[1] != row[2]]
        yield make_tag(
            "div", make_tag("h3", "What differs"), make_table(head, differing), class_="card", data_file="config"
        )
    yield make_tag(
        "details", make_tag("summary", "All of the resolved config"), make_table(head, rows, mark=True), class_="card"
    )


def _make_environment(run: Run) -> list[Element]:
    found = []
    for row in run.rows:
        keys = ("device", "devices", "processes", "host", "versions")
        facts = flatten({key: row[key] for key in keys if key in row})
        if row["event"] == "start" and facts not in found:
            found.append(facts)
    return [make_table(["", ""], facts.items()) for facts in found]


def _make_ledger(run: Run) -> Element:
    rows = []
    for row in run.rows[-LEDGER_ROWS:]:
        known = ("time", "run", "event", "seconds", "versions")
        details = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known and value is not None)
        spent = ", ".join(f"{kind} {s:g} s" for kind, s in row.get("seconds", {}).items())
        rows.append(
            [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"])), row["run"], row["event"], details, spent]
        )
    return make_table(["time (UTC)", "run", "event", "details", "time since the row before"], rows)
