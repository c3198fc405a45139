"""A headless browser. A test fails on a machine without one."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1400,1000",
)  # fmt: skip


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Start Debian's chromium. Selenium is given both paths, so that it downloads nothing."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.fail(f"{missing[0]} is not installed: apt-get install -y chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths["chromium"])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="rar_jax_browser_", ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(executable_path=str(paths["chromedriver"])))
        try:
            driver.set_page_load_timeout(60)
            yield driver
        finally:
            driver.quit()


def complaints(driver: webdriver.Chrome) -> list[str]:
    """Messages of the page's console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def uri(path: pathlib.Path) -> str:
    """The file: URL of a path."""
    return path.resolve().as_uri()
