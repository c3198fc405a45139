"""`rar-jax plan`: rates, remedies, all programs over four fake devices, and the text."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import types
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from rar_jax import cli
from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment, resolve
from rar_jax.parallel.mesh import AXES, mesh_sizes
from rar_jax.tools.plan import hlo
from rar_jax.tools.plan import plan as plan_module
from rar_jax.tools.plan import programs as plan_programs
from rar_jax.tools.plan.plan import list_parts, list_remedies, plan_experiment
from rar_jax.tools.plan.programs import DoesNotFitError
from rar_jax.tools.plan.text import format_plan
from rar_jax.tools.plan.topology import parse_topology

TEXT = "ENTRY %main (p: s32[]) -> s32[] {\n  ROOT %p = s32[] parameter(0)\n}"
SMALL = (
    "generator.width=32", "generator.depth=2", "generator.num_heads=4", "generator.mlp_width=64", "train.batch_size=8",
    "tokenizer.base_width=8", "tokenizer.latent_width=8",
)  # fmt: skip


def experiment_of(name: str, *overrides: str) -> Experiment:
    return resolve(load_experiment(name, overrides), name)


# ---------------------------------------------------------------- what is planned, without compiling


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program fits and takes a second; nothing is lowered."""
    measured = {"compile_seconds": 1.0, "memory": {}, "collectives": {}, "seconds": {"all": 1.0}}
    monkeypatch.setattr(plan_module, "find_topology_devices", lambda topology: [jax.devices()[0]] * topology.chips)
    monkeypatch.setattr(
        plan_module, "make_mesh", lambda config, devices: AbstractMesh(tuple(mesh_sizes(config, len(devices))), AXES)
    )
    monkeypatch.setattr(plan_module.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(plan_module, "measure_program", lambda *args: dict(measured))
    for name in ("lower_training", "lower_tokenizing", "lower_sampling"):
        monkeypatch.setattr(plan_module, name, lambda *args: None)


@pytest.mark.parametrize(("topology", "fsdp"), [("v5e:1x1", 1), ("v5e:1x2", 2), ("v5e:2x4", 4)])
def test_fewer_chips_than_the_mesh_asks_for(uncompiled: None, topology: str, fsdp: int) -> None:
    """RAR-XXL has fsdp 4."""
    messages: list[str] = []
    report = plan_experiment(experiment_of("rar_xxl"), parse_topology(topology), parts=("train",), say=messages.append)
    assert report["mesh"]["fsdp"] == fsdp and report["mesh"]["tensor"] == 1
    assert [f"planning with --config.mesh.fsdp={fsdp}" in text for text in messages[:-1]] == [True] * (fsdp < 4)


def test_rates_of_a_step_that_takes_a_second(uncompiled: None) -> None:
    train = plan_experiment(experiment_of("rar_b"), parse_topology("v5e:4x4"), parts=("train",))["train"]
    # The model's FLOPs in docs/topologies.md, which leave the masked half of the attention out.
    assert train["model_flops"] == pytest.approx(825901726040064, rel=0.02)
    assert train["mfu"] == train["model_flops"] / (16 * 197e12) and train["images_per_second"] == 2048
    assert (train["days"], train["chip_hours"]) == pytest.approx((250_000 / 86400, 16 * 250_000 / 3600))


@pytest.mark.parametrize(
    ("topology", "tensor", "rows", "batch_size"),
    [("v5e:2x4", 1, 32, 256), ("v5e:2x4", 8, 256, 256), ("v5e:8x12", 1, 3, 288), ("v5e:16x32", 1, 1, 512)],
)
def test_images_that_a_chip_encodes_at_a_time(
    uncompiled: None, topology: str, tensor: int, rows: int, batch_size: int
) -> None:
    """256 at a time, rounded up to what divides; chips of one tensor group have the same images."""
    experiment = experiment_of("digits", *SMALL, f"mesh.tensor={tensor}")
    tokens = plan_experiment(experiment, parse_topology(topology), parts=("tokenize",))["tokenize"]
    assert (tokens["rows"], tokens["batch_size"], tokens["images_per_second"]) == (rows, batch_size, batch_size)
    ten = experiment_of("rar_b", "data.crop=ten")
    assert plan_experiment(ten, parse_topology(topology), parts=("tokenize",))["tokenize"]["images"] == 12_811_670


def test_tokens_that_are_not_made_are_not_planned(uncompiled: None) -> None:
    assert list_parts(experiment_of("digits")) == ("train", "tokenize", "sample")
    stored = experiment_of("digits", "data.tokens=store")
    on_the_fly = experiment_of("digits", "data.on_the_fly=True")
    assert list_parts(stored) == list_parts(on_the_fly) == ("train", "sample")
    for experiment, why in ((on_the_fly, "on_the_fly is set: images are encoded"), (stored, "no images to encode")):
        with pytest.raises(ConfigError, match=why):
            plan_experiment(experiment, parse_topology("v5e:1x1"), parts=("tokenize",))


def test_remedies_change_nothing_that_is_learned() -> None:
    experiment = experiment_of("rar_b")
    found = list(list_remedies(experiment, 16))
    assert [flags for flags, _ in found[:2]] == [
        ["--config.generator.remat=True"], ["--config.generator.remat=True", "--config.train.accumulation=2"],
    ]  # fmt: skip
    for flags, changed in found:
        by_flags = experiment_of("rar_b", *(flag.removeprefix("--config.") for flag in flags))
        assert changed == dataclasses.replace(by_flags, name="rar_b"), flags
        assert changed.train.batch_size == experiment.train.batch_size


def test_a_generator_without_remat() -> None:
    experiment = experiment_of("rar_b")
    config = dataclasses.make_dataclass("Config", [])()
    other = dataclasses.replace(experiment, generator=dataclasses.replace(experiment.generator, config=config))
    flags = [flags for flags, _ in list_remedies(other, 16)]
    assert flags[0] == ["--config.train.accumulation=2"] and "remat" not in str(flags)


def test_remedies_are_of_parts_that_divide_the_batch() -> None:
    found = [
        changed.train.accumulation for _, changed in list_remedies(experiment_of("rar_b", "train.batch_size=24"), 1)
    ]
    assert found == [1, 2, 4, 8]


# ---------------------------------------------------------------- compiled, as far as this machine can


@pytest.fixture
def as_if(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fake devices stand for a v5e:2x2, and every program takes a thousand million cycles: a CPU's text has none."""
    count = hlo.count_program
    monkeypatch.setattr(hlo, "count_program", lambda text: dataclasses.replace(count(text), cycles=1e9))
    places = np.array([[0, i, j] for i in range(2) for j in range(2)])
    monkeypatch.setattr(plan_module, "find_topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(plan_module.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(plan_programs, "list_coordinates", lambda topology, devices: places)


def test_the_whole_way(as_if: None) -> None:
    experiment = experiment_of("digits", *SMALL, "mesh.fsdp=2")
    report = plan_experiment(experiment, parse_topology("v5e:2x2"), sample_rows=2)
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and report["sample"]["batch_size"] == 8
    train, sample, config = report["train"], report["sample"], experiment.generator.config
    params = jax.eval_shape(lambda: experiment.generator.module.init(config, jax.random.key(0)))
    once = sum(4 * int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    assert once < train["memory"]["arguments"] < 3 * once  # three copies, most of each cut in two
    assert train["memory"]["arguments"] < train["memory"]["peak"] < 2**30
    # Weights are gathered over fsdp; every gradient is summed over all four, as scattered parts or whole.
    gathered = sum(4 * int(np.prod(x.shape)) for x in jax.tree.leaves(params) if x.ndim > 2)
    assert train["collectives"]["all-gather"]["bytes"] >= gathered
    # What samples send is their sums of features: two covariances in float32, and little else.
    sums = 4 * (2048**2 + 2023**2)
    assert sample["fits"] and sums < sample["collectives"]["all-reduce"]["bytes"] < 1.01 * sums
    # 256 images over the chips, each of which encodes its own.
    tokens = report["tokenize"]
    assert tokens["rows"] == 64 and tokens["images_per_second"] == pytest.approx(256 / tokens["seconds"]["all"])
    assert tokens["minutes"] == pytest.approx(1437 / tokens["images_per_second"] / 60) and not tokens["collectives"]
    text = format_plan(report)
    assert "training step, mesh data 2 x fsdp 2 x tensor 1" in text and "sampling and FID, 8 images at a time" in text
    assert "tokenizing, 64 images at a time on each chip" in text
    assert "images/s, if the hosts decode as many: 1437 in " in text
    assert json.loads(json.dumps(report)) == report


def test_a_model_that_is_cut_over_the_tensor_axis_samples(as_if: None) -> None:
    experiment = experiment_of("digits", *SMALL, "mesh.tensor=2")
    told = plan_experiment(experiment, parse_topology("v5e:2x2"), sample_rows=2, parts=("sample",))["sample"]
    whole = plan_experiment(
        experiment_of("digits", *SMALL), parse_topology("v5e:2x2"), sample_rows=2, parts=("sample",)
    )["sample"]
    assert told["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2} and (told["batch_size"], whole["batch_size"]) == (4, 8)
    params = [4 * x["memory"]["arguments"] for x in (told, whole)]
    assert params[0] < params[1], "each chip has a part of the generator's weights"
    # At each of the 17 slots, what heads and MLP make is summed over the axis, in two layers.
    assert told["collectives"]["all-reduce"]["count"] >= 2 * 2 * 17


def test_what_does_not_fit_and_then_does(as_if: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def compile_lowered(lowered: Any) -> Any:
        told.append("tried")
        if len(told) < 3:
            raise DoesNotFitError("Ran out of memory")
        memory = types.SimpleNamespace(argument_size_in_bytes=10, peak_memory_in_bytes=30)
        return types.SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: TEXT)

    monkeypatch.setattr(plan_programs, "compile_lowered", compile_lowered)
    experiment = experiment_of("digits", *SMALL)
    report = plan_experiment(experiment, parse_topology("v5e:2x2"), parts=("train",))
    assert report["train"] == {"fits": False, "why": "Ran out of memory", "state": report["train"]["state"]}
    assert report["remedy"]["flags"] == ["--config.generator.remat=True", "--config.train.accumulation=2"]
    assert report["remedy"]["train"]["seconds"]["all"] == pytest.approx(1e9 / 1.503e9, rel=1e-3)
    assert "sample" not in report and "it fits with --config.generator.remat=True" in format_plan(report)
    told.clear()
    as_it_is = plan_experiment(experiment, parse_topology("v5e:2x2"), parts=("train",), remedies=False)
    assert "remedy" not in as_it_is and told == ["tried"]


def test_only_a_full_memory_is_no_room() -> None:
    class Lowered:
        def __init__(self, message: str) -> None:
            self.message = message

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(self.message)

    with pytest.raises(DoesNotFitError, match=r"^Ran out of memory on HBM: 93\.01G$"):
        plan_programs.compile_lowered(Lowered("RESOURCE_EXHAUSTED: Ran out of memory on HBM: 93.01G\nmore"))  # pyright: ignore
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan_programs.compile_lowered(Lowered("INTERNAL: broken"))  # pyright: ignore


# ---------------------------------------------------------------- search


def test_search_ranks_the_meshes_that_could_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digits with two heads, which cannot be cut in four, on 8 chips, as if its state did not fit on one."""
    tried: list[tuple[int, ...]] = []

    def planned(changed: Experiment, topology: Any, *, parts: Any, remedies: bool, say: Any) -> dict[str, Any]:
        sizes = changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor
        tried.append(sizes)
        assert parts == ("train",) and not remedies and changed.train.batch_size == 8
        seconds = {"all": 1 + abs(sizes[1] - 4) + sizes[2], "exposed": 0.5}
        rates = {"mfu": 0.25, "images_per_second": 8 / seconds["all"], "days": 1.0}
        fits = {"fits": True, "memory": {"peak": 2**33, "available": 2**34}, "seconds": seconds, **rates}
        head = {"config": "digits", "topology": str(topology), "chips": 8, "versions": {"jax": "0"}}
        train = {"fits": False, "why": "full"} if sizes == (1, 4, 2) else fits
        return {**head, "mesh": dict(zip(AXES, sizes, strict=True)), "train": train}

    monkeypatch.setattr(plan_module, "plan_experiment", planned)
    monkeypatch.setattr(
        plan_module, "count_state_bytes", lambda _, mesh: 2**40 if mesh.shape["data"] == mesh.size else 2**20
    )
    argv = [
        "plan",
        "--config",
        "digits",
        "--search",
        *(f"--config.{x}" for x in SMALL),
        "--config.generator.num_heads=2",
    ]
    assert cli.main([*argv, "--topology", "v5e:2x4"]) == 0
    assert sorted(tried) == [(1, 4, 2), (1, 8, 1), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1)]
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[:2] == ["data 2 x fsdp 4 x tensor 1", "data 4 x fsdp 2 x tensor 1"] and len(rows) == 6
    assert rows[-1] == "data 1 x fsdp 4 x tensor 2"
    # One chip, which does not hold it: nothing is compiled.
    tried.clear()
    assert cli.main([*argv, "--topology", "v5e:1x1"]) == 2
    assert not tried and "no mesh of 1 chips holds digits" in capsys.readouterr().err


# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("name", ["rar_b", "rar_l", "rar_xl", "rar_xxl"])
def test_where_every_parameter_of_the_released_models_lies(name: str, golden: pathlib.Path) -> None:
    """Over 16 x 4 chips, none of which is here. `UPDATE_GOLDEN=1 pytest tests/tools/test_plan.py` refreshes."""
    mesh: Any = AbstractMesh((16, 4, 1), AXES)
    experiment = experiment_of(name)
    params = jax.tree_util.tree_leaves_with_path(plan_programs.shape_params(experiment.generator, mesh))
    ours: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{list(x.shape)} {x.sharding.spec}"
        for path, x in params
    }
    ours["state, bytes a chip"] = plan_programs.count_state_bytes(experiment, mesh)
    path = golden / "sharding" / f"{name}_16x4x1.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(ours, indent=1) + "\n")
    assert ours == json.loads(path.read_text())


def test_the_page_of_topologies_is_made_of_its_numbers() -> None:
    docs = pathlib.Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("topologies", docs / "measurements" / "topologies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    store = json.loads(module.STORE.read_text())
    assert set(store) <= set(module.cells()) and module.page(store) == module.PAGE.read_text()
    assert f"{module.COSTS[0]}\n\n{module.costs(store)}\n\n{module.COSTS[1]}" in module.GUIDE.read_text()


# ---------------------------------------------------------------- the command


def test_the_command(uncompiled: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    memory = dict.fromkeys(("arguments", "temporaries", "peak", "available"), 2**30)
    seconds = dict.fromkeys(("computing", "exposed", "overlapped", "all"), 1.0)
    measured = {"compile_seconds": 1.0, "memory": memory, "collectives": {}, "seconds": seconds}
    monkeypatch.setattr(plan_module, "measure_program", lambda *args: dict(measured))
    assert cli.main(["plan", "--config", "rar_b", "--topology", "v5e:2x4", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"train", "tokenize", "sample", "versions"}
    assert cli.main(["plan", "--config", "rar_b", "--topology", "v5e:2x4"]) == 0
    out = capsys.readouterr().out
    assert out.count("compiled by libtpu") == 1
    assert out.index("training step") < out.index("tokenizing, 32 images") < out.index("sampling and FID, 128 images")


@pytest.mark.slow
def test_tpu_s_own_compiler() -> None:
    """RAR of two layers on a v5e:2x2, really compiled: memory, collectives and cycles."""
    experiment = experiment_of("rar_b", "generator.depth=2", "generator.remat=True", "train.batch_size=32")
    report = plan_experiment(experiment, parse_topology("v5e:2x2"), parts=("train",))
    train = report["train"]
    assert train["fits"] and set(train["collectives"]) == {"all-reduce"} and 0 < train["mfu"] < 1
    assert train["seconds"]["all"] > train["model_flops"] / (4 * 197e12)
    small = experiment_of("rar_b", "tokenizer.base_width=32")
    tokens = plan_experiment(small, parse_topology("v5e:2x2"), parts=("tokenize",))["tokenize"]
    assert tokens["fits"] and tokens["rows"] == 64 and tokens["seconds"]["computing"] > 0
    small = experiment_of("rar_b", *SMALL, "generator.num_tokens=256")
    sample = plan_experiment(small, parse_topology("v5e:2x2"), parts=("sample",))["sample"]
    assert sample["fits"] and sample["batch_size"] == 64 and set(sample["collectives"]) == {"all-reduce"}
    nothing = plan_experiment(
        experiment_of("rar_xxl", "mesh.fsdp=1", "mesh.data=4"),
        parse_topology("v5e:2x2"),
        parts=("train",),
        remedies=False,
    )
    assert not nothing["train"]["fits"] and "HBM" in nothing["train"]["why"].upper()
