"""Runs the notebooks whole and writes them down here with their pictures: python docs/notebooks/render.py [NAME ...]

pip install -e '.[notebook]' first. The long forms: the digits experiment is trained once, in --workdir, and all three use it.
Prints how long each took; the first line of each page says so too.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import tempfile
import time

import nbclient
import nbconvert
import nbformat
from PIL import Image

HERE = pathlib.Path(__file__).parent
NOTEBOOKS = HERE.parents[1] / "notebooks"
WORKDIR = "runs/digits"  # where the notebooks look, in the directory that they are run in
NAMES = ("train_digits", "sample", "how_rar_works")  # in this order: the first trains what the others show


def execute(name: str, folder: pathlib.Path, environment: dict[str, str]) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder` with these environment variables besides those that are set.

    Raises: nbclient's CellExecutionError with the cell and its traceback.
    """
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(folder)}})
    quiet = {
        "PYTHONWARNINGS": "ignore:IProgress not found"
    }  # progress bars of the hub's, as text where ipywidgets is not
    return client.execute(env={**os.environ, **quiet, **environment})


def write(name: str, notebook: nbformat.NotebookNode, folder: pathlib.Path, *, remark: str) -> pathlib.Path:
    """folder/NAME.md, which begins with the remark, and its pictures in folder/NAME_files; what was there goes."""
    files = folder / f"{name}_files"
    for old in files.glob("*"):
        old.unlink()
    files.mkdir(parents=True, exist_ok=True)
    resources = {"unique_key": name, "output_files_dir": files.name}
    body, resources = nbconvert.MarkdownExporter().from_notebook_node(notebook, resources)
    for path, content in resources["outputs"].items():
        if path not in body:  # a JPEG of the same picture
            continue
        picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(256)
        picture.save(folder / path, optimize=True)
    page = folder / f"{name}.md"
    page.write_text(f"*{remark}*\n\n{linked(body).strip()}\n")
    return page


def linked(text: str) -> str:
    """Links to notebooks as links to their pages."""
    for name in NAMES:
        text = text.replace(f"]({name}.ipynb)", f"]({name}.md)")
    return text


def main() -> None:
    """Runs and writes the named notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="default: all")
    parser.add_argument("--workdir", type=pathlib.Path, help="default: a new one, which is deleted at the end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.workdir:  # by the name that readers have: the pages do not show whose machine they are of
            args.workdir.mkdir(parents=True, exist_ok=True)
            (pathlib.Path(scratch) / "runs").mkdir()
            (pathlib.Path(scratch) / WORKDIR).symlink_to(args.workdir.absolute())
        for name in args.names or NAMES:
            began = time.monotonic()
            notebook = execute(name, pathlib.Path(scratch), {"RAR_JAX_WORKDIR": WORKDIR, "RAR_JAX_SHORT": "0"})
            seconds = time.monotonic() - began
            remark = f"Written by `python docs/notebooks/render.py` from `notebooks/{name}.ipynb`, which ran for {seconds:.0f} s."
            page = write(name, notebook, HERE, remark=remark)
            size = sum(path.stat().st_size for path in [page, *page.with_name(f"{name}_files").iterdir()])
            print(f"{page.name:20} ran for {seconds:4.0f} s, {size / 1e3:4.0f} kB", flush=True)


if __name__ == "__main__":
    main()
