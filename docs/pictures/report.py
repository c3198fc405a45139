"""Draw the pictures of docs/report.md: python docs/pictures/report.py WORKDIR

WORKDIR is a finished run of the digits. Needs Debian's browser (apt-get install chromium chromium-driver; pip install -e '.[test]').
"""

import argparse
import pathlib
import sys
import tempfile
import time

from PIL import Image

from rar_jax.tools.report.report import write_report

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "helpers"))
# Each picture's section of the page (None: its top) and height.
PICTURES = {
    "report": (None, 980),
    "report_grids": ("Samples", 860),
    "report_scores": ("Scores", 900),
    "report_ledger": ("Environment", 760),
}
WIDTH = 1400


def main() -> None:
    """Write the pictures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir")
    args = parser.parse_args()
    from browser import browser, uri  # of the tests

    with tempfile.TemporaryDirectory() as folder, browser() as chrome:
        chrome.get(uri(write_report([args.workdir], pathlib.Path(folder) / "report.html")))
        for name, (section, height) in PICTURES.items():
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            top = f"document.getElementById('{section}').getBoundingClientRect().top + scrollY - 50" if section else "0"
            chrome.execute_script(f"scrollTo({{top: {top}, behavior: 'instant'}})")
            time.sleep(1)  # until the images are decoded
            path = HERE / f"{name}.png"
            chrome.save_screenshot(str(path))
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(256).save(path, optimize=True)
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
