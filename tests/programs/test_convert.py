"""convert: released -> ours -> released, with what was read and written on record, and nothing left behind by a failure."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from torch_files import read_tensors, write_state_dict

from rar_jax import cli
from rar_jax.generators.rar import TINY, init
from rar_jax.weights import rar


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def converted(*argv: Any) -> int:
    return cli.main(["convert", "--quiet", *(str(a) for a in argv)])


def problem(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert converted(*argv) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


def test_there_and_back(released_pair: Any, tmp_path: pathlib.Path) -> None:
    ours = tmp_path / "ours"
    assert converted("--weights", released_pair.generator, "--tokenizer", released_pair.tokenizer, "--out", ours) == 0
    config = json.loads((ours / "config.json").read_text())
    assert config["converted_from"] == {
        kind: {"path": path.name, "sha256": sha256(path)}
        for kind, path in (("generator", released_pair.generator), ("tokenizer", released_pair.tokenizer))
    }
    for part, original in (("generator", released_pair.generator), ("tokenizer", released_pair.tokenizer)):
        out = tmp_path / f"{part}.safetensors"
        assert converted("--weights", ours, "--part", part, "--out", out) == 0
        before, after = read_tensors(original), read_tensors(out)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        record = json.loads(out.with_name(f"{out.name}.json").read_text())
        assert (record["sha256"], record["bytes"]) == (sha256(out), out.stat().st_size)
        assert record["config"]["name"] == {"generator": "rar", "tokenizer": "maskgit_vq"}[part]
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 2


@pytest.mark.parametrize("which", ["generator", "tokenizer"])
def test_file_to_file_knows_what_it_is(released_pair: Any, tmp_path: pathlib.Path, which: str) -> None:
    source = getattr(released_pair, which)
    assert converted("--weights", source, "--out", tmp_path / "x.safetensors") == 0
    assert read_tensors(tmp_path / "x.safetensors").keys() == read_tensors(source).keys()
    record = json.loads((tmp_path / "x.safetensors.json").read_text())
    assert record["made_from"] == {"path": source.name, "sha256": sha256(source)}


def test_what_cannot_be_done(released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator, tokenizer = released_pair
    out = tmp_path / "out"
    assert "give --tokenizer too" in problem(capsys, "--weights", generator, "--out", out)
    assert "leave --tokenizer out" in problem(
        capsys, "--weights", generator, "--tokenizer", tokenizer, "--out", tmp_path / "o.safetensors"
    )
    assert "--part is for an --out that is a file" in problem(
        capsys, "--weights", generator, "--tokenizer", tokenizer, "--part", "generator", "--out", out
    )
    line = problem(capsys, "--weights", tokenizer, "--tokenizer", tokenizer, "--out", out)
    assert "is a tokenizer (maskgit_vq), not a generator" in line and len(line) < 400
    assert "is a generator (rar), not a tokenizer" in problem(
        capsys, "--weights", generator, "--tokenizer", generator, "--out", out
    )
    assert f"there is no folder {tmp_path / 'no'}" in problem(
        capsys, "--weights", generator, "--out", tmp_path / "no" / "x.safetensors"
    )
    (tmp_path / "there.safetensors").touch()
    assert "exists: choose another" in problem(capsys, "--weights", generator, "--out", tmp_path / "there.safetensors")
    (tmp_path / "o2.safetensors.json").write_text("precious")
    assert "o2.safetensors.json exists" in problem(capsys, "--weights", generator, "--out", tmp_path / "o2.safetensors")
    (tmp_path / "text.bin").write_text("hello")
    assert "no weights file" in problem(capsys, "--weights", tmp_path / "text.bin", "--out", tmp_path / "o.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"there.safetensors", "text.bin", "o2.safetensors.json"}, (
        "a failure leaves nothing"
    )


def test_a_generator_that_does_not_fit_the_tokenizer(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(TINY, codebook_size=16)
    rar.save(tmp_path / "other.safetensors", config, init(config, jax.random.key(0)))
    line = problem(
        capsys,
        "--weights",
        tmp_path / "other.safetensors",
        "--tokenizer",
        released_pair.tokenizer,
        "--out",
        tmp_path / "o",
    )
    assert "the generator draws 16 ids of 16 codes, the tokenizer decodes 64 ids of 32 codes" in line
    assert {p.name for p in tmp_path.iterdir()} == {"other.safetensors"}


def test_damage_found_late_leaves_nothing(
    released_pair: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_state_dict(tmp_path / "bad.bin", read_tensors(released_pair.generator))
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    whole.write_bytes(data)
    for out in (tmp_path / "o.safetensors", tmp_path / "o"):
        extra = () if out.suffix else ("--tokenizer", released_pair.tokenizer)
        assert "is truncated or damaged" in problem(capsys, "--weights", tmp_path / "bad.bin", *extra, "--out", out)
        assert not out.exists()
