"""Pictures of a report for the docs: python docs/pictures/report.py WORKDIR

Of a finished run of the digits, in Debian's browser (apt-get install chromium chromium-driver; pip install -e '.[test]').
"""

import argparse
import pathlib
import sys
import tempfile
import time

from PIL import Image

from rar_jax.tools.report.report import report

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "helpers"))
# What each picture begins with, and its height: a section of the page, or its top.
PICTURES = {
    "report": (None, 980),
    "report_grids": ("grids", 860),
    "report_scores": ("scores", 900),
    "report_ledger": ("environment", 760),
}
WIDTH = 1400


def main() -> None:
    """Writes the pictures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    args = parser.parse_args()
    from browser import browser, uri  # of the tests

    with tempfile.TemporaryDirectory() as folder, browser() as chrome:
        chrome.get(uri(report([args.workdir], pathlib.Path(folder) / "report.html")))
        for name, (section, height) in PICTURES.items():
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            top = f"document.getElementById('{section}').getBoundingClientRect().top + scrollY - 50" if section else "0"
            chrome.execute_script(f"scrollTo({{top: {top}, behavior: 'instant'}})")
            time.sleep(1)  # pictures are decoded, curves drawn
            path = HERE / f"{name}.png"
            chrome.save_screenshot(str(path))
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(256).save(path, optimize=True)
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
