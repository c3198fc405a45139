"""Every experiment resolves to what its golden file says, and traces; every impossible one is refused in one clear line.

After an intended change: UPDATE_GOLDEN=1 pytest tests/test_experiment.py, and read the difference.
"""

import functools
import json
import os
import pathlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from rar_jax.config import build, differences, load_experiment
from rar_jax.data.image_source import ImageSource, Split
from rar_jax.errors import ConfigError
from rar_jax.experiment import Experiment, fill_defaults, open_source, rebuild, resolve
from rar_jax.generators import rar
from rar_jax.keys import sample_keys
from rar_jax.models import load_model
from rar_jax.parallel.mesh import make_mesh
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import sample_images
from rar_jax.sections import Data, Recipe
from rar_jax.weights import rar as released

ROOT = pathlib.Path(__file__).parents[1]
FIT = "make config.generator fit config.tokenizer"
NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("[!_]*.py"))


@functools.cache
def experiment_of(name: str) -> Experiment:
    config = load_experiment(str(ROOT / "experiments" / f"{name}.py"))
    if "source" not in config.data:  # left to the command line: the digits stand in for somebody's images
        config.data.source = "digits"
        config.data.crop = None
    return resolve(config, name)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment = resolve(load_experiment("digits", overrides), "digits")
        experiment.check_mesh(make_mesh(experiment.mesh))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config(name: str, golden: pathlib.Path) -> None:
    path = golden / "experiments" / f"{name}.json"
    resolved = json.loads(json.dumps(experiment_of(name).resolved()))
    if len(names := resolved["data"]["class_names"]) > 20:
        resolved["data"]["class_names"] = f"{len(names)} names from {names[0]} to {names[-1]}"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(resolved, indent=1, sort_keys=True) + "\n")
    assert path.is_file(), "no golden file yet: run with UPDATE_GOLDEN=1"
    assert resolved == json.loads(path.read_text()), "if it was meant, run with UPDATE_GOLDEN=1"


def test_no_golden_file_is_left_over(golden: pathlib.Path) -> None:
    assert {p.stem for p in (golden / "experiments").glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_config_has_nothing_left_to_resolve(name: str) -> None:
    """What config.json holds gives the same models again, without the recipe that durations refer to."""
    experiment = experiment_of(name)
    resolved = json.loads(json.dumps(experiment.resolved()))
    assert load_model(resolved, "generators") == experiment.generator
    assert load_model(resolved, "tokenizers") == experiment.tokenizer
    assert build(Recipe, resolved["train"], where="train") == experiment.train
    assert (
        resolved["train"]["steps"] >= resolved["generator"]["anneal_end"] >= resolved["generator"]["anneal_start"] >= 0
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_config_gives_the_same_experiment_again(name: str) -> None:
    experiment = experiment_of(name)
    saved = json.loads(json.dumps(experiment.resolved()))
    assert rebuild(saved) == experiment and fill_defaults(saved) == experiment.resolved()


def test_fields_added_later_take_their_defaults() -> None:
    """A new Config field with a default does not break a work directory of before."""
    experiment = experiment_of("digits")
    saved = experiment.resolved()
    assert saved["generator"].pop("remat") is False and saved["train"].pop("max_rollbacks") == 2
    assert saved["data"].pop("crop") is None and saved["tokenizer"].pop("dtype") == "float32"
    assert rebuild(saved) == experiment
    assert saved["train"].pop("warmup") == 80
    assert differences(fill_defaults(saved), experiment.resolved()) == ["train.warmup: 0 -> 80"]


def test_a_work_directory_of_before_a_field_was_added_is_still_its_runs(tmp_path: pathlib.Path) -> None:
    experiment, workdir = experiment_of("digits"), Workdir(tmp_path)
    saved = experiment.resolved()
    del saved["generator"]["remat"]
    workdir.claim(saved)
    workdir.checkpoints("tokenizer").mkdir(parents=True)
    with pytest.raises(ConfigError, match="remat"):
        workdir.claim(experiment.resolved())
    workdir.claim(experiment.resolved(), fill_defaults)
    changed = replace(experiment, seed=3).resolved()
    with pytest.raises(ConfigError, match="seed: 0 -> 3"):
        workdir.claim(changed, fill_defaults)


def test_a_saved_config_of_another_version_names_its_unknown_key() -> None:
    saved = experiment_of("digits").resolved()
    with pytest.raises(ConfigError, match=r"config\.train has no key 'most_skips'"):
        rebuild(saved | {"train": saved["train"] | {"most_skips": 3}})
    with pytest.raises(ConfigError, match="config has no section 'gidance'"):
        rebuild(saved | {"gidance": {}})


# ---------------------------------------------------------------- tracing


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", NAMES)
def test_generator_and_sampler_trace(name: str) -> None:
    experiment, b = experiment_of(name), 4
    module, config = experiment.generator.module, experiment.generator.config
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(functools.partial(module.init, config), key)
    batch = {
        "tokens": jax.ShapeDtypeStruct((b, *module.token_spec(config).shape), jnp.uint16),
        "labels": jnp.zeros((b,), int),
    }

    def loss(params: Any, batch: Any, key: Any, step: Any) -> Any:
        return jax.value_and_grad(
            lambda p: module.loss(config, p, batch, key=key, step=step, train=True), has_aux=True
        )(params)

    (value, _), grads = jax.eval_shape(loss, params, batch, key, jax.ShapeDtypeStruct((), jnp.int32))
    assert (value.shape, value.dtype) == ((), jnp.float32) and shapes_of(grads) == shapes_of(params)

    tokenizer = experiment.tokenizer
    both = {
        "generator": params,
        "tokenizer": jax.eval_shape(lambda: tokenizer.module.init(tokenizer.config, jax.random.key(0))),
    }

    def sample(params: Any, labels: Any, ids: Any, sampling: Any) -> Any:
        return sample_images(experiment.generator, tokenizer, params, labels, sample_keys(0, ids), sampling)

    ints = jax.ShapeDtypeStruct((b,), jnp.int32)
    images = jax.eval_shape(sample, both, ints, ints, experiment.sampling)
    data = experiment.data
    assert (images.shape, images.dtype) == ((b, data.image_size, data.image_size, data.channels), jnp.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_traces(name: str) -> None:
    experiment, b = experiment_of(name), 4
    module, config, data = experiment.tokenizer.module, experiment.tokenizer.config, experiment.data
    params = jax.eval_shape(lambda: module.init(config, jax.random.key(0)))
    shape = (b, data.image_size, data.image_size, data.channels)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    tokens = jax.eval_shape(functools.partial(module.encode, config), params, images)
    made = experiment.generator.module.token_spec(experiment.generator.config)
    assert (tokens.shape, tokens.dtype) == ((b, *made.shape), made.dtype)
    decoded = jax.eval_shape(functools.partial(module.decode, config), params, tokens)
    assert (decoded.shape, decoded.dtype) == (shape, jnp.float32)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        return jax.grad(lambda p: module.loss(config, p, batch, key=key, step=0, train=True)[0])(params)

    batch = {"images": images, "labels": jax.ShapeDtypeStruct((b,), jnp.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert shapes_of(jax.eval_shape(loss, params, batch, key)) == shapes_of(params)


@pytest.mark.parametrize("name", NAMES)
def test_batches_divide_over_four_devices(name: str) -> None:
    experiment_of(name).check_mesh(make_mesh(experiment_of(name).mesh))


# ---------------------------------------------------------------- impossible experiments


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["generator.num_heads=5"], "config.generator: width 96 is not divisible by num_heads 5: change one of them"),
        (
            ["train.steps=500", "generator.anneal_end=600", "generator.anneal_start=100"],
            "config.generator.anneal_end is step 600, after the training's end at 500: give a share ('75%')",
        ),
        (
            ["tokenizer_train.steps=100", "tokenizer.restart_until=101"],
            "config.tokenizer.restart_until is step 101, after the training's end at 100: give a share ('75%')",
        ),
        (["train.batch_size=30"], "train.batch_size 30 is not divisible by the 4 devices of mesh axes data x fsdp"),
        (
            ["train.batch_size=32", "train.accumulation=16"],
            "train.batch_size 32 in 16 parts is not divisible by the 4 devices of mesh axes data x fsdp",
        ),
        (
            ["classifier.train.batch_size=30"],
            "classifier_train.batch_size 30 is not divisible by the 4 devices of mesh axes data x fsdp",
        ),
        (
            ["generator.num_tokens=25"],
            "the generator draws 25 ids of 64 codes, the tokenizer decodes 16 ids of 64 codes: " + FIT,
        ),
        (
            ["tokenizer.codebook_size=128"],
            "the generator draws 16 ids of 64 codes, the tokenizer decodes 16 ids of 128 codes: " + FIT,
        ),
        (["generator.num_classes=11"], "generator.num_classes is 11, data.num_classes is 10: make them equal"),
        (["classifier.num_classes=11"], "classifier.num_classes is 11, data.num_classes is 10: make them equal"),
        (
            ["tokenizer.image_size=16", "generator.num_tokens=64"],
            "data gives images [8, 8, 1], the tokenizer takes [16, 16, 1]: make them equal",
        ),
        (["classifier.image_size=16"], "data gives images [8, 8, 1], the classifier takes [16, 16, 1]: make them equal"),
        (["data.num_classes=0"], "config.data: num_classes is 0: it must be at least 1"),
        (["data.class_names=('a',)"], "config.data: class_names has 1 names for 10 classes"),
        (["mesh.data=3"], "mesh {'data': 3, 'fsdp': 1, 'tensor': 1} does not multiply to 4 devices: set one size to -1"),
        (
            ["sampling.scale=-1"],
            "config.sampling of generator 'rar': scale is -1.0: it must be 0 or more, or None for no guidance",
        ),
        (["generator.name=raar"], "no generator 'raar'. Did you mean 'rar'?"),
        (["train.warmup=100%"], "config.train: warmup is 800: it must be shorter than the 800 steps"),
        (["train.steps=50%"], "config.train.steps is '50%': this duration needs steps or epochs"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)  # fmt: skip
def test_impossible_combinations(overrides: list[str], problem: str) -> None:
    assert refusal(*overrides) == problem


@pytest.mark.parametrize(
    ("section", "misspelt", "meant"),
    [
        ("data", "image_sise", "image_size"),
        ("tokenizer", "codebok_size", "codebook_size"),
        ("tokenizer_train", "warmpu", "warmup"),
        ("generator", "num_token", "num_tokens"),
        ("train", "bach_size", "batch_size"),
        ("classifier", "featurs", "features"),
        ("classifier.train", "stesp", "steps"),
        ("sampling", "skale", "scale"),
        ("evaluate", "sampels", "samples"),
        ("mesh", "fdsp", "fsdp"),
    ],
)
def test_a_misspelt_key_in_each_section(section: str, misspelt: str, meant: str) -> None:
    where = "sampling of generator 'rar'" if section == "sampling" else section
    assert refusal(f"{section}.{misspelt}=1") == f"config.{where} has no key '{misspelt}'. Did you mean '{meant}'?"


@pytest.mark.parametrize("section", ["data", "tokenizer", "generator", "train"])
def test_a_missing_section(section: str) -> None:
    config = load_experiment("digits")
    del config[section]
    with pytest.raises(ConfigError) as caught:
        resolve(config, "digits")
    assert str(caught.value) == f"config lacks the section '{section}'"


@pytest.mark.parametrize("section", ["sampling", "evaluate", "mesh", "seed", "precision"])
def test_a_section_that_may_be_missing(section: str) -> None:
    config = load_experiment("digits")
    del config[section]
    defaults = {"sampling": ("scale", None), "evaluate": ("samples", 1000), "mesh": ("data", -1)}
    resolved = resolve(config, "digits").resolved()
    if section in defaults:
        key, value = defaults[section]
        assert resolved[section][key] == value
    assert resolved["seed"] == 0 and resolved["generator"]["dtype"] == "float32"


def test_a_tokenizer_has_a_recipe_or_weights() -> None:
    config = load_experiment("digits")
    del config["tokenizer_train"]
    with pytest.raises(ConfigError, match=r"lacks the section 'tokenizer_train', or tokenizer\.weights"):
        resolve(config, "digits")
    config.tokenizer.weights = "x.bin"
    experiment = resolve(config, "digits")
    assert (experiment.tokenizer_weights, experiment.recipe("tokenizer")) == ("x.bin", None)
    assert experiment.last_step("tokenizer") == 0
    assert experiment.resolved()["tokenizer"]["weights"] == "x.bin" and "tokenizer_train" not in experiment.resolved()
    overrides = ["tokenizer.weights=x.bin", "init_from=y", "seed=3"]  # of which digits.py says nothing or otherwise
    given = resolve(load_experiment("digits", overrides), "digits")
    assert (given.tokenizer_weights, given.tokenizer_train, given.init_from, given.seed) == ("x.bin", None, "y", 3)
    assert resolve(load_experiment("digits", ["wandb=mine"]), "digits").wandb == "mine"
    assert "wandb" not in given.resolved()
    assert refusal("wandb=") == "config: wandb is empty: give a project of Weights & Biases, or None"
    assert refusal("init_from=") == "config: init_from is empty: give a file, a directory or None"
    assert refusal("tokenizer.weights=3") == "config.tokenizer.weights is 3: it must be a path"


def test_without_a_classifier_nothing_is_judged_by_one() -> None:
    config = load_experiment("digits")
    del config["classifier"]
    experiment = resolve(config, "digits")
    assert experiment.stages == ("tokenizer", "generator") and "classifier" not in experiment.resolved()
    with pytest.raises(ConfigError, match="digits has no classifier section"):
        experiment.model("classifier")


@pytest.mark.parametrize("name", ["rar_b", "rar_l", "rar_xl", "rar_xxl"])
def test_the_imagenet_recipes_are_the_papers(name: str) -> None:
    """rar.md, sections 2 to 4: sizes and guidance as the released files have them, durations in steps."""
    experiment, known = experiment_of(name), released.FILES[name]
    train, config, model = experiment.train, experiment.generator.config, experiment.generator
    assert model.param_shapes() == replace(model, config=known.config).param_shapes()
    assert experiment.sampling == rar.Sampling(**known.sampling)
    assert (train.steps, train.batch_size, train.warmup) == (250_000, 2048, 62_500)
    assert (config.anneal_start, config.anneal_end, config.num_heads) == (125_000, 187_500, 16)
    assert (train.learning_rate, train.end_learning_rate, train.beta1, train.beta2) == (4e-4, 1e-5, 0.9, 0.96)
    assert (train.weight_decay, train.eps, train.clip_norm, train.ema_decay) == (0.03, 1e-8, 1.0, 0)
    assert (config.dropout, config.attention_dropout, config.label_dropout, config.dtype) == (0.1, 0.1, 0.1, "bfloat16")
    assert experiment.data.class_names[207] == "golden retriever" and experiment.data.train_records == 1_281_167


def test_the_crop_reaches_the_source(tmp_path: pathlib.Path) -> None:
    """Ten crops of 4 images are an epoch of 4; what is held out is never cropped at random."""
    for i, split in enumerate(["train"] * 4 + ["val"] * 2):
        (tmp_path / split / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + i, 9), (i, 0, 0)).save(tmp_path / split / f"class {i % 2}" / f"{i}.png")

    def opened(crop: str | None, split: Split, **changes: Any) -> ImageSource:
        data = {"source": f"folder:{tmp_path}", "image_size": 8, "channels": 3, "num_classes": 2, "train_records": 4}
        return open_source(replace(experiment_of("digits"), data=Data(**data | changes, crop=crop)), split)

    assert {crop: len(opened(crop, "train")) for crop in (None, "center", "random", "ten")} == {
        None: 4, "center": 4, "random": 4, "ten": 40,
    }  # fmt: skip
    assert opened("random", "train").random_views and not opened("random", "heldout").random_views
    assert (len(opened("ten", "heldout")), opened("ten", "train").num_images) == (20, 4)
    assert opened(None, "train", channels=1).image_shape == (8, 8, 1)
    with pytest.raises(ConfigError, match=r"has 4 training images, config.data.train_records is 40"):
        opened("ten", "train", train_records=40)
    assert "no crop 'tenn': one of pad, center, ten, random. Did you mean 'ten'" in refusal("data.crop=tenn")
    kept = resolve(load_experiment("digits", ["data.crop=pad"]), "digits").resolved()["data"]
    assert kept["crop"] == "pad" and experiment_of("digits").resolved()["data"]["crop"] is None


def test_a_misspelt_section() -> None:
    config = load_experiment("digits")
    config["generater"] = config.generator
    with pytest.raises(ConfigError) as caught:
        resolve(config, "digits")
    assert str(caught.value) == "config has no section 'generater'. Did you mean 'generator'?"


@pytest.mark.parametrize(
    "override",
    [
        "train=5", "mesh=3", "data=x", "generator=None", "classifier.train=3", "seed=abc", "seed=1.5", "seed=-1", "precision=5",
        "precision=float16", "train.batch_size=abc", "train.batch_size=0", "train.batch_size=True", "train.steps=abc",
        "train.steps=0", "train.steps=1e9", "generator.name=5", "tokenizer.name=None", "data.train_records=0",
        "evaluate.batch_size=0", "evaluate.samples=0", "train.learning_rate=-1", "generator.dropout=1.0",
        "generator.dropout=None", "tokenizer.width_multipliers=3", "tokenizer.width_multipliers=()", "data.channels=2",
    ],
)  # fmt: skip
def test_other_nonsense_is_one_line_that_names_the_place(override: str) -> None:
    key = override.partition("=")[0].split(".")[-1]
    assert key in refusal(override) or key == "name"


def test_durations_are_resolved_by_their_own_recipe() -> None:
    overrides = [
        "train.batch_size=100",
        "train.steps=40ep",
        "train.warmup=2ep",
        "generator.anneal_end=50%",
        "generator.anneal_start=10ep",
    ]
    resolved = resolve(load_experiment("digits", overrides), "digits").resolved()
    epoch = 1437 / 100
    assert resolved["train"]["steps"] == round(40 * epoch) == 575 and resolved["train"]["warmup"] == round(2 * epoch)
    generator = resolved["generator"]
    assert (generator["anneal_end"], generator["anneal_start"]) == (round(575 / 2), round(10 * epoch))


def test_precision_reaches_both_networks_and_a_section_may_differ() -> None:
    overrides = ["precision=bfloat16", "tokenizer.dtype=float32"]
    resolved = resolve(load_experiment("digits", overrides), "digits").resolved()
    assert (resolved["generator"]["dtype"], resolved["tokenizer"]["dtype"]) == ("bfloat16", "float32")
