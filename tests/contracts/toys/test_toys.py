"""Two systems that share nothing with RAR go through the whole job on a mesh of four devices: floats and pairs of ids."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import rar_jax
from rar_jax.cli import main
from rar_jax.data.sources import load_source
from rar_jax.models import TokenSpec
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.runs.arrays import load_arrays, read_array_names
from rar_jax.runs.checkpoint import find_arrays
from rar_jax.runs.logging import read_metrics
from rar_jax.tokens.store import TokenStore

HERE = pathlib.Path(__file__).parent
STORES = {"flow": TokenSpec((4, 4, 8), "float16"), "pairs": TokenSpec((16, 2), "uint16", 16)}


@pytest.fixture(scope="module", params=STORES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    """Name and work directory of a finished run."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    config = str(HERE / f"job_{request.param}.py")
    assert main(["run", "--config", config, "--workdir", str(workdir), "--quiet"]) == 0
    return request.param, workdir


def test_the_run(job: tuple[str, pathlib.Path]) -> None:
    _, workdir = job
    for stage in ("tokenizer", "generator"):
        rows = [row["validation/loss"] for row in read_metrics(workdir, stage) if "validation/loss" in row]
        assert len(rows) == 2 and rows[1] < rows[0], (stage, rows)
    for picture in ("samples.png", "reconstructions.png", "curves.png", "grids/generator"):
        assert (workdir / picture).exists()
    result = json.loads((workdir / "result.json").read_text())
    scores, sampling = result["fd_classifier"], result["made_from"]["sampling"]
    assert scores["samples_n40"] < scores["untrained_n40"] and sampling["scale"] == 2.0
    assert sampling == dataclasses.asdict(rar_jax.load(workdir).sampling)


def test_the_store(job: tuple[str, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, workdir = job
    store = TokenStore(workdir / "tokens" / "train")
    assert store.spec == STORES[name] and len(store) == 1437
    assert (
        main(["tokenize", "--verify", str(store.folder), "--weights", str(workdir), "--out", str(tmp_path / "v.png")])
        == 0
    )
    assert main(["inspect", str(store.folder), "--json"]) == 0
    with Image.open(tmp_path / "v.png") as image:
        assert len(image.convert("L").getcolors(1 << 24) or ()) > 10


def test_resumed_is_the_same_to_the_bit(job: tuple[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """As if killed after step 20, by a copy without what came later."""
    name, workdir = job
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "generator" / "40")
    (tmp_path / "run" / "result.json").unlink()
    command = ["run", "--config", str(HERE / f"job_{name}.py"), "--workdir", str(tmp_path / "run"), "--quiet"]
    assert main(command) == 0
    folders = [find_arrays(run / "checkpoints" / "generator", 40) for run in (workdir, tmp_path / "run")]
    names = read_array_names(folders[0])
    assert names == read_array_names(folders[1]) and any(name.startswith("ema.") for name in names)
    for array, whole, resumed in zip(names, *(load_arrays(folder, names) for folder in folders), strict=True):
        np.testing.assert_array_equal(whole, resumed, err_msg=array)


def test_one_device_draws_what_four_draw(job: tuple[str, pathlib.Path]) -> None:
    _, workdir = job
    one, four = rar_jax.load(workdir), rar_jax.load(workdir, mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    images, sharded = (pipeline.sample(np.arange(10), seed=3).astype(int) for pipeline in (one, four))
    assert np.abs(images - sharded).max() <= 1 and len(np.unique(images)) > 10
    assert (one.sample(np.arange(10), seed=3, scale=None) != images).any()


def test_the_other_verbs(
    job: tuple[str, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, workdir = job
    config = str(HERE / f"job_{name}.py")
    assert main(["evaluate", "--config", config, "--workdir", str(workdir), "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fd_classifier"] == json.loads((workdir / "result.json").read_text())["fd_classifier"]
    assert main(["report", str(workdir), "--out", str(tmp_path / "report.html")]) == 0
    assert "fd_classifier" in (tmp_path / "report.html").read_text()
    assert main(["inspect", str(workdir)]) == 0
    capsys.readouterr()
    # Released files are of systems that have them.
    assert main(["convert", "--weights", str(workdir), "--out", str(tmp_path / "w.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"tests.contracts.toys.{name} has no released files" in error


def test_a_part_of_an_image(
    job: tuple[str, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flow draws a square in the middle; pairs of ids cannot be completed."""
    name, workdir = job
    image = load_source("digits", "heldout").gather(np.array([0]))["images"][0]
    mask = np.zeros((8, 8), bool)
    mask[3:6, 2:5] = True
    Image.fromarray(image[..., 0]).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = [
        "sample",
        "--weights",
        str(workdir),
        "--classes",
        "1,7",
        "--per-class",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--complete", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), "--quiet"]
    if name == "pairs":
        assert main(command) == 2
        assert "generator 'tests.contracts.toys.pairs' cannot complete images" in capsys.readouterr().err
        return
    touched = np.kron(mask.reshape(4, 2, 4, 2).any(axis=(1, 3)), np.ones((2, 2), bool))
    decoded = rar_jax.load(workdir).reconstruct(image[None])[0, ..., 0]

    def drawn(*more: str) -> np.ndarray:
        assert main([*command, *more]) == 0
        return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("0*.png"))])

    images, kept = drawn(), drawn("--keep-pixels")
    assert np.abs(images[:, ~touched].astype(int) - decoded[~touched]).max() <= 1
    assert len({x.tobytes() for x in images}) == 4
    np.testing.assert_array_equal(kept[:, ~mask], np.stack([image[..., 0][~mask]] * 4))
    np.testing.assert_array_equal(kept[:, mask], images[:, mask])
