"""A work directory belongs to one experiment and says so."""

import copy
import json
import pathlib
import re
from typing import Any

import pytest

from rar_jax.errors import ConfigError
from rar_jax.runs.workdir import FORMAT, FREE_SECTIONS, MAX_SHOWN, Workdir

CONFIG: dict[str, Any] = {
    "name": "digits",
    "seed": 0,
    "train": {"steps": 100, "warmup": 5},
    "tokenizer": {"name": "maskgit_vq", "width_multipliers": (1, 2)},
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "sampling": {"scale": 2.0},
    "evaluate": {"samples": 1000},
}


def changed(**sections: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    for name, section in sections.items():
        config[name] = {**config[name], **section} if isinstance(section, dict) else section
    return config


def refusal(workdir: Workdir, config: dict[str, Any]) -> str:
    before = {p: p.read_bytes() for p in workdir.path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        workdir.claim(config)
    assert {p: p.read_bytes() for p in workdir.path.rglob("*") if p.is_file()} == before, "a refusal changes nothing"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["checkpoints", "tokens"])
def begun(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Workdir:
    """Claimed, and something was made in it."""
    workdir = Workdir(tmp_path / "runs" / "x")
    workdir.claim(CONFIG)
    (workdir.path / request.param / "part").mkdir(parents=True)
    return workdir


def test_the_layout(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(str(tmp_path))
    assert workdir.config == tmp_path / "config.json" and workdir.result == tmp_path / "result.json"
    assert workdir.checkpoints("tokenizer") == tmp_path / "checkpoints" / "tokenizer"
    assert workdir.tokens("heldout") == tmp_path / "tokens" / "heldout"


def test_claim_makes_the_folder_and_writes_the_config(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path / "a" / "b")
    workdir.claim(CONFIG)
    expected = changed(tokenizer={"width_multipliers": [1, 2]})
    assert workdir.read_config() == expected
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == {"version": FORMAT, **expected}
    assert [p.name for p in workdir.path.iterdir()] == ["config.json"]


def test_the_same_config_again(begun: Workdir) -> None:
    """Tuples and lists are the same in JSON."""
    before = begun.read_config()
    begun.claim(CONFIG)
    begun.claim(changed(tokenizer={"width_multipliers": [1, 2]}))
    assert begun.read_config() == before


def test_another_config_is_refused_with_the_differences(begun: Workdir) -> None:
    other = changed(train={"steps": 200, "extra": "x"}, seed=1, tokenizer={"width_multipliers": (1, 4)})
    assert refusal(begun, other) == (
        f"{begun.path} belongs to a run of 'digits' with another config. Choose another --workdir, or undo: "
        "seed: 0 -> 1; tokenizer.width_multipliers: [1, 2] -> [1, 4]; train.extra: (absent) -> x; train.steps: 100 -> 200"
    )


def test_the_directory_of_another_experiment_is_named(begun: Workdir) -> None:
    many = {f"key_{i}": i for i in range(20)}
    assert refusal(begun, changed(name="other", seed=1)) == (
        f"{begun.path} belongs to a run of 'digits' with another config. Choose another --workdir, or undo: "
        "name: digits -> other; seed: 0 -> 1"
    )
    message = refusal(begun, changed(train=many))
    assert message.count(" -> ") == MAX_SHOWN and message.endswith(f"; and {len(many) - MAX_SHOWN} more")


def test_of_long_values_the_difference_is_told(tmp_path: pathlib.Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    workdir, config = Workdir(tmp_path), {**CONFIG, "data": {"class_names": names}}
    workdir.claim(config)
    workdir.checkpoints("tokenizer").mkdir(parents=True)
    other = {"class_names": [*names[:900], "another", *names[901:]]}
    for data in (other, {**other, "source": "folder:b"}):  # of the same source, and of another
        told = refusal(workdir, {**config, "data": data})
        before, after = re.search(r"class_names:? (.*?) -> ([^;]*)", told).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert len(told) < 700 and "class 900" in before and "another" in after and "class 901" in after


def test_configs_are_compared_after_defaults_are_filled_in(begun: Workdir) -> None:
    def fill_defaults(config: dict[str, Any]) -> dict[str, Any]:
        return config | {"train": {"dropout": 0.0, **config["train"]}}

    begun.claim(changed(train={"dropout": 0.0}), fill_defaults)
    assert begun.read_config()["train"]["dropout"] == 0.0
    begun.write_config(CONFIG)
    with pytest.raises(ConfigError, match=r"undo: train\.dropout: 0\.0 -> 0\.1$"):
        begun.claim(changed(train={"dropout": 0.1}), fill_defaults)


@pytest.mark.parametrize("version", [None, "0.1", "0.3"])
def test_another_version(begun: Workdir, version: str | None) -> None:
    config = {"version": version, **CONFIG} if version else CONFIG
    begun.config.write_text(json.dumps(config))
    assert f"was made by rar_jax {version or '0.1'}, and this version reads {FORMAT}" in refusal(begun, CONFIG)


def test_free_sections_may_change_and_are_written(begun: Workdir) -> None:
    assert FREE_SECTIONS == ("mesh", "sampling", "evaluate", "wandb")
    other = changed(mesh={"fsdp": 4}, sampling={"scale": 4.0, "power": 1.0}, evaluate={"samples": 50}, wandb="digits")
    begun.claim(other)
    assert begun.read_config()["mesh"]["fsdp"] == 4 and begun.read_config()["sampling"] == {"scale": 4.0, "power": 1.0}
    # A free section does not carry a bound one past the check.
    assert "undo: seed: 0 -> 1" in refusal(begun, changed(mesh={"fsdp": 2}, seed=1))


def test_until_something_is_made_it_can_change_hands(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    workdir.claim(changed(seed=1))
    assert workdir.read_config()["seed"] == 1


def test_a_foreign_folder_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "zebra").mkdir()
    assert refusal(Workdir(tmp_path), CONFIG) == (
        f"{tmp_path} has no config.json but holds thesis.tex: choose another --workdir"
    )


def test_checkpoints_whose_config_was_lost_are_refused(begun: Workdir) -> None:
    begun.config.unlink()
    assert "has no config.json but holds" in refusal(begun, CONFIG)


def test_an_empty_folder_and_what_a_killed_claim_leaves_are_fine(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json.tmp").write_text('{"half": ')
    (tmp_path / ".DS_Store").touch()
    Workdir(tmp_path).claim(CONFIG)
    assert Workdir(tmp_path).read_config()["seed"] == 0


def test_the_same_config_after_its_checkpoints_were_deleted(tmp_path: pathlib.Path) -> None:
    """config.json says whose the rest is."""
    workdir = Workdir(tmp_path)
    workdir.claim(CONFIG)
    (tmp_path / "metrics.jsonl").touch()
    workdir.claim(CONFIG)
    text = refusal(workdir, changed(seed=1))
    assert "seed: 0 -> 1" in text and "no config.json" not in text


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"\xff\xfe\x00", b"[1, 2]", b"null", b"3"])
def test_a_damaged_config(begun: Workdir, content: bytes) -> None:
    begun.config.write_bytes(content)
    assert refusal(begun, CONFIG).startswith(f"{begun.config} is damaged")
    with pytest.raises(ConfigError, match=r"config\.json is damaged .*: restore it or choose another --workdir"):
        begun.read_config()


def test_reading_what_is_no_work_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Workdir(tmp_path).read_config()
    assert (
        str(caught.value)
        == f"{tmp_path} is not a work directory: it has no config.json. Give the --workdir of rar-jax run"
    )


def test_a_file_in_the_place_of_the_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        Workdir(tmp_path / "x").claim(CONFIG)
