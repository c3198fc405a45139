"""The page of `rar-jax report` in a real browser: what the mouse, the slider and the class filter show, against the files."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from browser import browser, complaints, uri
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from workdirs import CLASSES, NASTY, claimed, trained

from rar_jax.runs.logging import RunLogger
from rar_jax.tools.report.report import report

LEFT, RIGHT = 52, 12  # of the plot in its panel, pixels (page.js)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, by hand."""
    return trained(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    """One browser for all of these."""
    with browser() as chrome:
        yield chrome


@pytest.fixture
def page(driver: Chrome, workdir: pathlib.Path) -> Iterator[Chrome]:
    """The page, loaded anew. Whatever a test does, the console must stay silent and nothing be fetched."""
    driver.get(uri(report([workdir])))
    wait(driver, lambda: find(driver, "#grids canvas"))
    yield driver
    assert complaints(driver) == []
    fetched = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def find(driver: Chrome, selector: str) -> list[Any]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def wait(driver: Chrome, condition: Any) -> Any:
    return WebDriverWait(driver, 20).until(lambda _: condition())


def hover(driver: Chrome, panel: str, step: float, last: int) -> tuple[int, dict[str, tuple[int, float]]]:
    """The step that the tooltip names with the mouse over a step of a panel, and {curve: (step, value)}."""
    (svg,) = find(driver, f'[data-panel="{panel}"] svg')
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    width, first = svg.size["width"], 10
    x = LEFT + (width - LEFT - RIGHT) * (step - first) / (last - first)
    ActionChains(driver).move_to_element_with_offset(svg, round(x - width / 2), 0).perform()
    rows = find(driver, f'[data-panel="{panel}"] .tooltip tr')
    said = find(driver, f'[data-panel="{panel}"] .tooltip b')[0].text
    values = {
        row.get_attribute("data-name"): (
            int(row.get_attribute("data-step")),
            float(row.find_element(By.CSS_SELECTOR, ".value").text),
        )
        for row in rows
    }
    return int(said.removeprefix("step ")), values


def test_the_mouse_shows_what_metrics_jsonl_holds(page: Chrome, workdir: pathlib.Path) -> None:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    told = {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if row["stage"] == "generator" and name not in ("stage", "step", "time")
    }
    for aim in (10, 333, 747, 1000):
        step, values = hover(page, "generator loss", aim, 1000)
        assert abs(step - aim) <= 5 + 1000 / 300, "the recorded step nearest to the mouse"  # steps of 10; a pixel is 3
        assert values.keys() == {"loss", "validation/raster_loss"}
        assert values["loss"] == (step, pytest.approx(told[step, "loss"], rel=1e-5))
        at, heldout = values["validation/raster_loss"]
        assert abs(at - step) == min(abs(s - step) for s in (250, 500, 750, 1000))
        assert heldout == pytest.approx(told[at, "validation/raster_loss"], rel=1e-5)
    # A NaN of the training is a gap in the file: the tooltip stands at a neighbour that has a number.
    step, values = hover(page, "generator grad_norm", 50, 1000)
    assert step == values["grad_norm"][0] != 50 and values["grad_norm"][1] == pytest.approx(1e3 / step, rel=1e-5)


def test_the_cursor_is_in_all_panels_of_the_stage_and_the_tooltip_in_one(page: Chrome) -> None:
    hover(page, "generator loss", 500, 1000)
    cursors = page.execute_script(
        "return [...document.querySelectorAll('[data-panel]')].map(p => [p.dataset.panel, p.querySelector('.cursor').getAttribute('visibility'), p.querySelector('.tooltip').hidden])"
    )
    assert {panel.split()[0]: seen for panel, seen, _ in cursors} == {"generator": "visible", "tokenizer": "hidden"}
    assert [panel for panel, _, hidden in cursors if not hidden] == ["generator loss"]


def test_a_log_scale_moves_the_curve_and_not_the_numbers(page: Chrome) -> None:
    (toggle,) = find(page, '[data-panel="generator grad_norm"] button')
    assert toggle.get_attribute("aria-pressed") == "true", "1 to 100 is better seen so"
    (line,) = find(page, '[data-panel="generator grad_norm"] path.line, [data-panel="generator grad_norm"] path')[:1]
    before = line.get_attribute("d"), hover(page, "generator grad_norm", 400, 1000)
    toggle.click()
    (line,) = find(page, '[data-panel="generator grad_norm"] path')[:1]
    after = line.get_attribute("d"), hover(page, "generator grad_norm", 400, 1000)
    assert before[0] != after[0] and before[1] == after[1]


def test_curves_are_drawn_where_the_values_are(driver: Chrome, tmp_path: pathlib.Path) -> None:
    """Larger is higher; of a noisy curve the mean over the last values stands before the values, as numpy has it."""
    values = 10 + np.random.default_rng(0).normal(size=200)
    with RunLogger(claimed(tmp_path / "run"), "generator", total_steps=200, quiet=True) as reporter:
        for step, value in enumerate(values, start=1):
            reporter.write_metrics(step, {"loss": value})
    driver.get(uri(report([tmp_path / "run"])))
    told = driver.execute_script(
        """return [...document.querySelectorAll('[data-panel="generator loss"] path')].map(
            p => [p.getAttribute("class"), p.getAttribute("d")])"""
    )
    drawn = {kind: np.array([xy.split() for xy in path[1:].split("L")], float) for kind, path in told}
    assert list(drawn) == ["raw", "line"]
    to_pixels = np.polyfit(values, drawn["raw"][:, 1], 1)
    assert to_pixels[0] < 0, "y grows downwards on a screen"
    np.testing.assert_allclose(drawn["raw"][:, 1], np.polyval(to_pixels, values), atol=0.1)
    means = [values[max(0, i - 4) : i + 1].mean() for i in range(200)]  # 200 / 40
    np.testing.assert_allclose(drawn["line"][:, 1], np.polyval(to_pixels, means), atol=0.1)
    for xy in drawn.values():
        np.testing.assert_allclose(np.diff(xy[:, 0]), (xy[-1, 0] - xy[0, 0]) / 199, atol=0.11)


# ---------------------------------------------------------------- grids


def shown(driver: Chrome, stage: str) -> tuple[int, list[str], np.ndarray]:
    """The step of a grid, the names of its rows, and the pixels of its canvases (cells, 8, 8)."""
    told = driver.execute_script(
        """const copy = document.createElement("canvas"), pen = copy.getContext("2d", {willReadFrequently: true});
        const pixels = c => {
            [copy.width, copy.height] = [c.width, c.height];
            pen.drawImage(c, 0, 0);
            return [...pen.getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0);
        };
        const cells = document.querySelector(`.grid[data-stage="${arguments[0]}"] .cells`);
        return [cells.dataset.step, [...cells.querySelectorAll("canvas")].map(c => [c.dataset.row, pixels(c)])]""",
        stage,
    )
    rows = [row for row, _ in told[1]]
    return int(told[0]), rows, np.array([pixels for _, pixels in told[1]], np.uint8).reshape(-1, 8, 8)


def cells(workdir: pathlib.Path, stage: str, step: int) -> np.ndarray:
    """The same from the file, row by row: (rows, columns, 8, 8)."""
    sheet = np.asarray(Image.open(workdir / "grids" / stage / f"{step}.png"))
    return sheet.reshape(sheet.shape[0] // 8, 8, -1, 8).swapaxes(1, 2)


def test_the_slider_moves_through_the_steps(page: Chrome, workdir: pathlib.Path) -> None:
    (slider,) = find(page, '.grid[data-stage="generator"] input[type="range"]')
    for i, step in enumerate((1000, 750, 500, 250)):
        if i:
            slider.send_keys(Keys.ARROW_LEFT)
        wait(page, lambda step=step: shown(page, "generator")[0] == step)
        assert find(page, '.grid[data-stage="generator"] output')[0].text == f"step {step}"
        _, rows, pixels = shown(page, "generator")
        assert rows == [name for name in CLASSES for _ in range(3)]
        np.testing.assert_array_equal(pixels, cells(workdir, "generator", step).reshape(-1, 8, 8))


def test_play_goes_through_the_steps_and_stops(page: Chrome) -> None:
    grid = '.grid[data-stage="generator"]'
    (play,) = find(page, f"{grid} .controls button")
    page.execute_script(
        """const [cells] = document.querySelectorAll(arguments[0] + " .cells"); window.seen = [];
        new MutationObserver(() => window.seen.push(Number(cells.dataset.step))).observe(cells, {attributeFilter: ["data-step"]})""",
        grid,
    )
    play.click()
    assert play.text == "stop"
    wait(page, lambda: play.text == "play")
    wait(page, lambda: shown(page, "generator")[0] == 1000)
    assert page.execute_script("return window.seen") == [250, 500, 750, 1000]


def test_the_class_filter(page: Chrome, workdir: pathlib.Path) -> None:
    chips = {chip.text: chip for chip in find(page, '.grid[data-stage="generator"] .chips button')}
    assert list(chips) == ["all classes", *CLASSES]
    whole = cells(workdir, "generator", 1000)
    chips["tench"].click()
    wait(page, lambda: set(shown(page, "generator")[1]) == {"tench"})
    np.testing.assert_array_equal(shown(page, "generator")[2], whole[3])
    chips[NASTY].click()
    wait(page, lambda: set(shown(page, "generator")[1]) == {NASTY, "tench"})
    np.testing.assert_array_equal(shown(page, "generator")[2], whole[[0, 3]].reshape(-1, 8, 8))
    chips["all classes"].click()
    wait(page, lambda: set(shown(page, "generator")[1]) == set(CLASSES))
    # Of reconstructions the columns have classes: both rows stay.
    next(c for c in find(page, '.grid[data-stage="tokenizer"] .chips button') if c.text == "a & b").click()
    wait(page, lambda: len(shown(page, "tokenizer")[1]) == 2)
    _, rows, pixels = shown(page, "tokenizer")
    assert rows == ["original", "reconstruction"]
    np.testing.assert_array_equal(pixels, cells(workdir, "tokenizer", 12)[:, 2])


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("missing", ["chromium", "chromedriver"])
def test_a_missing_browser_fails_by_name(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    message = f"{missing} is not installed: apt-get install -y chromium chromium-driver"
    with pytest.raises(pytest.fail.Exception, match=message), browser():
        pass


def test_names_are_text(page: Chrome) -> None:
    """Names that are HTML are shown as they are written: in the config, the ledger, the chips and the remarks."""
    assert page.title == "run"
    assert len(find(page, "script")) == 2 and not find(page, "img[onerror], main script")
    text = page.execute_script("return document.body.innerText")
    assert text.count(NASTY) >= 5


def test_tables(page: Chrome) -> None:
    def rows(file: str) -> list[list[str]]:
        found = find(page, f'[data-file="{file}"] .pair tbody tr')
        return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in found]

    assert rows("evaluation/result.json") == [
        ["fid", "2.5", "50000"],
        ["reference", "eeeeeeeeeeee…"],
        ["weights", "0123456789ab…"],
        ["tokenizer", "dddddddddddd…"],
        ["features of", "ffffffffffff…"],
        ["rounding", "round"],
        ["resize protocol", "adm"],
        ["precision", "float64"],
        ["sampled in", "bfloat16"],
        ["seed", "3"],
        ["guidance", "scale 4, power 1.5"],
        ["images a split", "5000"],
        ["device", "TPU v5p"],
        ["mesh", "data 4, fsdp 2"],
        ["jax", "0.10.2"],
        ["rar_jax", "0.1.0"],
    ]
    own = rows("result.json")
    assert own[0] == ["fd_classifier samples_n40", "1.25", "40"] and ["reference", "the 1437 training images"] in own
    find(page, "#config input")[0].send_keys("train.steps")
    assert [row.text for row in find(page, "#config tbody tr")] == [
        "classifier_train.steps 8",
        "tokenizer_train.steps 12",
        "train.steps 24",
    ]
    events = [row.text for row in find(page, "#ledger tbody tr")]
    assert len(events) == 3 and "start" in events[0] and "reason done" in events[2]


def test_two_work_directories_in_one_page(driver: Chrome, workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = trained(tmp_path / "other")
    rows = (other / "metrics.jsonl").read_text().splitlines()
    doubled = [
        json.dumps({**row, "loss": 2 * row["loss"]}) if "loss" in (row := json.loads(line)) else line for line in rows
    ]
    (other / "metrics.jsonl").write_text("\n".join(doubled) + "\n")
    for name, change in (
        ("config.json", {"seed": 5}),
        ("evaluation/result.json", {"fid": 3.25, "n": 10000, "made_from": {"seed": 4}}),
    ):
        (other / name).write_text(json.dumps(json.loads((other / name).read_text()) | change))
    driver.get(uri(report([workdir, other], tmp_path / "both.html")))
    wait(driver, lambda: find(driver, "#grids canvas"))
    hover(driver, "generator loss", 500, 1000)
    values = [
        float(row.find_element(By.CSS_SELECTOR, ".value").text)
        for row in find(driver, '[data-panel="generator loss"] .tooltip tr[data-name="loss"]')
    ]
    assert len(values) == 2 and values[1] == pytest.approx(2 * values[0], rel=1e-5)
    dashes = [path.get_attribute("stroke-dasharray") for path in find(driver, '[data-panel="generator loss"] path')]
    assert dashes == [None, None, "5 3", "5 3"]
    legend = [line.text for line in find(driver, '[data-panel="generator loss"] .legend span')]
    assert legend == [f"{name}, {run}" for run in ("run", "other") for name in ("training", "held-out raster_loss")]
    assert len(find(driver, ".overview")) == 2 and len(find(driver, '.grid[data-stage="generator"]')) == 2
    table = '.compared[data-file="evaluation/result.json"] tbody tr'
    cells = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in find(driver, table)]
    assert cells[0] == ["fid", "2.5", "3.25", "50000 | 10000"] and ["resize protocol", "adm", "not recorded"] in cells
    different = [row for row in cells if row[1] != row[2]]  # of the FID, whose n differs, too
    assert [row.text.split() for row in find(driver, f"{table}.other")] == [" ".join(row).split() for row in different]
    assert find(driver, '.compared[data-file="result.json"] tbody tr.other') == []
    rows = [row.text for row in find(driver, "#config tbody tr")]
    seed = str(json.loads((workdir / "config.json").read_text())["seed"])
    assert rows == [f"seed {seed} 5"], "what differs is all that is shown first"
    find(driver, '#config input[type="checkbox"]')[0].click()
    assert len(find(driver, "#config tbody tr")) > 50 and len(find(driver, "#config tbody tr.other")) == 1
    assert complaints(driver) == []


@pytest.mark.parametrize("width", [1400, 480])
def test_nothing_is_wider_than_the_window(page: Chrome, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
