"""The notebooks, executed in their short form from top to bottom, and what is kept of them in git.

Facts of the models (the annealing, causality, sums of attention) are asserted in the notebooks' own cells.
"""

import base64
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
from typing import Any

import jax
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

from rar_jax.data import imagenet
from rar_jax.generators import rar
from rar_jax.programs.convert import convert_weights
from rar_jax.runs import ledger
from rar_jax.runs.logging import read_metrics
from rar_jax.weights import rar as interop_rar

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / "docs" / "notebooks"
PICTURES = {"train_digits": 5, "sample": 5, "how_rar_works": 9}


def _render() -> Any:
    spec = importlib.util.spec_from_file_location("render", PAGES / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _render()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def environment(folder: pathlib.Path) -> dict[str, str]:
    """One work directory, trained by the first notebook, and one compilation cache."""
    return {
        "RAR_JAX_SHORT": "1",
        "RAR_JAX_WORKDIR": str(folder / "digits"),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ["RAR_JAX_TEST_CACHE"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",  # one device, as a reader has
        "HF_HUB_CACHE": str(folder / "hub"),  # no released weights
        "IPYTHONDIR": str(folder / "ipython"),
    }


@pytest.fixture(scope="module")
def executed(folder: pathlib.Path, environment: dict[str, str]) -> dict[str, Any]:
    """Each notebook with its outputs."""
    return {name: render.execute(name, folder, environment) for name in render.NAMES}


def _outputs(notebook: Any, kind: str) -> list[Any]:
    return [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == kind]


def _text(notebook: Any) -> str:
    return "".join(out.text for out in _outputs(notebook, "stream"))


def _pictures(notebook: Any) -> list[np.ndarray]:
    shown = [*_outputs(notebook, "display_data"), *_outputs(notebook, "execute_result")]
    pngs = [out.data["image/png"] for out in shown if "image/png" in out.data]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")) for png in pngs]


# ---------------------------------------------------------------- what a reader sees


@pytest.mark.parametrize("name", render.NAMES)
def test_pictures_are_drawn_and_nothing_is_complained_of(executed: dict[str, Any], name: str) -> None:
    pictures = _pictures(executed[name])
    assert len(pictures) == PICTURES[name]
    for picture in pictures:
        assert picture.shape[1] > 200 and len(np.unique(picture)) > 10 and picture.std() > 5, "a blank picture"
    complaints = [out.text for out in _outputs(executed[name], "stream") if out.name == "stderr"]
    assert complaints == []
    assert "1 device(s) of kind CPU" in _text(executed[name])


def test_training_leaves_a_work_directory(executed: dict[str, Any]) -> None:
    notebook = executed["train_digits"]
    text = _text(notebook)
    assert "tokenizer  0.38 M parameters, 40 steps of 64" in text and "generator  0.71 M parameters" in text
    (told,) = (out.data["text/markdown"] for out in _outputs(notebook, "execute_result") if "text/markdown" in out.data)
    for row in ("heldout_n40", "samples_n40", "untrained_n40"):
        assert re.search(rf"\| {row} \| \d+\.\d\d\d \|", told), told
    headings = [out.data["text/markdown"] for out in _outputs(notebook, "display_data") if "text/markdown" in out.data]
    assert headings == ["generator, step 40"], "the live heading ends at the last step"


def test_interrupted_training_goes_on(folder: pathlib.Path, environment: dict[str, str]) -> None:
    """The stop button while the generator is trained, then the cell again, in the same kernel."""
    workdir = folder / "interrupted"
    notebook = render.nbformat.read(ROOT / "notebooks/train_digits.ipynb", as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "redraw_until" in cell.source)
    client = render.nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})

    (settings,) = (cell for cell in notebook.cells if cell.source.startswith("SHORT = "))
    settings.source = settings.source.replace('"train.steps=40"', '"train.steps=120"')  # time to press the button
    ended = threading.Event()

    def press_stop() -> None:
        while not ended.wait(0.05):
            if any(row["stage"] == "generator" for row in read_metrics(workdir)):
                os.kill(client.km.provisioner.pid, signal.SIGINT)
                return

    with client.setup_kernel(env={**os.environ, **environment, "RAR_JAX_WORKDIR": str(workdir)}):
        for index, cell in enumerate(notebook.cells[:place]):
            client.execute_cell(cell, index)
        threading.Thread(target=press_stop, daemon=True).start()
        try:
            with pytest.raises(CellExecutionError, match=r"KeyboardInterrupt|Preempted"):
                client.execute_cell(notebook.cells[place], place)
        finally:
            ended.set()
        assert not (workdir / "result.json").exists() and ledger.read_ledger(workdir)[-1]["reason"] in (
            "interrupted",
            "preempted",
        )
        client.execute_cell(notebook.cells[place], place)
    assert (workdir / "result.json").is_file() and ledger.read_ledger(workdir)[-1]["reason"] == "done"


def test_sampling_says_which_weights(executed: dict[str, Any]) -> None:
    text = _text(executed["sample"])
    assert "Not rar_b: rar_b.bin is not here" in text and "not the released ones" in text
    assert "golden retriever, otter -> [207, 360]" in text and "Did you mean 'goldfish'" in text


def test_sampling_from_given_weights(folder: pathlib.Path, environment: dict[str, str], released_pair: Any) -> None:
    """A directory of ImageNet's 1000 classes, as `rar-jax convert` makes it of released files."""
    config, weights = dataclasses.replace(rar.TINY, num_tokens=64, num_classes=1000), folder / "rar_1000"
    interop_rar.save(folder / "rar_1000.safetensors", config, rar.init(config, jax.random.key(0)))
    convert_weights(str(folder / "rar_1000.safetensors"), weights, tokenizer=str(released_pair.tokenizer), quiet=True)
    told = json.loads((weights / "config.json").read_text())
    told["data"]["class_names"] = list(imagenet.class_names())  # convert knows them of the released sizes
    (weights / "config.json").write_text(json.dumps(told))
    notebook = render.execute("sample", folder, {**environment, "RAR_JAX_WEIGHTS": str(weights)})
    text = _text(notebook)
    assert f"These are the released or given weights {weights}." in text and "1000 classes" in text
    assert "Not " not in text and len(_pictures(notebook)) == PICTURES["sample"]


def test_sampling_from_a_run_of_one_s_own(
    executed: dict[str, Any], folder: pathlib.Path, environment: dict[str, str]
) -> None:
    """A work directory, whose classes are not ImageNet's."""
    weights = environment["RAR_JAX_WORKDIR"]
    notebook = render.execute("sample", folder, {**environment, "RAR_JAX_WEIGHTS": weights})
    assert f"These are the released or given weights {weights}." in (text := _text(notebook)) and "10 classes" in text
    assert len(_pictures(notebook)) == PICTURES["sample"]


def test_how_rar_works_was_of_the_trained_model(executed: dict[str, Any]) -> None:
    text = _text(executed["how_rar_works"])
    assert "16 tokens of 64 codes an image, 4 layers of 4 heads" in text
    bits = [float(x) for x in re.findall(r"(\d+\.\d{3}) w", text)]
    assert len(bits) == 4 and bits[0] != bits[1] and all(3 < x < 9 for x in bits)


# ---------------------------------------------------------------- on a machine that has nothing yet


@pytest.mark.parametrize("name", render.NAMES)
@pytest.mark.parametrize(
    ("files", "extra"), [((), "hub"), (("nvidia-smi",), "hub,cuda12"), (("/dev/vfio/0",), "hub,tpu")]
)
def test_the_first_cell_installs_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, name: str, files: tuple[str, ...], extra: str
) -> None:
    code = next(c for c in render.nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4).cells if c.cell_type == "code")
    commands: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("os.path.exists", lambda path: path in files)
    monkeypatch.setattr("shutil.which", lambda name: name if name in files else None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    with pytest.raises(AssertionError, match="write the address of its repository"):
        exec(code.source, {})
    exec(code.source.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/rar_jax"'), {})
    ((*_, wanted),) = commands
    assert wanted == f"rar_jax[{extra}] @ git+https://example.org/rar_jax"


# ---------------------------------------------------------------- what is in git


def test_all_notebooks_are_tested() -> None:
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(render.NAMES)


@pytest.mark.parametrize("name", render.NAMES)
def test_outputs_are_stripped(name: str) -> None:
    notebook = render.nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)
    render.nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"{cell.id}: clear all outputs"
        assert cell.metadata == {}, f"{cell.id} has metadata: {cell.metadata}"
    assert notebook.metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", render.NAMES)
def test_the_page_is_of_this_notebook(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    for cell in render.nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4).cells:
        if cell.cell_type in ("code", "markdown"):
            assert render.linked(cell.source.strip()) in page, (
                f"{cell.id} has changed: python docs/notebooks/render.py {name}"
            )
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert len(linked) == PICTURES[name]
    assert {PAGES / link for link in linked} == set((PAGES / f"{name}_files").iterdir())


def test_pages_are_small() -> None:
    assert sum(path.stat().st_size for path in PAGES.rglob("*") if path.is_file()) < 2e6


def test_a_page_is_written(executed: dict[str, Any], tmp_path: pathlib.Path) -> None:
    page = render.write("sample", executed["sample"], tmp_path, remark="Seen.")
    text = page.read_text()
    assert text.startswith("*Seen.*\n") and "[train_digits.ipynb](train_digits.md)" in text
    assert len(list((tmp_path / "sample_files").iterdir())) == PICTURES["sample"]
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        with Image.open(tmp_path / link) as image:
            assert image.format == "PNG"
