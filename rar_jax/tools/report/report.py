"""The verb `report`: the content of a work directory, or of two side by side, as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import json
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

import rar_jax
from rar_jax.config import flatten, require
from rar_jax.errors import ConfigError
from rar_jax.experiment import STAGES
from rar_jax.runs import grids, ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.runs.workdir import Workdir
from rar_jax.tools.inspect.workdir import inspect_workdir
from rar_jax.tools.report import curves

LEDGER_ROWS = 500  # the last ones
CELL = 52  # pixels; smaller images of a grid are enlarged
PICTURES = ("samples.png", "reconstructions.png")


@dataclasses.dataclass
class Run:
    """What the page shows of a work directory, read in any state. problems: what could not be read."""

    path: pathlib.Path
    name: str
    problems: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.path.is_dir(), f"{self.path} is not a folder: give the --workdir of rar-jax run")
        self.config: dict[str, Any] = flatten(Workdir(self.path).read_config())
        self.metrics: list[Any] = read_metrics(self.path)
        rows = ledger.read_ledger(self.path)
        self._read_summary()
        self.grids: list[dict[str, Any]] = list(filter(None, map(self._read_grids, STAGES[::-1])))
        drawn = [name for name in PICTURES if (self.path / name).is_file()]
        self.pictures: list[tuple[str, str]] = [(name, make_data_url(self.path / name)) for name in drawn]
        keys = ("device", "devices", "processes", "host", "versions")
        starts = [flatten({key: row[key] for key in keys if key in row}) for row in rows if row["event"] == "start"]
        self.environments: list[dict[str, Any]] = [facts for i, facts in enumerate(starts) if facts not in starts[:i]]
        self.ledger: list[list[Any]] = [format_ledger_row(row) for row in rows[-LEDGER_ROWS:]]
        self.results: dict[str, dict[str, Any]] = dict(self._read_results())

    def _read_summary(self) -> None:
        summary = inspect_workdir(str(self.path), max_problems=100, verify=False, quiet=True)
        self.problems += [f"{row['name']}: {row['reason']}" for row in summary["problems"]]
        state = "running" if summary["running"] else "finished" if summary["finished"] else "not finished"
        shown = {"experiment": summary["experiment"], "state": state, "last stop": summary["last_stop"]}
        self.facts: Any = (shown | {"next": summary["next"], "folder": self.path} | summary["events"]).items()
        self.progress: list[tuple[str, str, int, int | None]] = []
        for stage, found in summary["stages"].items():
            last, steps = max((row["step"] for row in self.metrics if row["stage"] == stage), default=0), found["steps"]
            self.progress.append((stage, f"step {last} of {steps}" if steps else "from existing weights", last, steps))
        spent = dict(summary["seconds"])
        wall = spent.pop("wall", 0)
        self.times: list[tuple[str, str, float, float]] = [(kind, f"{s:,.0f} s", s, wall) for kind, s in spent.items()]
        self.goodput: tuple[str, str] | None = (f"{wall:,.0f} s", f"goodput {summary['goodput']:.1%}") if wall else None

    def _read_grids(self, stage: str) -> dict[str, Any] | None:
        """The grids of a stage by step. Grids of another layout than the newest are left out."""
        images: list[tuple[int, str]] = []
        newest = None
        for step in reversed(grids.list_grid_steps(self.path / "grids" / stage)):
            path = self.path / "grids" / stage / f"{step}.png"
            try:
                grid = grids.load_grid(path)
            except ValueError as error:
                self.problems.append(str(error))
                continue
            newest = newest or grid
            if (grid.rows, grid.columns, grid.images.shape) == (newest.rows, newest.columns, newest.images.shape):
                images.insert(0, (step, make_data_url(path)))
        if newest is None:
            return None
        scale = max(1, round(CELL / min(newest.images.shape[2:4])))
        height, width = (scale * size for size in newest.sheet().shape[:2])
        columns = newest.columns if any(newest.columns) else ()
        size = {"width": width, "height": height}
        return {"stage": stage, "images": images, "rows": newest.rows, "columns": columns, **size}

    def _read_results(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in (self.path / "result.json", *sorted((self.path / "evaluation").rglob("result.json"))):
            try:
                if path.is_file():
                    yield str(path.relative_to(self.path)), flatten(json.loads(path.read_text()))
            except (OSError, ValueError, AttributeError) as error:
                self.problems.append(f"{path} cannot be read ({error}): remove it, and run the same command again")


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
    runs = [Run(path, path.resolve().name if unique else str(path)) for path in paths]
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        temporary.write_text(render_page(runs), "utf-8", "backslashreplace")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another file with --out") from error
    return out


def render_page(runs: Sequence[Run]) -> str:
    """Fill the template. Everything is escaped: names from files are never markup."""
    names = [run.name for run in runs]
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"full_text": format_value, "short_text": shorten_hashes}
    template = (importlib.resources.files("rar_jax.tools.report") / "page.html").read_text(encoding="utf-8")
    config = align_rows([run.config for run in runs])
    return env.from_string(template).render(
        title=" | ".join(names),
        names=names if len(runs) > 1 else [""],
        runs=runs,
        curves={
            stage: curves.make_panels({run.name: [row for row in run.metrics if row["stage"] == stage] for run in runs})
            for stage in STAGES[::-1]
        },
        size=curves,
        results=list(_split_results(runs)),
        config=config,
        differences=list(filter(differs, config)),
        differs=differs,
        made=f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by rar_jax {rar_jax.__version__}",
    )


def _split_results(runs: Sequence[Run]) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Each result file, its scores, and what they depend on."""
    for file in dict.fromkeys(file for run in runs for file in run.results):
        rows = [row for row in align_rows([run.results.get(file, {}) for run in runs]) if row[0] != "seconds"]
        facts = [row for row in rows if row[0].startswith(("made_from.", "made_on.")) or row[0] in ("n", "reference")]
        # The top level of result.json repeats scores of evaluation/result.json, which depend on other things.
        repeated = [row for row in rows if file == "result.json" and "_n" in row[0] and "." not in row[0]]
        yield file, [row for row in rows if row not in facts and row not in repeated], facts


def align_rows(tables: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A row for each key: the key, and its value in each table."""
    return [[key, *(table.get(key) for table in tables)] for key in dict.fromkeys(key for x in tables for key in x)]


def differs(row: Sequence[Any]) -> bool:
    """Whether the values after the first differ."""
    return any(value != row[1] for value in row[2:])


def format_value(value: Any) -> str:
    """The text of a cell."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def shorten_hashes(value: Any) -> str:
    """The text of a cell, with the first 12 digits of each sha256."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", format_value(value))


def format_ledger_row(row: ledger.Row) -> list[Any]:
    """Cells of a row of the ledger."""
    known = ("time", "run", "event", "seconds", "versions")
    details = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known and value is not None)
    spent = ", ".join(f"{kind} {s:g} s" for kind, s in row.get("seconds", {}).items())
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"]))
    return [at, row["run"], row["event"], details, spent]


def make_data_url(png: pathlib.Path) -> str:
    """The URL that contains a picture."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
