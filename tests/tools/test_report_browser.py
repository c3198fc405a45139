"""The page of `rar-jax report` in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from browser import browser, complaints, uri
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from workdirs import trained

from rar_jax.tools.report.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """The page of a finished run."""
    path = write_report([trained(tmp_path_factory.mktemp("runs") / "run")])
    with browser() as chrome:
        chrome.get(uri(path))
        yield chrome


def test_page_opens_without_errors(page: Chrome) -> None:
    assert page.title == "run" and complaints(page) == []
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    for width in (1400, 480):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wider = page.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wider <= 0, f"the page is wider than {width} pixels"


def test_slider_moves_through_the_steps(page: Chrome) -> None:
    grid = page.find_elements(By.CSS_SELECTOR, ".grid")[0]
    slider = grid.find_element(By.TAG_NAME, "input")
    for i, step in enumerate((1000, 750, 500, 250)):
        if i:
            slider.send_keys(Keys.ARROW_LEFT)
        images = grid.find_elements(By.TAG_NAME, "img")
        assert [image.get_attribute("alt") for image in images if image.is_displayed()] == [f"step {step}"]
        assert grid.find_element(By.TAG_NAME, "output").text == f"step {step}"
    assert complaints(page) == []


@pytest.mark.parametrize("missing", ["chromium", "chromedriver"])
def test_missing_browser_fails_by_name(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    message = f"{missing} is not installed: apt-get install -y chromium chromium-driver"
    with pytest.raises(pytest.fail.Exception, match=message), browser():
        pass
