"""`rar-jax report`: what goes into the page, of runs in any state. What the page does with it: test_report_browser.py."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from workdirs import CLASSES, NASTY, claimed, images, trained

from rar_jax.cli import main
from rar_jax.runs import ledger
from rar_jax.runs.grids import Grid
from rar_jax.runs.ledger import Ledger
from rar_jax.runs.lock import Lease
from rar_jax.runs.logging import RunLogger
from rar_jax.tools.report import report as report_module
from rar_jax.tools.report import tables as report_tables
from rar_jax.tools.report.report import _names, read_run, report
from rar_jax.tools.report.tables import curves


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, by hand. Not to be written to."""
    return trained(tmp_path_factory.mktemp("runs") / "run")


def data_of(html: str) -> dict[str, Any]:
    """What the page holds, read as a browser would: up to the first end of a script."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_one_file_that_loads_nothing(
    finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(finished), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    html = out.read_text()
    assert "default-src 'none'; img-src data:" in html
    links = re.findall(r'(?:src|href)="([^"]*)"', re.sub(r'<script id="data".*?</script>', "", html, flags=re.DOTALL))
    assert (
        links == ["data:,"]
        and "http://" not in html.replace("http://www.w3.org/2000/svg", "")
        and "https://" not in html
    )
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_nothing_in_the_data_is_markup(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    html = report([finished], tmp_path / "page.html").read_text()
    (run,) = data_of(html)["runs"]
    config = dict(run["config"])
    assert config["name"] == NASTY
    # What config.json leaves out since it is as it ever was, is there.
    assert "live_grid" not in (finished / "config.json").read_text()
    shown = {
        name: config[name] for name in ("evaluate.live_grid", "train.spike_sigmas", "data.crop", "data.on_the_fly")
    }
    assert shown == {
        "evaluate.live_grid": "4",
        "train.spike_sigmas": "10.0",
        "data.crop": "null",
        "data.on_the_fly": "false",
    }
    assert next(grid for grid in run["grids"] if grid["stage"] == "generator")["rows"] == list(CLASSES)
    assert NASTY not in html and "<img" not in html and html.count("<script") == 2


def test_a_title_is_text(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "<b>{data}"
    path.mkdir()
    (path / "config.json").write_text((finished / "config.json").read_text())
    html = report([path]).read_text()
    assert "<title>&lt;b&gt;{data}</title>" in html and data_of(html)["runs"][0]["name"] == "<b>{data}"


# ---------------------------------------------------------------- states


def test_states(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = read_run(finished)
    assert (run["state"], run["problems"]) == ("done", []) and run["notes"].keys() == {"pictures"}
    assert run["summary"]["goodput"] == pytest.approx(0.75, abs=0.02)
    assert run["environment"][0]["versions"] == {"jax": "0.10.2", "rar_jax": "0.1.0"}
    empty = claimed(tmp_path / "empty")
    run = read_run(empty)
    assert run["state"] == "unfinished" and run["problems"] == []
    assert run["notes"].keys() == {"curves", "grids", "pictures", "scores", "environment", "ledger"}
    held = Lease(empty, "train")
    assert read_run(empty)["state"] == "running"
    held.release()
    Ledger(empty).row("stop", reason="preempted")
    assert read_run(empty)["state"] == "stopped"


def test_what_is_damaged_is_said_and_the_rest_shown(tmp_path: pathlib.Path) -> None:
    path = trained(tmp_path / "run")
    (path / "result.json").write_text("{half")
    (path / "grids" / "generator" / "500.png").write_bytes(b"PNG?")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "gener')  # a killed process
    run = read_run(path)
    assert [text.split(" (")[0] for text in run["problems"]] == [
        f"{path}/grids/generator/500.png is no grid of a training, or damaged", f"{path}/result.json cannot be read",
    ]  # fmt: skip
    steps = [shown["step"] for grid in run["grids"] if grid["stage"] == "generator" for shown in grid["steps"]]
    assert steps == [250, 750, 1000] and len(run["scores"]) == 1 and run["curves"]
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n[1]\n")
    (problem,) = (text for text in read_run(path)["problems"] if "metrics" in text)
    assert "metrics.jsonl line" in problem and "delete that line" in problem


def test_results_that_are_not_as_ours_are(tmp_path: pathlib.Path) -> None:
    """NaN is no JSON for a browser; types of someone's own end no report; nor does a large picture that is none."""
    run = trained(tmp_path / "run")
    (run / "result.json").write_text('{"nearest": NaN, "fd_classifier": {"samples_n40": Infinity}, "kid": 0.5}')
    (run / "evaluation" / "result.json").write_text('{"fid": 2.5, "made_from": ["a", "list"]}')
    (run / "samples.png").write_bytes(b"no picture" * 200_000)
    Image.new("RGB", (4, 4)).save(run / "reconstructions.png")
    (told,) = data_of(report([run], tmp_path / "page.html").read_text())["runs"]
    (score,) = told["scores"]
    assert score["numbers"] == [["kid", 0.5, None]]
    assert {"nearest: nan", "fd_classifier samples_n40: inf"} <= set(score["said"])
    assert [picture["name"] for picture in told["pictures"]] == ["reconstructions.png"]
    wrong = [text for text in told["problems"] if "cannot be read" in text]
    assert len(wrong) == 2 and "samples.png" in wrong[0] and "evaluation/result.json" in wrong[1]


def test_a_page_that_cannot_be_written(finished: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    out = tmp_path / "nowhere" / "page.html"
    assert main(["report", str(finished), "--out", str(out)]) == 2
    assert (
        f"{out} cannot be written (No such file or directory): give another place with --out FILE"
        in capsys.readouterr().err
    )


def test_each_kind_of_time_has_a_colour() -> None:
    script = (pathlib.Path(report_module.__file__).parent / "page" / "page.js").read_text()
    (hues,) = re.findall(r"const hue = {(.*?)}", script)
    assert set(re.findall(r"(\w+):", hues)) == {*ledger.KINDS, "lost", "stopped"}


def test_of_much_the_newest_is_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of a long ledger, each environment once, grids of the layout of the newest, large pictures as WebP."""
    path = trained(tmp_path / "run")
    book = Ledger(path)
    for device in ("cpu", "cpu", "tpu"):
        book.row("start", device=device, devices=1, processes=1, host="a", versions={"jax": "1"})
    for step in (1, 2, 3):
        book.row("saved", stage="generator", step=step)
    with RunLogger(path, "generator", total_steps=2000, quiet=True) as reporter:
        reporter.write_grid(2000, "samples", Grid(images(2, 2, 1), ("a", "b"), ("",) * 2))
    for name, pixels in (
        ("samples", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)),
        ("reconstructions", 8),
    ):
        Image.fromarray(np.full((64, 64, 3), pixels, np.uint8)).save(path / f"{name}.png")
    monkeypatch.setattr(report_module, "LEDGER_ROWS", 2)
    monkeypatch.setattr(report_module, "LARGE", 5000)
    run = read_run(path)
    assert run["ledger"]["of"] == 9 and [row["step"] for row in run["ledger"]["rows"]] == [2, 3]
    assert [start["device"] for start in run["environment"]] == [
        "cpu",
        "cpu",
        "tpu",
    ]  # that of `trained` had other versions
    grid = next(grid for grid in run["grids"] if grid["stage"] == "generator")
    assert [shown["step"] for shown in grid["steps"]] == [2000] and grid["rows"] == ("a", "b")
    kinds = {picture["name"]: picture["image"].partition(";")[0] for picture in run["pictures"]}
    assert kinds == {"samples.png": "data:image/webp", "reconstructions.png": "data:image/png"}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "is no folder: give the --workdir of rar-jax run"),
        (lambda path: path.mkdir(), "is not a work directory: it has no config.json"),
        (lambda path: path.write_text(""), "is no folder"),
    ],
)
def test_what_is_no_work_directory(
    make: Any, problem: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    make(path)
    assert main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"rar-jax report: {path} {problem}") and err.count("\n") == 1


def test_three_are_too_many(finished: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *3 * [str(finished)]]) == 2
    assert "3 work directories: give one, or two to compare" in capsys.readouterr().err


# ---------------------------------------------------------------- two of them


def test_two_runs_are_told_apart_and_their_scores_are_in_one_row(tmp_path: pathlib.Path) -> None:
    one, other = trained(tmp_path / "one" / "run"), trained(tmp_path / "other" / "run")
    path = other / "evaluation" / "result.json"
    told = json.loads(path.read_text())
    told |= {"fid": 3.25, "n": 10000, "kid": 0.125, "made_from": {**told["made_from"], "seed": 4}}
    path.write_text(json.dumps(told))
    (other / "evaluation" / "step_9").mkdir()
    (other / "evaluation" / "step_9" / "result.json").write_text('{"fid": 9.0}')  # of one of them only
    data = data_of(report([one, other]).read_text())
    assert [run["name"] for run in data["runs"]] == ["one/run", "other/run"]
    own, inception = data["compared"]
    assert own["file"] == "result.json" and own["numbers"] == [
        ["fd_classifier samples_n40", 1.25, 1.25, 40, 40],
        ["last_validation generator raster_loss", 0.5, 0.5, None, None],
    ]
    assert inception["file"] == "evaluation/result.json"
    assert inception["numbers"] == [["fid", 2.5, 3.25, 50000, 10000], ["kid", None, 0.125, None, 10000]]
    assert ["guidance", "scale 4, power 1.5", "scale 4, power 1.5"] in inception["conditions"]
    assert [row for row in inception["conditions"] if row[1] != row[2]] == [["seed", "3", "4"]]
    assert len(inception["conditions"]) == 15


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("/a/run", "/b/other"), ["run", "other"]),
        (("/a/x/run", "/b/x/run"), ["a/x/run", "b/x/run"]),
        (("/run", "/a/run"), ["/run", "a/run"]),
        (("/a/run", "/a/run"), ["/a/run", "/a/run"]),
        (("/a/run",), ["run"]),
    ],
)
def test_names_tell_work_directories_apart(paths: tuple[str, ...], names: list[str]) -> None:
    assert _names([pathlib.Path(path) for path in paths]) == names


# ---------------------------------------------------------------- numbers


def test_curves_that_compare_share_a_panel() -> None:
    rows = [
        {"stage": "generator", "step": 1, "time": 0, "loss": 3.0, "bits": 4.0, "grad_norm": None, "codebook_loss": 1.0},
        {
            "stage": "generator",
            "step": 2,
            "time": 0,
            "validation/raster_bits": 1.0,
            "validation/loss": 2.0,
            "fd_n20": 1.0,
        },
        {"stage": "classifier", "step": 2, "time": 0, "validation/psnr": 1.0},
        {"stage": "generator", "step": 2, "time": 0, "loss": 2.0},
        {"stage": "generator", "step": 2, "time": 0, "loss": 2.5},
    ]
    found = {(c["stage"], c["name"]): c for c in curves(rows)}
    assert {key: c["panel"] for key, c in found.items()} == {
        ("generator", "loss"): "loss",
        ("generator", "validation/loss"): "loss",
        ("generator", "bits"): "bits",
        ("generator", "validation/raster_bits"): "bits",
        ("generator", "codebook_loss"): "codebook_loss",
        ("generator", "fd_n20"): "fd_n20",
        ("classifier", "validation/psnr"): "psnr",
    }
    assert found["generator", "loss"]["steps"] == [1, 2] and found["generator", "loss"]["values"] == [3.0, 2.5]


def test_a_long_curve_keeps_its_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_tables, "POINTS", 100)
    values = np.sin(np.arange(5000) / 300)
    values[[1234, 4321]] = 50, -50
    rows = [{"stage": "generator", "step": i, "loss": float(v)} for i, v in enumerate(values)]
    (curve,) = curves(rows)
    assert len(curve["steps"]) <= 100 and curve["of"] == 5000
    assert {1234, 4321} <= set(curve["steps"]) and (max(curve["values"]), min(curve["values"])) == (50, -50)
    np.testing.assert_array_equal(values[curve["steps"]], curve["values"])


def test_scores_have_what_they_depend_on(finished: pathlib.Path) -> None:
    own, inception = read_run(finished)["scores"]
    assert own["numbers"] == [
        ["fd_classifier samples_n40", 1.25, 40],
        ["last_validation generator raster_loss", 0.5, None],
    ]
    assert own["conditions"] | {"weights": "", "tokenizer": ""} == {
        "reference": "the 1437 training images", "weights": "", "tokenizer": "", "features of": "not recorded",
        "rounding": "truncate", "resize protocol": "none", "precision": "float32", "sampled in": "float32", "seed": "7",
        "guidance": "scale 2", "images a split": "not recorded", "device": "cpu", "mesh": "not recorded",
        "jax": "not recorded", "rar_jax": "not recorded",
    }  # fmt: skip
    assert {"batch_size": "64", "chunk": "1000"}.items() <= dict(inception["made_on"]).items()
    assert inception["conditions"]["mesh"] == "data 4, fsdp 2" and inception["conditions"]["rar_jax"] == "0.1.0"
    assert inception["numbers"] == [["fid", 2.5, 50000]] and NASTY in inception["said"]
    assert inception["conditions"]["reference"] == "e" * 64 and inception["conditions"]["precision"] == "float64"
