"""The table of released files."""

import pathlib

import pytest

from rar_jax import cli

ROOT = pathlib.Path(__file__).parents[2]


def test_the_readme_has_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--markdown"]) == 0
    readme, table = (ROOT / "README.md").read_text(), capsys.readouterr().out
    assert table.count("\n") > 6 and table in readme


def test_published_sizes_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    """Of arXiv 2411.00776, tables 1 and 3; parameters of the released files, with their unused rows."""
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    for row in (
        ("rar_b", "260.9 M", "FID 1.95, IS 290.5, precision 0.82, recall 0.58", "scale 16, power 2.75, temperature 1"),
        ("rar_l", "461.7 M", "FID 1.70, IS 299.5, precision 0.81, recall 0.60", "scale 15.5, power 2.5"),
        ("rar_xl", "955.4 M", "FID 1.50, IS 306.9, precision 0.80, recall 0.62", "scale 6.9, power 1.5"),
        ("rar_xxl", "1498.5 M", "FID 1.48, IS 326.0, precision 0.80, recall 0.63", "scale 8, power 1.2"),
        ("maskgit-vqgan-imagenet-f16-256", "rFID 2.28", "fun-research/TiTok/resolve/main/maskgit-vqgan"),
    ):
        assert any(all(text in line for text in row) for line in out.splitlines()), row
    assert "(--fact NAME=VALUE): maskgit_vq: image_size" in out
