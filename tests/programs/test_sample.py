"""The command and the pictures that it writes."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from rar_jax import cli, load
from rar_jax.sampling import to_uint8
from rar_jax.weights import rar as interop


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def test_from_released_files_to_pictures(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sample", "--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--classes", "7,3"]
    argv += ["--per-class", "3", "--seed", "5", "--sampling.scale=2", "--sampling.power=1", "--batch-size", "2"]
    argv += ["--out", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 0
    expected = load(released_pair.generator, tokenizer=released_pair.tokenizer).sample(
        [7, 7, 7, 3, 3, 3], seed=5, scale=2.0, power=1, batch_size=2
    )
    names = ["0007_000", "0007_001", "0007_002", "0003_000", "0003_001", "0003_002"]
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}.png")), image)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{name}.png" for name in names} | {"grid.png"}
    # Two devices share a copy of the generator: the same images.
    shared = [*map(str, argv[:-1]), str(tmp_path / "shared"), "--tensor"]
    assert cli.main([*shared, "2"]) == 0
    for name in names:
        assert (tmp_path / "shared" / f"{name}.png").read_bytes() == (tmp_path / "out" / f"{name}.png").read_bytes()
    assert cli.main([*shared, "3"]) == 2 and "'tensor': 3} does not multiply to 4 devices" in capsys.readouterr().err


def test_a_part_of_an_image_is_drawn(
    released_pair: Any, image: np.ndarray, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """White is drawn, from row 5 on: the tokens of rows 4 and 5 are the first of 8x8 that are drawn."""
    mask = np.zeros((16, 16), np.uint8)
    mask[5:] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["sample", "--weights", str(released_pair.generator), "--tokenizer", str(released_pair.tokenizer), "--quiet"]
    argv += ["--classes", "3", "--per-class", "2", "--sampling.greedy=True", "--out", str(tmp_path / "out")]
    argv += ["--complete", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]

    def drawn(*more: str) -> np.ndarray:
        assert cli.main([*argv, *more]) == 0
        return np.stack([np.asarray(Image.open(tmp_path / "out" / f"0003_00{n}.png")) for n in range(2)])

    pipeline = load(released_pair.generator, tokenizer=released_pair.tokenizer)
    generator, tokenizer = pipeline.generator, pipeline.tokenizer
    tokens = np.array(tokenizer.module.encode(tokenizer.config, pipeline.tokenizer_params, image[None]))
    params, logits = interop.load(released_pair.generator)[1], jax.jit(generator.module.logits, static_argnums=0)
    for place in range(16, 64):  # by hand, without a cache
        logits_bnv = logits(generator.config, params, tokens, np.array([3]), np.arange(64)[None])
        tokens[:, place] = np.argmax(logits_bnv[:, place], axis=-1)
    expected = np.asarray(to_uint8(tokenizer.module.decode(tokenizer.config, pipeline.tokenizer_params, tokens)))[0]
    found = drawn()
    assert np.abs(found.astype(int) - expected).max() <= 1
    kept = drawn("--keep-pixels")
    np.testing.assert_array_equal(kept[:, :5], np.stack([image[:5]] * 2))
    np.testing.assert_array_equal(kept[:, 5:], found[:, 5:])


@pytest.mark.parametrize(
    ("rows", "size", "problem"),
    [
        (slice(0, 4), 16, "it can only complete images whose first tokens are known"),
        (slice(0, 0), 16, "the mask is False (black) everywhere: there is nothing to draw"),
        (slice(8, 16), 20, "the mask is bool [20, 20]: it must be bool [16, 16]"),
    ],
)
def test_a_mask_that_cannot_be_drawn(
    released_pair: Any, image: np.ndarray, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], rows: slice,
    size: int, problem: str,
) -> None:  # fmt: skip
    mask = np.zeros((size, size), np.uint8)
    mask[rows] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["sample", "--weights", str(released_pair.generator), "--tokenizer", str(released_pair.tokenizer), "--quiet"]
    argv += ["--classes", "3", "--out", str(tmp_path / "out"), "--complete", str(tmp_path / "image.png")]
    assert cli.main(argv) == 2 and "--complete and --mask go together" in capsys.readouterr().err
    assert cli.main([*argv, "--mask", str(tmp_path / "mask.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and problem in err


def test_every_class_is_drawn_the_last_one_too(released_pair: Any, tmp_path: pathlib.Path) -> None:
    argv = ["--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--out", tmp_path / "out"]
    assert cli.main(["sample", "--per-class", "1", "--quiet", *map(str, argv)]) == 0
    assert {p.name for p in (tmp_path / "out").glob("0*.png")} == {f"{label:04d}_000.png" for label in range(10)}


def test_a_grid_shows_no_more_than_can_be_looked_at(
    released_pair: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rar_jax.programs.sample.ROWS", 2)
    monkeypatch.setattr("rar_jax.programs.sample.COLUMNS", 1)
    argv = ["sample", "--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--classes", "1-3"]
    argv += ["--per-class", "2", "--out", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 0
    assert "6 images in" in (out := capsys.readouterr().out) and "2 of them in" in out
    assert len(list((tmp_path / "out").glob("0*.png"))) == 6
    assert cli.main([str(a) for a in [*argv[:-4], "--per-class", "99999999999", "--out", tmp_path / "o"]]) == 2
    assert "are more than 100000" in capsys.readouterr().err


def test_a_file_where_the_folder_should_be(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    argv = ["sample", "--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--quiet"]
    assert cli.main([*map(str, argv), "--out", str(tmp_path / "file" / "x")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is a file where a folder should be" in err


def test_one_line_for_a_wrong_file(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "sample",
        "--weights",
        released_pair.tokenizer,
        "--tokenizer",
        released_pair.generator,
        "--out",
        tmp_path / "o",
    ]
    assert cli.main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is a tokenizer (maskgit_vq), not a generator" in err
    assert not (tmp_path / "o").exists()
