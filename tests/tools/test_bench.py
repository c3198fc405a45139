"""`rar-jax bench`: every bench runs, its numbers agree with one another and with counts made elsewhere."""

import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax import cli
from rar_jax.config import load_experiment
from rar_jax.experiment import Experiment, resolve
from rar_jax.generators import rar
from rar_jax.metrics import sums
from rar_jax.models import TokenSpec
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.tokenizers import maskgit_vq
from rar_jax.tools.bench import bench as bench_program
from rar_jax.tools.bench import cases as bench_cases
from rar_jax.tools.bench import ceilings
from rar_jax.tools.bench.bench import bench_experiment, compare_to_ceilings, describe_case, format_bench, time_case
from rar_jax.tools.bench.cases import Case, Options
from rar_jax.tools.bench.ceilings import Ceilings
from rar_jax.tools.costs import Cost

TINY = pathlib.Path(__file__).parents[1] / "experiments" / "tiny.py"
KEYS = {
    "batch_size", "unit", "rate", "repeats", "seconds", "compile_seconds", "flops", "bytes", "flops_per_second",
    "bytes_per_second", "share_of_ceiling", "limited_by",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matmul and 4 GB of memory are not for tests."""
    monkeypatch.setattr(ceilings, "MATMUL_SIZES", (64, 64))
    monkeypatch.setattr(ceilings, "MEMORY_SIZES", (2**16, 2**16))


@pytest.fixture(scope="module")
def tiny() -> Experiment:
    return resolve(load_experiment(str(TINY)), "tiny")


def check(report: dict[str, Any], unit: str, items: int, sizes: tuple[int, ...] = (4, 8)) -> None:
    """That the numbers of a report follow from one another. items: units in a step, as a multiple of the batch; 0: one."""
    assert json.loads(json.dumps(report)) == report
    assert (report["platform"], report["devices"], report["jax_version"]) == ("cpu", 4, jax.__version__)
    assert report["device_kind"] == jax.devices()[0].device_kind
    assert [r["batch_size"] for r in report["results"]] == list(sizes)
    for r in report["results"]:
        assert set(r) >= KEYS and r["unit"] == unit and r["repeats"] == 2
        low, median, high = (r["seconds"][name] for name in ("min", "median", "max"))
        assert 0 < low <= median <= high and median == pytest.approx((low + high) / 2)
        assert r["rate"] * median == pytest.approx(items * r["batch_size"] or 1)
        if r["flops"] is None:
            continue
        assert r["flops_per_second"] * median == pytest.approx(r["flops"])
        assert r["bytes_per_second"] * median == pytest.approx(r["bytes"])
        most = report["ceilings"]
        shares = {name: r[f"{name}_per_second"] / most[f"{name}_per_second"] for name in ("flops", "bytes")}
        assert r["share_of_ceiling"] == pytest.approx(max(shares.values()))
        assert r["limited_by"] == max(shares, key=lambda name: shares[name])


# ---------------------------------------------------------------- each bench


def test_sample(tiny: Experiment) -> None:
    report = bench_experiment(tiny, Options("sample", batch_sizes=(4, 8), repeats=2))
    check(report, "images", 1)
    assert report["sampling"]["scale"] and report["dtype"] == "float32"
    four, eight = (r["flops"] for r in report["results"])
    # 17 positions; 2 layers of width 32 and an MLP of 64; adaLN of 14 x 32 outputs for each label and for the null class, over
    # a mesh once per sample. Attention reads both stages of the cache: 8 positions of 8, 9 of 17.
    pairs = 8 * 8 + 9 * 17
    by_hand = [
        2
        * (17 * (2 * b * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32) + (b + 1) * 14 * 32 * 32) + 2 * b * 2 * 64 * pairs)
        for b in (4, 8)
    ]
    assert [four, eight] == by_hand
    assert "images/s" in format_bench(report) and ", scale 2" in format_bench(report)


def test_sample_to_images_costs_the_decoder_too(tiny: Experiment) -> None:
    plain, decoded = (
        bench_experiment(tiny, Options("sample", batch_sizes=(4,), repeats=2, dtype="bfloat16", decode=decode))
        for decode in (False, True)
    )
    check(decoded, "images", 1, (4,))
    assert decoded["dtype"] == "bfloat16"
    alone = bench_experiment(tiny, Options("tokenize", batch_sizes=(4,), repeats=2, decode=True))
    check(alone, "images", 1, (4,))
    assert decoded["results"][0]["flops"] == plain["results"][0]["flops"] + alone["results"][0]["flops"]
    assert decoded["results"][0]["bytes"] > plain["results"][0]["bytes"]


def test_train(tiny: Experiment) -> None:
    report = bench_experiment(tiny, Options("train", batch_sizes=(4, 8), repeats=2))
    check(report, "steps", 0)
    parameters = sum(x.size for x in jax.tree.leaves(rar.init(tiny.generator.config, jax.random.key(0))))
    c = tiny.generator.config
    for r in report["results"]:
        # Parameters and Adam's two moments, there and back; three int32 counters (the step, Adam's, the schedule's); and the
        # guard's history of 2 x 128 and its five. Besides the batch, a key, and a few metrics.
        state = 2 * 4 * (3 * parameters + 3 + 2 * 128 + 5)
        assert 0 < r["bytes"] - state - 4 * r["batch_size"] * (c.num_tokens + 1) < 64
        blocks = 2 * (10 * 32**2 + 2 * 32 * 64) + 2 * 32**2 + 32 * 32
        assert r["flops"] == 3 * 2 * r["batch_size"] * (17 * blocks + 2 * 2 * 32 * 17**2)


def test_a_device_without_bfloat16_is_benched_in_float32(monkeypatch: pytest.MonkeyPatch, tiny: Experiment) -> None:
    """As sample and train have it there; the weights and the bytes of a draw are then float32's too."""
    options, mesh = Options("sample", batch_sizes=(4,), dtype="bfloat16"), make_mesh(tiny.mesh)
    with monkeypatch.context() as patched:
        patched.setattr(bench_cases, "matmul_dtype", lambda dtype: "float32")  # see tests/parallel/test_mesh.py
        for what in ("sample", "train", "tokenize"):
            assert bench_cases.select_dtype(tiny, Options(what, dtype="bfloat16")) == "float32"
        (case,) = bench_cases.make_cases(tiny, mesh, options)
    (half,) = bench_cases.make_cases(tiny, mesh, options)
    assert case.cost and half.cost and case.cost.flops == half.cost.flops and 1.5 * half.cost.bytes < case.cost.bytes


def test_the_training_step_trains(tiny: Experiment) -> None:
    recipe = dataclasses.replace(tiny.train, warmup=0, learning_rate=1e-2, steps=100)
    experiment = dataclasses.replace(tiny, train=recipe)
    mesh = make_mesh(tiny.mesh)
    (case,) = bench_cases.make_train_cases(experiment, mesh, Options("train", batch_sizes=(16,)))
    losses = [float(case.run()) for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(32), abs=0.1), "random tokens of 32 codes"
    assert np.mean(losses[-5:]) < losses[0] - 0.1, "it is the same batch every time"


def test_evaluate(tiny: Experiment) -> None:
    report = bench_experiment(tiny, Options("evaluate", batch_sizes=(4,), repeats=2))
    check(report, "images", 1, (4,))
    # torchvision's documentation gives 5.71 G multiply-adds for an Inception v3 of 299 pixels. XLA does not count those with
    # the zeros of the padding.
    assert report["results"][0]["flops"] / 4 == pytest.approx(2 * 5.7e9, rel=0.05)


def test_evaluate_whole(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling and decoding are in what is counted, and in the program; Inception, which test_evaluate runs, is not."""

    def no_inception(params: Any, images: jax.Array, resize: Any = None) -> dict[str, jax.Array]:
        sizes = {"pool3": sums.POOL3, "spatial": sums.SPATIAL, "logits": sums.CLASSES}
        return {name: jnp.broadcast_to(images.mean((1, 2, 3))[:, None], (len(images), n)) for name, n in sizes.items()}

    monkeypatch.setattr(bench_cases, "extract_features", no_inception)
    whole = bench_experiment(tiny, Options("evaluate", batch_sizes=(4,), repeats=2, whole=True))
    alone = bench_experiment(tiny, Options("sample", batch_sizes=(4,), repeats=2, decode=True))
    check(whole, "images", 1, (4,))
    assert whole["sampling"]["scale"] and whole["results"][0]["flops"] == alone["results"][0]["flops"]


def test_tokenize(tiny: Experiment) -> None:
    report = bench_experiment(tiny, Options("tokenize", batch_sizes=(4, 8), repeats=2))
    check(report, "images", 1)
    four, eight = (r["flops"] for r in report["results"])
    assert eight == pytest.approx(2 * four, rel=0.01)


def test_loader(tiny: Experiment) -> None:
    report = bench_experiment(tiny, Options("loader", batch_sizes=(4, 8), repeats=2, records=5000))
    check(report, "records", 1)
    assert report["dtype"] is None
    for r in report["results"]:
        # 16 tokens, a label and a number: int32, int32 and int64 in a batch; on the disk uint16, and what else a record has.
        assert r["flops"] == 0 and 0 < r["bytes"] / r["batch_size"] - (16 * 4 + 4 + 8) - 16 * 2 < 32
        assert r["limited_by"] == "bytes" and 0 < r["share_of_ceiling"] < 1
        assert r["longest_wait_seconds"] >= r["seconds"]["min"]
    assert "longest wait" in format_bench(report)


def test_a_generator_whose_loops_depend_on_data_is_timed_all_the_same(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(config: Any, params: Any, labels: jax.Array, **_: Any) -> jax.Array:
        return jax.lax.fori_loop(0, labels[-1], lambda _, x: x + 1, jnp.zeros((len(labels), 16), jnp.int32))

    monkeypatch.setattr(rar, "sample", sample)
    report = bench_experiment(tiny, Options("sample", batch_sizes=(4,), repeats=2))
    check(report, "images", 1, (4,))
    (r,) = report["results"]
    assert r["flops"] is r["bytes"] is r["share_of_ceiling"] is r["limited_by"] is r["bytes_per_second"] is None
    assert f" {r['rate']:.4g} images/s" in format_bench(report)


# ---------------------------------------------------------------- times and ceilings


def test_seconds_are_of_a_step_and_the_first_run_does_not_count() -> None:
    runs: list[int] = []

    def run() -> None:
        time.sleep(0.02 if runs else 0.5)
        runs.append(1)

    case = Case(3, 6, "records", run, steps=4, cost=Cost(30.0, 10.0))
    seconds = time_case(case, Options("loader", repeats=3), True)
    assert len(runs) == 4 and len(seconds) == 3 and all(0.005 <= s < 0.1 for s in seconds)
    result = describe_case(case, [1.0, 4.0, 2.0])
    result |= compare_to_ceilings(result, Ceilings(flops_per_second=60.0, bytes_per_second=10.0))
    assert result["rate"] == 3.0 and result["seconds"] == {"min": 1.0, "median": 2.0, "max": 4.0}
    # 0.5 s of arithmetic, 1 s of memory: half of the 2 s.
    assert (result["share_of_ceiling"], result["limited_by"]) == (0.5, "bytes")
    assert (result["flops_per_second"], result["bytes_per_second"]) == (15.0, 5.0)


def test_a_ceiling_is_the_better_of_before_and_after(monkeypatch: pytest.MonkeyPatch, tiny: Experiment) -> None:
    measured = iter([Ceilings(flops_per_second=3e12, bytes_per_second=1e9), Ceilings(1e12, 2e9)])
    monkeypatch.setattr(bench_program, "measure_ceilings", lambda mesh, dtype: next(measured))
    report = bench_program.bench_experiment(tiny, Options("tokenize", (8,), repeats=1))
    assert report["ceilings"] == {"flops_per_second": 3e12, "bytes_per_second": 2e9}
    (result,) = report["results"]
    assert result["share_of_ceiling"] == pytest.approx(
        max(result["flops_per_second"] / 3e12, result["bytes_per_second"] / 2e9)
    )


def test_ceilings_are_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ceilings.measure_ceilings(make_mesh(MeshConfig()), "bfloat16")
    assert measured.flops_per_second > 0 and measured.bytes_per_second > 0
    monkeypatch.setattr(ceilings, "MATMUL_SIZES", (64, 128))  # doubled once, since 1 ms is too short
    monkeypatch.setattr(ceilings, "_fastest", lambda function, array: 1e-3)
    rates = ceilings.measure_ceilings(make_mesh(MeshConfig()), "float32")
    assert rates.flops_per_second == pytest.approx(4 * 2 * 128**3 / 1e-3)
    assert rates.bytes_per_second == pytest.approx(4 * 2 * 2**16 / 1e-3), "a copy reads and writes"


# ---------------------------------------------------------------- the command


def test_json_on_stdout_the_table_on_stderr_and_a_trace(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "tokenize", "--config", str(TINY), "--batch-size", "4", "--repeats", "1"]
    assert cli.main([*command, "--json", "--profile", str(tmp_path / "trace")]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["bench"] == "tokenize" and report["config"] == "tiny" and len(report["results"]) == 1
    assert err == format_bench(report) + "\n", "no progress where there is no terminal"
    assert list((tmp_path / "trace" / "batch_4").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["sample", "--batch-size", "6"], "batch size 6 is not divisible by the 4 devices: give --batch-size"),
        (["sample", "--batch-size", "4,many"], "--batch-size 4,many: give a number, or several as 1,8,64"),
        (["sample", "--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["sample", "--repeats", "0"], "--repeats is 0: it must be at least 1"),
        (["sample", "--dtype", "float16"], "--dtype is float16: it must be float32 or bfloat16"),
        (["train", "--decode"], "--decode applies to bench sample and tokenize, not to train: leave it out"),
        (
            ["evaluate", "--dtype", "bfloat16"],
            "--dtype applies to bench sample and train and tokenize, not to evaluate",
        ),
        (["sample", "--profile", str(TINY)], f"--profile {TINY} is not a folder"),
        (["loader", "--records", "0"], "--records is 0: it must be at least 1"),
        (["sample", "--config.train.stesp=1"], "config.train has no key 'stesp'. Did you mean 'steps'?"),
    ],
)
def test_what_cannot_be(argv: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv, "--config", str(TINY)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"rar-jax bench: {problem}") and err.count("\n") == 1


def test_the_loader_reads_latents_too(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maskgit_vq, "token_spec", lambda config: TokenSpec((16, 8), "float32"))
    case = next(bench_cases.make_loader_cases(tiny, make_mesh(tiny.mesh), Options("loader", records=10)))
    assert case.cost is not None
    # Read and put on the devices: the latents, label and id; on disk with the crop.
    assert 0 <= case.cost.bytes / case.batch_size - 2 * (16 * 8 * 4 + 4 + 8) - 2 < 100
