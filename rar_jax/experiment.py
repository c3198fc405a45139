"""A resolved experiment: frozen dataclasses, checked against each other. The one list of stages."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from rar_jax.config import build, load_experiment, nearest, require, resolve_steps, steps_fields, to_dict
from rar_jax.data import imagenet
from rar_jax.data.image_source import ImageSource, Split
from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError
from rar_jax.models import Model, check_pair, find_module, load_model
from rar_jax.networks import classifier
from rar_jax.parallel.mesh import MeshConfig, batch_divisor
from rar_jax.parallel.rules import param_shardings
from rar_jax.sampling import Guidance
from rar_jax.sections import Data, Evaluate, Recipe

log: logging.Logger = logging.getLogger(__name__)

STAGES = ("tokenizer", "classifier", "generator")
RECIPES = {"tokenizer": "tokenizer_train", "classifier": "classifier_train", "generator": "train"}
SECTIONS = ("data", "tokenizer", "tokenizer_train", "generator", "train", "classifier", "guidance", "evaluate", "mesh")


@dataclasses.dataclass(frozen=True)
class _Globals:
    """The values beside the sections."""

    seed: int = 0
    precision: str = "float32"
    init_from: str | None = None
    wandb: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed is {self.seed}: it must be in 0..4294967295 (uint32)")
        require(self.precision in ("float32", "bfloat16"), f"precision is '{self.precision}': float32 or bfloat16")
        require(self.init_from != "", "init_from is empty: give a file, a directory or None")
        require(self.wandb != "", "wandb is empty: give a project of Weights & Biases, or None")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
      tokenizer_weights: file of a finished tokenizer; then tokenizer_train is None.
      classifier: None if none is trained; there is then no fd_classifier.
      init_from: weights that the generator starts from (fine-tuning). wandb: a project.
    """

    name: str
    data: Data
    tokenizer: Model
    generator: Model
    train: Recipe
    guidance: Guidance
    evaluate: Evaluate
    mesh: MeshConfig
    seed: int
    tokenizer_train: Recipe | None = None
    tokenizer_weights: str | None = None
    classifier: classifier.Config | None = None
    classifier_train: Recipe | None = None
    init_from: str | None = None
    wandb: str | None = None

    def resolved(self) -> dict[str, Any]:
        """Return the content of config.json: plain nested dicts with every default and duration filled in."""
        out = {f.name: to_dict(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for kind in ("tokenizer", "generator"):
            model: Model = getattr(self, kind)
            out[kind] = {"name": model.name, **to_dict(model.config)}
        if (weights := out.pop("tokenizer_weights")) is not None:
            out["tokenizer"]["weights"] = weights
        return {key: value for key, value in out.items() if value is not None}

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this experiment, in the order of training."""
        return tuple(stage for stage in STAGES if stage != "classifier" or self.classifier)

    def recipe(self, stage: str) -> Recipe | None:
        """Return the recipe of a stage, None if its weights are given."""
        return getattr(self, RECIPES[stage])

    def last_step(self, stage: str) -> int:
        """Return the step at which a stage is finished, 0 if its weights are given."""
        recipe = self.recipe(stage)
        return recipe.steps if recipe else 0

    def model(self, stage: str) -> Model:
        """Return the module and Config of a stage. Raises: ConfigError if there is no classifier."""
        if stage == "classifier":
            if self.classifier is None:
                raise ConfigError(f"{self.name} has no classifier section: add one to train or use a classifier")
            return Model(classifier, self.classifier)
        return getattr(self, stage)

    def describe(self, workdir: pathlib.PurePath, mesh: Mesh) -> str:
        """Return the text at the start of a run, with every duration in steps."""
        axes = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
        names = [name.split(",")[0] for name in self.data.class_names]
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        lines = [
            f"{self.name} in {workdir} on {mesh.size} {jax.default_backend()} device(s): {axes}",
            f"  {'data':10} {self.data.train_records} training images in {len(names)} class(es): {shown}",
        ]
        for stage in self.stages:
            recipe, model = self.recipe(stage), self.model(stage)
            millions = sum(x.size for x in jax.tree.leaves(model.param_shapes())) / 1e6
            text = f"from {self.tokenizer_weights}"
            if recipe:
                durations = {f: getattr(recipe, f) for f in ("warmup", "eval_every", "checkpoint_every")}
                durations |= {f: getattr(model.config, f) for f in steps_fields(type(model.config))}
                listed = ", ".join(f"{name} {value}" for name, value in durations.items())
                text = f"{recipe.steps} steps of {recipe.batch_size}; {listed}"
            lines.append(f"  {stage:10} {millions:.2f} M parameters, {text}")
        return "\n".join(lines)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raise ConfigError unless every batch and parameter of every stage divides over the mesh."""
        parts = batch_divisor(mesh)
        for stage in self.stages:
            model, recipe = self.model(stage), self.recipe(stage)
            try:
                param_shardings(model.module.axes(model.config), model.param_shapes(), mesh)
            except ConfigError as error:
                raise ConfigError(f"{stage}: {error}") from None
            if recipe and recipe.batch_size // recipe.accumulation % parts:
                name, size = f"{RECIPES[stage]}.batch_size", recipe.batch_size
                split = f" in {recipe.accumulation} parts" if recipe.accumulation > 1 else ""
                raise ConfigError(
                    f"{name} {size}{split} is not divisible by the {parts} devices of mesh axes data x fsdp"
                )


# ---------------------------------------------------------------- from config.json


def rebuild(config: Mapping[str, Any]) -> Experiment:
    """Make the experiment of a config.json. Fields that it lacks take their defaults.

    Raises: ConfigError for a key that does not exist, as in a directory of another version.
    """
    types = {"data": Data, "guidance": Guidance, "evaluate": Evaluate, "mesh": MeshConfig}
    types |= {"classifier": classifier.Config} | dict.fromkeys(RECIPES.values(), Recipe)
    made: dict[str, Any] = {
        name: build(types[name], value, where=f"config.{name}") if name in types else value
        for name, value in config.items()
        if name not in ("tokenizer", "generator")
    }
    made |= {kind[:-1]: load_model(config, kind) for kind in ("tokenizers", "generators")}
    known = [f.name for f in dataclasses.fields(Experiment)]
    if wrong := made.keys() - known:
        raise ConfigError(f"config has no section '{min(wrong)}'.{nearest(min(wrong), known)}")
    return Experiment(**made, tokenizer_weights=config["tokenizer"].get("weights"))


def fill_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the fields that were added since at their defaults."""
    return rebuild(config).resolved()


# ---------------------------------------------------------------- from an experiment file


def open_experiment(name: str, overrides: list[str]) -> Experiment:
    """Load and resolve an experiment, given the path or bare name of its file."""
    return resolve(load_experiment(name, overrides), pathlib.Path(name).stem)


def resolve(config: Any, name: str) -> Experiment:
    """Check an experiment's ConfigDict and fill in its defaults.

    The image source is opened only to count what config.data omits.

    Raises: ConfigError for a wrong key, type or combination.
    """
    global_names = [f.name for f in dataclasses.fields(_Globals)]
    for key in config:
        known = (*SECTIONS, *global_names)
        require(key in known, f"config has no section '{key}'.{nearest(key, known)}")
    for key in ("data", "tokenizer", "generator", "train"):
        require(key in config, f"config lacks the section '{key}'")
    for key in SECTIONS:
        is_section = isinstance(config.get(key, config), ml_collections.ConfigDict)
        require(is_section, f"config.{key} is a value: it must be a section")
    values = build(_Globals, {key: config[key] for key in global_names if key in config}, where="config")
    data = _resolve_data(dict(config.data))
    train = _resolve_recipe(config.train, "config.train", data)
    weights, tokenizer_train = config.tokenizer.get("weights"), None
    if weights is None:
        lacks = "config lacks the section 'tokenizer_train', or tokenizer.weights = the file of a finished tokenizer"
        require("tokenizer_train" in config, lacks)
        tokenizer_train = _resolve_recipe(config.tokenizer_train, "config.tokenizer_train", data)
    is_path = weights is None or (isinstance(weights, str) and weights != "")
    require(is_path, f"config.tokenizer.weights is {weights!r}: it must be a path")
    judge = judge_train = None
    if "classifier" in config:
        shape = {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes}
        section = {**shape, **config.classifier}
        judge = build(classifier.Config, section, where="config.classifier", ignore=("train",))
        judge_train = _resolve_recipe(config.classifier.get("train"), "config.classifier.train", data)
    experiment = Experiment(
        name=name,
        data=data,
        tokenizer=_resolve_model(config.tokenizer, "tokenizers", values.precision, tokenizer_train or train, data),
        generator=_resolve_model(config.generator, "generators", values.precision, train, data),
        train=train,
        guidance=build(Guidance, {"scale": 0.0, **config.get("guidance", {})}, where="config.guidance"),
        evaluate=build(Evaluate, config.get("evaluate", {}), where="config.evaluate"),
        mesh=build(MeshConfig, config.get("mesh", {}), where="config.mesh"),
        seed=values.seed,
        tokenizer_train=tokenizer_train,
        tokenizer_weights=weights,
        classifier=judge,
        classifier_train=judge_train,
        init_from=values.init_from,
        wandb=values.wandb,
    )
    _check_together(experiment)
    return experiment


def _resolve_data(section: dict[str, Any]) -> Data:
    """Count what the section omits in the source, before durations in epochs are resolved."""
    if section.get("class_names") == "imagenet":
        section["class_names"] = imagenet.class_names()
    counted = ("num_classes", "train_records")
    given = {key: value for key, value in section.items() if value is not None or key not in (*counted, "class_names")}
    if all(key in given for key in counted):
        return build(Data, given, where="config.data")
    # Checked before the source is opened.
    checked = build(Data, {**given, **dict.fromkeys(counted, 1), "class_names": ()}, where="config.data")
    source = load_source(
        checked.source, "train", image_size=checked.image_size, crop=checked.crop, channels=checked.channels
    )
    if listed := getattr(source, "listed", ()):
        log.warning("%s: %d file(s) skipped, the first: %s: %s", checked.source, len(listed), *listed[0])
    found: dict[str, Any] = {"num_classes": source.num_classes, "train_records": source.num_images}
    if "num_classes" not in given:
        found["class_names"] = source.class_names
    return build(Data, {**found, **given}, where="config.data")


def _resolve_recipe(section: Any, where: str, data: Data) -> Recipe:
    require(isinstance(section, ml_collections.ConfigDict), f"{where} is missing or a value: it must be a section")
    for key in ("steps", "batch_size"):
        require(key in section, f"{where} lacks {key}: set {where}.{key} in the experiment file")
    size = section.batch_size
    is_size = type(size) is int and size >= 1
    require(is_size, f"{where}.batch_size is {size!r}: it must be a whole number of at least 1")
    epoch = data.train_records / size
    steps = resolve_steps(section.steps, f"{where}.steps", None, epoch)
    return build(Recipe, {**section, "steps": steps}, where=where, total_steps=steps, steps_per_epoch=epoch)


def _resolve_model(section: Any, kind: str, precision: str, recipe: Recipe, data: Data) -> Model:
    where = f"config.{kind[:-1]}"
    require("name" in section, f"{where} lacks name: the file in rar_jax/{kind}/ to use")
    module = find_module(kind, section.name)
    classes = {"num_classes": data.num_classes} if kind == "generators" else {}
    config = build(
        module.Config,
        {"dtype": precision, **classes, **section},
        where=where,
        total_steps=recipe.steps,
        steps_per_epoch=data.train_records / recipe.batch_size,
        ignore=("name", "weights"),
    )
    for field in steps_fields(module.Config):
        step = getattr(config, field)
        # A period may be longer than the training; a moment must lie within it.
        late = f"{where}.{field} is step {step}, after the training's end at {recipe.steps}: give a share ('75%')"
        require(field.endswith("_every") or step <= recipe.steps, late)
    return Model(module, config)


def _check_together(experiment: Experiment) -> None:
    data, tokenizer, generator = experiment.data, experiment.tokenizer, experiment.generator
    check_pair(generator, tokenizer)
    image = (data.image_size, data.image_size, data.channels)
    images = {"tokenizer": tokenizer.module.image_spec(tokenizer.config).shape}
    classes = {"generator": generator.config.num_classes}
    if (judge := experiment.classifier) is not None:
        images["classifier"] = (judge.image_size, judge.image_size, judge.channels)
        classes["classifier"] = judge.num_classes
    for name, shape in images.items():
        require(shape == image, f"data gives images {list(image)}, the {name} takes {list(shape)}: make them equal")
    for name, count in classes.items():
        both = f"{name}.num_classes is {count}, data.num_classes is {data.num_classes}"
        require(count == data.num_classes, f"{both}: make them equal")
    can_adapt = experiment.init_from is None or hasattr(generator.module, "adapt")
    require(can_adapt, f"init_from: generator {generator.module.__name__} has no adapt(): it cannot start from weights")


# ---------------------------------------------------------------- images


def open_source(experiment: Experiment, split: Split) -> ImageSource:
    """Open the images of a split. Raises: ConfigError if they are not what config.data says."""
    data = experiment.data
    crop = "center" if split == "heldout" and data.crop == "random" else data.crop
    source = open_images(data, data.source, split, crop=crop)
    found, counted = source.num_images, data.train_records
    message = f"{data.source} has {found} training images, config.data.train_records is {counted}: set it to {found}"
    require(split != "train" or found == counted, message)
    return source


def open_images(data: Data, spec: str, split: Split, *, crop: str | None) -> ImageSource:
    """Open any image source in the shape of config.data. Raises: ConfigError if shape or classes differ."""
    source = load_source(spec, split, image_size=data.image_size, crop=crop, channels=data.channels)
    ours, shape = (data.image_size, data.image_size, data.channels), source.image_shape
    require(shape == ours, f"{spec} has images {list(shape)}, config.data says {list(ours)}: make them equal")
    found, classes = source.num_classes, data.num_classes
    require(found == classes, f"{spec} has {found} classes, config.data.num_classes is {classes}: make them equal")
    return source
