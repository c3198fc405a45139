"""`rar-jax plan`: arithmetic against hand counts, the whole way over four fake devices, and what is printed."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flops import multiplied
from jax.sharding import AbstractMesh

from rar_jax import cli
from rar_jax.config import load_experiment
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment, resolve
from rar_jax.parallel.mesh import AXES
from rar_jax.tools.plan import hlo
from rar_jax.tools.plan import plan as plan_module
from rar_jax.tools.plan import programs as plan_programs
from rar_jax.tools.plan import search as plan_search
from rar_jax.tools.plan.plan import plan, remedies_of
from rar_jax.tools.plan.programs import DoesNotFitError
from rar_jax.tools.plan.text import plan_text
from rar_jax.tools.plan.topology import parse_topology

SMALL = (
    "generator.width=32", "generator.depth=2", "generator.num_heads=4", "generator.mlp_width=64", "train.batch_size=8",
    "tokenizer.base_width=8", "tokenizer.latent_width=8",
)  # fmt: skip


def experiment_of(name: str, *overrides: str) -> Experiment:
    return resolve(load_experiment(name, overrides), name)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("fsdp", "name", "millions"), [(1, "rar_b", 259.28), (1, "rar_xxl", 1495.50)])
def test_state_on_a_gpu_is_parameters_and_two_moments(fsdp: int, name: str, millions: float) -> None:
    report = plan(experiment_of(name, f"mesh.fsdp={fsdp}"), parse_topology("gpu:8xH100"))
    assert report["from"] == "arithmetic" and report["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert report["train"]["memory"]["arguments"] == pytest.approx(12e6 * millions, rel=1e-4)


def test_fsdp_cuts_the_state_and_remat_is_what_makes_it_fit() -> None:
    whole, parts = (
        plan(experiment_of("rar_b", f"mesh.fsdp={n}"), parse_topology("gpu:8xH100"))["train"]["memory"]["arguments"]
        for n in (1, 8)
    )
    assert whole / 8 < parts < whole / 6  # tables, biases and norms stay whole
    report = plan(experiment_of("rar_b"), parse_topology("gpu:8xH100"))
    assert not report["train"]["fits"] and report["remedy"]["flags"] == ["--config.generator.remat=True"]
    told = report["remedy"]["train"]
    # 3 x 2 operations a weight and token are 4/3 of what is done at 40 % of the peak.
    assert told["mfu"] == pytest.approx(0.3) and told["images_per_second"] * told["seconds"]["all"] == pytest.approx(
        2048
    )
    assert told["days"] == pytest.approx(250_000 * told["seconds"]["all"] / 86400)
    text = plan_text(report)
    assert "arithmetic alone, nothing compiled" in text and "does NOT fit" in text and "which is assumed" in text


@pytest.mark.parametrize(("tensor", "rows", "fits"), [(1, 16, True), (2, 16, True), (1, 512, False)])
def test_sampling_on_gpus_is_weights_and_cache(tensor: int, rows: int, fits: bool) -> None:
    report = plan(
        experiment_of("rar_xxl", "mesh.fsdp=1", f"mesh.tensor={tensor}"),
        parse_topology("gpu:8xH100"),
        sample_rows=rows,
        parts=("sample",),
    )
    told, memory = report["sample"], report["sample"]["memory"]
    assert (told["fits"], told["batch_size"], told["mesh"]["tensor"]) == (fits, rows * 8 // tensor, tensor)
    cache = rows * 2 * 40 * 2 * 257 * 1408 * 4 / tensor
    assert memory["temporaries"] == pytest.approx(cache) and memory["peak"] == memory["arguments"] + cache
    assert memory["arguments"] == pytest.approx(4 * (1495.50e6 / tensor + 54.5e6), rel=0.01)
    text = plan_text(report)
    assert "training step" not in text and ("images/s of tokens alone" in text) == fits
    assert ("give fewer images a chip with --sample-rows" in text) != fits
    if rows == 16:  # a weight of 4 bytes is read 256 times, and so is most of what else there is
        least = rows * 8 / tensor / (256 * 4 * 1495.50e6 / tensor / 3350e9)
        assert least / 3 < told["images_per_second"] < least * 1.5


@pytest.mark.parametrize(("topology", "fsdp"), [("gpu:1x24GB", 1), ("gpu:2xH100", 2), ("gpu:8xH100", 4)])
def test_fewer_chips_than_the_mesh_asks_for(topology: str, fsdp: int) -> None:
    """RAR-XXL has fsdp 4. On one card its state alone is too much, and the plan says so."""
    said: list[str] = []
    report = plan(experiment_of("rar_xxl"), parse_topology(topology), say=said.append)
    assert report["mesh"]["fsdp"] == fsdp and report["mesh"]["tensor"] == 1
    assert [f"this is with --config.mesh.fsdp={fsdp}" in text for text in said] == [True] * (fsdp < 4)
    if fsdp == 1:
        state = report["train"]["memory"]["arguments"]
        assert state == pytest.approx(12e6 * 1495.50, rel=1e-3) and not report["train"]["fits"]
        assert "nothing that was tried makes it fit" in plan_text(report) and report["sample"]["fits"]


@pytest.mark.parametrize(("dtype", "operations"), [("float32", 67e12), ("bfloat16", 989e12)])
def test_tokenizing_on_gpus_is_arithmetic(dtype: str, operations: float) -> None:
    experiment = experiment_of("rar_b", f"tokenizer.dtype={dtype}")
    report = plan(experiment, parse_topology("gpu:8xH100"), parts=("tokenize",))
    told, tokenizer = report["tokenize"], experiment.tokenizer
    shapes = jax.eval_shape(lambda: tokenizer.module.init(tokenizer.config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((256, 256, 256, 3), jnp.uint8)
    encode = functools.partial(tokenizer.module.encode, tokenizer.config)
    assert told["rows"] == 32 and told["flops"] == pytest.approx(multiplied(encode, shapes, images), rel=0.02)
    assert told["images_per_second"] == pytest.approx(256 / (told["flops"] / (8 * 0.4 * operations)))
    assert told["minutes"] == pytest.approx(1_281_167 / told["images_per_second"] / 60)
    ten = plan(experiment_of("rar_b", "data.crop=ten"), parse_topology("gpu:8xH100"), parts=("tokenize",))["tokenize"]
    assert ten["images"] == 12_811_670
    assert "which is assumed (memory is not counted), if the hosts decode" in plan_text(report)


@pytest.mark.parametrize(
    ("topology", "tensor", "rows", "batch_size"),
    [("gpu:8xH100", 1, 32, 256), ("gpu:8xH100", 8, 256, 256), ("gpu:96xH100", 1, 3, 288), ("gpu:512xH100", 1, 1, 512)],
)
def test_images_that_a_chip_encodes_at_a_time(topology: str, tensor: int, rows: int, batch_size: int) -> None:
    """256 at a time, rounded up to what divides; chips that share a model's heads have the same images."""
    experiment = experiment_of("digits", *SMALL, f"mesh.tensor={tensor}")
    told = plan(experiment, parse_topology(topology), parts=("tokenize",))["tokenize"]
    assert (told["rows"], told["batch_size"]) == (rows, batch_size)


def test_tokens_that_are_not_made_are_not_planned() -> None:
    assert plan_module.parts_of(experiment_of("digits")) == ("train", "tokenize", "sample")
    assert plan_module.parts_of(experiment_of("digits", "data.tokens=store")) == ("train", "sample")
    on_the_fly = experiment_of("digits", "data.on_the_fly=True")
    assert plan_module.parts_of(on_the_fly) == ("train", "sample")
    given = experiment_of("digits", "data.tokens=store")
    for experiment, why in (
        (on_the_fly, "on_the_fly is set: images are encoded"),
        (given, "the tokens are there, none are"),
    ):
        with pytest.raises(ConfigError, match=why):
            plan(experiment, parse_topology("gpu:1xH100"), parts=("tokenize",))


def test_formulas_leave_a_tenth_of_the_memory() -> None:
    for name in ("rar_b", "rar_l", "rar_xl", "rar_xxl"):
        report = plan(experiment_of(name), parse_topology("gpu:8xH100"))
        for told in (report["train"], report["sample"], (report.get("remedy") or {}).get("train")):
            if told is not None:
                assert told["fits"] == (told["memory"]["peak"] < 0.9 * 79 * 2**30)
    assert "should fit, by formulas that are rough" in plan_text(report)


def test_remedies_change_nothing_that_is_learned() -> None:
    experiment = experiment_of("rar_b")
    found = list(remedies_of(experiment, 16))
    assert [flags for flags, _ in found[:2]] == [
        ["--config.generator.remat=True"], ["--config.generator.remat=True", "--config.train.accumulation=2"],
    ]  # fmt: skip
    for flags, changed in found:
        by_flags = experiment_of("rar_b", *(flag.removeprefix("--config.") for flag in flags))
        assert changed == dataclasses.replace(by_flags, name="rar_b"), flags
        assert changed.train.batch_size == experiment.train.batch_size


def test_remedies_are_of_parts_that_divide_the_batch() -> None:
    found = [changed.train.accumulation for _, changed in remedies_of(experiment_of("rar_b", "train.batch_size=24"), 1)]
    assert found == [1, 2, 4, 8]


# ---------------------------------------------------------------- compiled, as far as this machine can


@pytest.fixture
def as_if(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fake devices stand for a v5e:2x2, and every program takes a thousand million cycles: a CPU's text has none."""
    totals = hlo.totals
    monkeypatch.setattr(hlo, "totals", lambda text: dataclasses.replace(totals(text), cycles=1e9))
    places = np.array([[0, i, j] for i in range(2) for j in range(2)])
    monkeypatch.setattr(plan_module, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(plan_module.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(plan_programs, "chip_places", lambda topology, devices: places)


def test_the_whole_way(as_if: None) -> None:
    experiment = experiment_of("digits", *SMALL, "mesh.fsdp=2")
    report = plan(experiment, parse_topology("v5e:2x2"), sample_rows=2)
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and report["sample"]["batch_size"] == 8
    train, sample = report["train"], report["sample"]
    config, rows = experiment.generator.config, experiment.train.batch_size
    slots = config.num_tokens + 1
    masked = rows * config.depth * 4 * config.width * (slots * (slots - 1) // 2)
    assert train["flops"] == pytest.approx(train["model_flops"] + 3 * masked, rel=0.001)
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
    tokens, tokenizer = report["tokenize"], experiment.tokenizer
    shapes = jax.eval_shape(lambda: tokenizer.module.init(tokenizer.config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((256, 8, 8, 1), jnp.uint8)
    encode = functools.partial(tokenizer.module.encode, tokenizer.config)
    assert tokens["rows"] == 64 and tokens["flops"] == pytest.approx(multiplied(encode, shapes, images), rel=1e-6)
    assert tokens["images_per_second"] == pytest.approx(256 / tokens["seconds"]["all"])
    assert tokens["minutes"] == pytest.approx(1437 / tokens["images_per_second"] / 60) and not tokens["collectives"]
    text = plan_text(report)
    assert "training step, mesh data 2 x fsdp 2 x tensor 1" in text and "sampling and FID, 8 images at a time" in text
    assert "tokenizing, 64 images at a time on each chip" in text
    assert "images/s, if the hosts decode as many: 1437 in " in text
    assert json.loads(json.dumps(report)) == report


def test_a_model_that_is_cut_over_the_tensor_axis_samples(as_if: None) -> None:
    experiment = experiment_of("digits", *SMALL, "mesh.tensor=2")
    told = plan(experiment, parse_topology("v5e:2x2"), sample_rows=2, parts=("sample",))["sample"]
    whole = plan(experiment_of("digits", *SMALL), parse_topology("v5e:2x2"), sample_rows=2, parts=("sample",))["sample"]
    assert told["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2} and (told["batch_size"], whole["batch_size"]) == (4, 8)
    params = [4 * x["memory"]["arguments"] for x in (told, whole)]
    assert params[0] < params[1], "each chip has a part of the generator's weights"
    # At each of the 17 slots, what heads and MLP make is summed over the axis, in two layers.
    assert told["collectives"]["all-reduce"]["count"] >= 2 * 2 * 17


def test_one_chip_samples_as_each_of_four_does(as_if: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device the sampler computes modulations for distinct classes alone: how many there are is data."""
    experiment = experiment_of("digits", *SMALL)
    four = plan(experiment, parse_topology("v5e:2x2"), sample_rows=2, parts=("sample",))["sample"]
    monkeypatch.setattr(plan_module, "devices_of", lambda topology: jax.devices()[:1])
    one = plan(experiment, parse_topology("v5e:1x1"), sample_rows=2, parts=("sample",))["sample"]
    assert one["batch_size"] == 2 and one["flops"] == pytest.approx(four["flops"] / 4, rel=0.02)


def test_what_does_not_fit_and_then_does(as_if: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def compile_lowered(lowered: Any) -> Any:
        told.append("tried")
        if len(told) < 3:
            raise DoesNotFitError("Ran out of memory")
        return plan_programs.Compiled(1.0, 10, 20, 30, hlo.Totals(cycles=1.5e9))

    monkeypatch.setattr(plan_module, "compile_lowered", compile_lowered)
    experiment = experiment_of("digits", *SMALL)
    report = plan(experiment, parse_topology("v5e:2x2"), parts=("train",))
    assert report["train"] == {"fits": False, "why": "Ran out of memory", "state": report["train"]["state"]}
    assert report["remedy"]["flags"] == ["--config.generator.remat=True", "--config.train.accumulation=2"]
    assert report["remedy"]["train"]["seconds"]["all"] == pytest.approx(1.5e9 / 1.503e9, rel=1e-3)
    assert "sample" not in report and "it fits with --config.generator.remat=True" in plan_text(report)
    told.clear()
    as_it_is = plan(experiment, parse_topology("v5e:2x2"), parts=("train",), remedies=False)
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
        seconds = {"all": 1 + abs(sizes[1] - 4) + sizes[2], "wire": 0.5}
        rates = {"mfu": 0.25, "images_per_second": 8 / seconds["all"], "days": 1.0}
        fits = {"fits": True, "memory": {"peak": 2**33, "available": 2**34}, "seconds": seconds, **rates}
        head = {"config": "digits", "topology": str(topology), "chips": 8, "from": "compiler", "versions": {}}
        train = {"fits": False, "why": "full"} if sizes == (1, 4, 2) else fits
        return {**head, "mesh": dict(zip(AXES, sizes, strict=True)), "train": train}

    monkeypatch.setattr(plan_search, "plan", planned)
    monkeypatch.setattr(plan_search, "held_bytes", lambda _, mesh: 2**40 if mesh.shape["data"] == mesh.size else 2**20)
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
    params = jax.tree_util.tree_leaves_with_path(plan_programs.shapes_of(experiment.generator, mesh))
    ours: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{list(x.shape)} {x.sharding.spec}"
        for path, x in params
    }
    ours["state, bytes a chip"] = plan_programs.held_bytes(experiment, mesh)
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


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", "rar_b", "--topology", "gpu:8xH100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remedy"]["flags"] == ["--config.generator.remat=True"]
    assert cli.main(["plan", "--config", "rar_b", "--topology", "gpu:8xH100"]) == 0
    out = capsys.readouterr().out
    assert out.count("arithmetic alone") == 1
    assert out.index("training step") < out.index("tokenizing, 32 images") < out.index("sampling and FID, 128 images")
    assert cli.main(["plan", "--config", "rar_b", "--topology", "gpu:7xH100"]) == 2
    assert "train.batch_size 2048 is not divisible by the 7 devices" in capsys.readouterr().err


@pytest.mark.slow
def test_tpu_s_own_compiler() -> None:
    """RAR of two layers on a v5e:2x2, really compiled: what fits, FLOPs and cycles."""
    experiment = experiment_of("rar_b", "generator.depth=2", "generator.remat=True", "train.batch_size=32")
    report = plan(experiment, parse_topology("v5e:2x2"), parts=("train",))
    config, train = experiment.generator.config, report["train"]
    attended = 32 * 2 * 4 * config.width * 257
    blocks = 2 * 32 * 257 * 2 * (10 * config.width**2 + 2 * config.width * config.mlp_width) + attended * 257
    assert train["fits"] and train["flops"] == pytest.approx(
        train["model_flops"] + 3 * attended * 128 + blocks, rel=0.001
    )
    assert set(train["collectives"]) == {"all-reduce"} and 0 < train["mfu"] < 1
    assert train["seconds"]["computing"] > train["seconds"]["matmuls_at_peak"]
    small = experiment_of("rar_b", "tokenizer.base_width=32")
    tokens = plan(small, parse_topology("v5e:2x2"), parts=("tokenize",))["tokenize"]
    encode = functools.partial(small.tokenizer.module.encode, small.tokenizer.config)
    shapes = jax.eval_shape(lambda: small.tokenizer.module.init(small.tokenizer.config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((256, 256, 256, 3), jnp.uint8)
    assert tokens["fits"] and tokens["rows"] == 64
    assert tokens["flops"] == pytest.approx(multiplied(encode, shapes, images), rel=0.01)
    assert tokens["seconds"]["computing"] > tokens["seconds"]["matmuls_at_peak"] > 0
    nothing = plan(
        experiment_of("rar_xxl", "mesh.fsdp=1", "mesh.data=4"),
        parse_topology("v5e:2x2"),
        parts=("train",),
        remedies=False,
    )
    assert not nothing["train"]["fits"] and "HBM" in nothing["train"]["why"].upper()
