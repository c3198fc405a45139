"""`rar-jax report`: the page of runs in any state, and of two side by side. In a browser: test_report_browser.py."""

from __future__ import annotations

import html.parser
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from workdirs import CLASSES, NASTY, claimed, images, trained

from rar_jax.cli import main
from rar_jax.runs.grids import Grid
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.logging import RunLogger
from rar_jax.tools.report import curves, report
from rar_jax.tools.report.report import write_report


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: tags with attributes, texts, and the rows of tables by section."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.marked: list[str] = []
        self._section = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "section":
            self._section = str(found["id"])
        elif tag == "tr":
            self.rows.setdefault(self._section, []).append([])
            self._marks = found.get("class") == "differs"
        elif tag in ("td", "th"):
            self.rows[self._section][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
        if tag == "tr" and self._marks:
            self.marked.append(self.rows[self._section][-1][0])

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if getattr(self, "_cell", False):
            self.rows[self._section][-1][-1] += data

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, by hand. Not to be written to."""
    return trained(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(finished: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([finished], tmp_path_factory.mktemp("page") / "page.html"))


def test_one_file_that_loads_nothing(
    finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(finished), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    page = Page(out)
    assert "default-src 'none'; img-src data:" in out.read_text()
    links = [str(found.get(name)) for _, found in page.tags for name in ("src", "href") if found.get(name)]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert page.find("section", id="Ledger") and page.find("a", href="#Ledger")


def test_names_are_text(page: Page) -> None:
    """Names that are HTML are shown as they are written."""
    assert len(page.find("script")) == 1 and not page.find("img", src="x")
    assert page.texts.count(NASTY) >= 3, "in the overview, the config and the grid"
    titles = [found["title"] for found in page.find("span") if "title" in found]
    assert titles[: len(CLASSES)] == list(CLASSES)


def test_title_is_text(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "<b>$body"
    path.mkdir()
    (path / "config.json").write_text((finished / "config.json").read_text())
    page = Page(write_report([path]))
    assert page.texts.count("<b>$body") == 2 and not page.find("b")


# ---------------------------------------------------------------- states


def test_overview_of_a_finished_run(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows["Overview"]}
    assert rows["state"] == ["finished"] and rows["last stop"] == ["done"] and rows["starts"] == ["1"]
    assert rows["tokenizer"][0] == "step 12 of 12" and rows["training"][0] == "30 s"
    assert rows["total"] == ["40 s", "goodput 75.0%"]
    assert page.find("progress", value="30.0", max="40.0")
    assert not page.find("p", **{"class": "problem"})


def test_new_run(tmp_path: pathlib.Path) -> None:
    page = Page(write_report([claimed(tmp_path / "run")]))
    assert ["state", "not finished"] in page.rows["Overview"]
    assert page.texts.count("Nothing yet.") == 4 and not page.find("svg")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: pathlib.Path) -> None:
    path = trained(tmp_path / "run")
    (path / "result.json").write_text("{half")
    (path / "grids" / "generator" / "500.png").write_bytes(b"PNG?")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('\n[1]\n{"stage": "gener')
    page = Page(write_report([path]))
    problems = [text for text in page.texts if str(path) in text and "run the same" not in page.texts]
    for start in ("metrics: ", f"{path}/grids/generator/500.png", f"{path}/result.json cannot be read"):
        assert any(text.startswith(start) for text in problems), start
    steps = [found["alt"] for found in page.find("img")]
    assert steps[:3] == ["step 250", "step 750", "step 1000"]
    assert ["fid", "2.5"] in page.rows["Scores"]


@pytest.mark.parametrize(
    ("content", "shown"),
    [('{"fid": NaN, "kid": 0.5}', ["fid", "nan"]), ('{"made_from": ["a"], "fid": Infinity}', ["made_from", "['a']"])],
)
def test_unusual_results(content: str, shown: list[str], tmp_path: pathlib.Path) -> None:
    path = trained(tmp_path / "run")
    (path / "evaluation" / "result.json").write_text(content)
    assert shown in Page(write_report([path])).rows["Scores"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "is not a folder: give the --workdir of rar-jax run"),
        (lambda path: path.mkdir(), "is not a work directory: it has no config.json"),
        (lambda path: path.write_text(""), "is not a folder"),
    ],
)
def test_not_a_work_directory(
    make: Any, problem: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    make(path)
    assert main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"rar-jax report: {path} {problem}") and err.count("\n") == 1


@pytest.mark.parametrize("out", ["nowhere/page.html", "."])
def test_page_that_cannot_be_written(out: str, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    assert main(["report", str(finished), "--out", str(tmp_path / out)]) == 2
    assert "choose another file with --out" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_three_are_too_many(finished: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *3 * [str(finished)]]) == 2
    assert "3 work directories: give one, or two to compare" in capsys.readouterr().err


# ---------------------------------------------------------------- sections


def test_scores_stand_beside_what_they_depend_on(page: Page) -> None:
    rows = [row for row in page.rows["Scores"] if len(row) == 2]
    for row in (
        ["fd_classifier.samples_n40", "1.25"],
        ["made_from.rounding", "truncate"],
        ["fid", "2.5"],
        ["n", "50000"],
        ["made_from.reference_sha256", "e" * 12 + "…"],
        ["made_from.sampling.power", "1.5"],
        ["made_on.mesh.fsdp", "2"],
        ["made_on.versions.jax", "0.10.2"],
    ):
        assert row in rows, row
    assert page.find("td", title="e" * 64)
    # Repeated in the run's result.json, which has other conditions.
    assert "fid_n50000" not in [row[0] for row in rows]


def test_config_environment_and_ledger(page: Page) -> None:
    assert ["train.steps", "24"] in page.rows["Config"] and ["host", NASTY] in page.rows["Environment"]
    assert ["versions.jax", "0.10.2"] in page.rows["Environment"]
    events = [row[2:4] for row in page.rows["Ledger"][1:]]
    assert [event for event, _ in events] == ["start", "saved", "stop"] and "reason done" in events[2][1]
    assert page.rows["Ledger"][2][4] == "training 30 s, saving 10 s"


def test_long_ledgers_and_new_layouts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of the ledger, each environment once, and grids of the newest layout are shown."""
    path = trained(tmp_path / "run")
    book = Ledger(path)
    for device in ("cpu", "cpu", "tpu"):
        book.row("start", device=device, devices=1, processes=1, host="a", versions={"jax": "1"})
    with RunLogger(path, "generator", total_steps=2000, quiet=True) as reporter:
        reporter.write_grid(2000, "samples", Grid(images(2, 2, 1), ("a", "b"), ("",) * 2))
    monkeypatch.setattr(report, "LEDGER_ROWS", 2)
    page = Page(write_report([path]))
    assert len(page.rows["Ledger"]) == 3 and "device tpu" in page.rows["Ledger"][2][3]
    assert [row[1] for row in page.rows["Environment"] if row[0] == "device"] == ["cpu", "cpu", "tpu"]
    assert [found["alt"] for found in page.find("img")] == ["step 2000", "step 6", "step 12"]


def test_pictures_are_in_the_page(tmp_path: pathlib.Path) -> None:
    path = trained(tmp_path / "run")
    (path / "samples.png").write_bytes(b"\x89PNG")
    (found,) = Page(write_report([path])).find("img", alt="samples.png")
    assert found["src"] == "data:image/png;base64,iVBORw=="


# ---------------------------------------------------------------- two of them


def test_two_runs_side_by_side(tmp_path: pathlib.Path) -> None:
    one, other = trained(tmp_path / "one" / "run"), trained(tmp_path / "other" / "run")
    for name, change in (
        ("config.json", {"seed": 5}),
        ("evaluation/result.json", {"fid": 3.25, "n": 10000, "kid": 0.125}),
    ):
        (other / name).write_text(json.dumps(json.loads((other / name).read_text()) | change))
    page = Page(write_report([one, other]))
    names = [str(one), str(other)]
    assert page.rows["Scores"][0] == ["score", *names], "names that are equal are told apart by their paths"
    for row in (["fid", "2.5", "3.25"], ["kid", "", "0.125"], ["n", "50000", "10000"], ["made_from.seed", "3", "3"]):
        assert row in page.rows["Scores"], row
    assert page.marked == ["n", "seed"]
    differing, whole = page.rows["Config"][1], page.rows["Config"][3:]
    assert differing[0] == "seed" and differing[2] == "5" and len(whole) > 50
    dashes = [found.get("stroke-dasharray") for found in page.find("path")]
    assert dashes.count("5 3") == dashes.count(None) > 0
    assert f"loss, {names[1]}" in page.texts and len(page.find("div", **{"class": "grid"})) == 4


# ---------------------------------------------------------------- curves


def test_curves_that_compare_share_a_panel(page: Page) -> None:
    names = {"loss", "bits", "validation/loss", "validation/raster_bits", "codebook_loss", "fd_n20", "validation/psnr"}
    assert {name: curves.find_panel(name, names) for name in names} == {
        "loss": "loss", "validation/loss": "loss", "bits": "bits", "validation/raster_bits": "bits",
        "codebook_loss": "codebook_loss", "fd_n20": "fd_n20", "validation/psnr": "psnr",
    }  # fmt: skip
    panels = [found["data-panel"] for found in page.find("div") if "data-panel" in found]
    assert panels == ["loss", "grad_norm", "fd_classifier_n20", "loss", "psnr"]


def test_last_row_of_a_repeated_step_counts() -> None:
    rows = [{"stage": "a", "step": s, "time": 0, "loss": v, "none": None} for s, v in ((2, 2.0), (1, 3.0), (2, 2.5))]
    points = curves.collect_points(rows)
    assert list(points) == ["loss"] and points["loss"].tolist() == [[1.0, 2.0], [3.0, 2.5]]


def test_long_curve_keeps_its_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "POINTS", 100)
    values = np.sin(np.arange(5000) / 300)
    values[[1234, 4321]] = 50, -50
    steps, shown = curves.thin_points(np.arange(5000.0), values)
    assert len(steps) <= 100 and {1234, 4321} <= set(steps)
    np.testing.assert_array_equal(values[steps.astype(int)], shown)


def test_tooltips_tell_the_values_at_the_nearest_step() -> None:
    pair = [
        curves.Curve("loss", "loss", 0, np.array([10.0, 20.0, 30.0]), np.array([3.0, 2.0, 1.5])),
        curves.Curve("validation/loss", "validation/loss", 0, np.array([28.0]), np.array([1.25])),
    ]
    assert curves.describe_step(30.0, pair) == "step 30\nloss: 1.5\nvalidation/loss: 1.25 (step 28)"


def test_curves_are_drawn_where_the_values_are() -> None:
    """Larger is higher, and a noisy curve has its running mean."""
    values = 10 + np.random.default_rng(0).normal(size=200)
    rows = [{"stage": "a", "step": i + 1, "time": 0, "loss": float(value)} for i, value in enumerate(values)]
    (panel,) = curves.make_panels({"run": rows})
    drawn = {
        line["kind"]: np.array([xy.split() for xy in line["path"][1:].split("L")][1:], float) for line in panel["lines"]
    }
    assert list(drawn) == ["raw", "line"]
    to_pixels = np.polyfit(values, drawn["raw"][:, 1], 1)
    assert to_pixels[0] < 0, "y grows downwards on a screen"
    np.testing.assert_allclose(drawn["raw"][:, 1], np.polyval(to_pixels, values), atol=0.2)
    means = [values[i - 4 : i + 1].mean() for i in range(4, 200)]  # of 200 / 40
    np.testing.assert_allclose(drawn["line"][:, 1], np.polyval(to_pixels, means), atol=0.2)
    np.testing.assert_allclose(np.diff(drawn["raw"][:, 0]), (curves.RIGHT - curves.LEFT) / 199, atol=0.11)


def test_log_scale_where_it_helps(page: Page) -> None:
    assert page.texts.count(" (log scale)") == 1  # grad_norm from 100 to 1
    flat = [{"stage": "a", "step": 7, "time": 0, "loss": 0.0}]
    assert "nan" not in str(curves.make_panels({"run": flat})).lower()
