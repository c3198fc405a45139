"""An experiment file, resolved: every section a frozen dataclass, and the sections checked against each other."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from rar_jax.config import build, nearest, require, resolve_steps, steps_fields, to_dict
from rar_jax.data import imagenet
from rar_jax.data.image_source import ImageSource, Split
from rar_jax.data.loader import steps_per_epoch
from rar_jax.data.sources import load_source
from rar_jax.errors import ConfigError
from rar_jax.models import Model, check_pair, find_module
from rar_jax.networks import classifier
from rar_jax.parallel.mesh import MeshConfig, batch_divisor
from rar_jax.parallel.rules import param_shardings
from rar_jax.sampling import Guidance
from rar_jax.sections import Data, Evaluate, Recipe

log: logging.Logger = logging.getLogger(__name__)

SECTIONS = ("data", "tokenizer", "tokenizer_train", "generator", "train", "classifier", "guidance", "evaluate", "mesh")


@dataclasses.dataclass(frozen=True)
class _Globals:
    """What stands beside the sections."""

    seed: int = 0
    precision: str = "float32"
    init_from: str | None = None
    wandb: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed is {self.seed}: it must be in 0..4294967295 (uint32)")
        require(self.init_from != "", "init_from is empty: give a file, a directory or None")
        require(self.wandb != "", "wandb is empty: give the name of a project of Weights & Biases, or None")
        require(self.precision in ("float32", "bfloat16"), f"precision is '{self.precision}': float32 or bfloat16")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All of an experiment, checked.

    tokenizer_weights: file of a finished tokenizer, instead of a recipe to train one. classifier: None where none is
    trained; there is then no fd_classifier. init_from: weights that the generator starts from (fine-tuning). wandb: a project.
    """

    name: str
    data: Data
    tokenizer: Model
    tokenizer_train: Recipe | None
    tokenizer_weights: str | None
    generator: Model
    train: Recipe
    init_from: str | None
    classifier: classifier.Config | None
    classifier_train: Recipe | None
    guidance: Guidance
    evaluate: Evaluate
    mesh: MeshConfig
    seed: int
    wandb: str | None

    def resolved(self) -> dict[str, Any]:
        """Plain nested dict with every default and duration filled in, as config.json holds it; without what is None."""
        out = {f.name: to_dict(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for kind in ("tokenizer", "generator"):
            model: Model = getattr(self, kind)
            out[kind] = {"name": model.module.__name__.rpartition(".")[2], **to_dict(model.config)}
        if (weights := out.pop("tokenizer_weights")) is not None:
            out["tokenizer"]["weights"] = weights
        return {key: value for key, value in out.items() if value is not None}

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained, or taken over, in this order."""
        return ("tokenizer", "classifier", "generator") if self.classifier else ("tokenizer", "generator")

    def recipe(self, stage: str) -> Recipe | None:
        """The recipe of a stage: "tokenizer", "classifier" or "generator"; None if its weights are given."""
        return {"tokenizer": self.tokenizer_train, "classifier": self.classifier_train, "generator": self.train}[stage]

    def last_step(self, stage: str) -> int:
        """The step at which a stage is finished: 0 if its weights are given."""
        recipe = self.recipe(stage)
        return recipe.steps if recipe else 0

    def model(self, stage: str) -> Model:
        """The module and Config of a stage. Raises: ConfigError for a classifier where there is none."""
        models = {"tokenizer": self.tokenizer, "generator": self.generator}
        if stage in models:
            return models[stage]
        if self.classifier is None:
            raise ConfigError(f"{self.name} has no classifier section: there is no classifier to train or to judge by")
        return Model(classifier, self.classifier)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ConfigError unless every batch and every parameter of every stage divides over the mesh."""
        parts = batch_divisor(mesh)
        for stage in self.stages:
            module, config = self.model(stage).module, self.model(stage).config
            shapes = jax.eval_shape(functools.partial(module.init, config), jax.random.key(0))
            try:
                param_shardings(module.axes(config), shapes, mesh)
            except ConfigError as error:
                raise ConfigError(f"{stage}: {error}") from None
        for name in ("tokenizer_train", "train", "classifier_train"):
            recipe: Recipe | None = getattr(self, name)
            if recipe is None:
                continue
            rows = recipe.batch_size // recipe.accumulation
            require(
                rows % parts == 0,
                f"{name}.batch_size {recipe.batch_size}"
                + (f" in {recipe.accumulation} parts" if recipe.accumulation > 1 else "")
                + f" is not divisible by the {parts} devices of mesh axes data x fsdp: change one of them",
            )


def resolve(config: Any, name: str) -> Experiment:
    """Checks an experiment's ConfigDict and fills in its defaults; the source is opened only for what is left out.

    Raises: ConfigError, one line, for a wrong key, type or combination.
    """
    known = [*SECTIONS, *(f.name for f in dataclasses.fields(_Globals))]
    for key in config:
        require(key in known, f"config has no section '{key}'.{nearest(key, known)}")
    for key in ("data", "tokenizer", "generator", "train"):
        require(key in config, f"config lacks the section '{key}'")
    for key in SECTIONS:
        require(
            isinstance(config.get(key, config), ml_collections.ConfigDict),
            f"config.{key} is a value: it must be a section",
        )
    globals_of = {f.name: config[f.name] for f in dataclasses.fields(_Globals) if f.name in config}
    everywhere = build(_Globals, globals_of, where="config")
    data_section = dict(config.data)
    if data_section.get("class_names") == "imagenet":
        data_section["class_names"] = imagenet.class_names()
    data = _data(data_section)
    train = _recipe(config.train, "config.train", data)
    tokenizer_train, tokenizer_weights = _of_tokenizer(config, data)
    tokenizer = _model(config.tokenizer, "tokenizers", everywhere.precision, tokenizer_train or train, data)
    generator = _model(config.generator, "generators", everywhere.precision, train, data)
    check_pair(generator, tokenizer)
    judge, judge_train = _of_classifier(config, data) if "classifier" in config else (None, None)
    _check_shapes(data, tokenizer, generator, judge)
    if everywhere.init_from is not None and not hasattr(generator.module, "adapt"):
        raise ConfigError(
            f"init_from: generator '{config.generator.name}' has no adapt(), so it cannot start from weights"
        )
    return Experiment(
        name=name,
        data=data,
        tokenizer=tokenizer,
        tokenizer_train=tokenizer_train,
        tokenizer_weights=tokenizer_weights,
        generator=generator,
        train=train,
        init_from=everywhere.init_from,
        classifier=judge,
        classifier_train=judge_train,
        guidance=build(Guidance, {"scale": 0.0, **config.get("guidance", {})}, where="config.guidance"),
        evaluate=build(Evaluate, config.get("evaluate", {}), where="config.evaluate"),
        mesh=build(MeshConfig, config.get("mesh", {}), where="config.mesh"),
        seed=everywhere.seed,
        wandb=everywhere.wandb,
    )


def _data(section: dict[str, Any]) -> Data:
    """The section with what is left out counted in the source, before anything that is measured in epochs or classes."""
    counted = ("num_classes", "train_records")
    given = {key: value for key, value in section.items() if key not in (*counted, "class_names") or value is not None}
    if all(key in given for key in counted):
        return build(Data, given, where="config.data")
    known = {**given, **dict.fromkeys(counted, 1), "class_names": ()}
    checked = build(Data, known, where="config.data")  # so that the source is asked for nothing wrong
    source = load_source(
        checked.source, "train", image_size=checked.image_size, crop=checked.crop, channels=checked.channels
    )
    listed = getattr(source, "listed", ())
    if listed:
        log.warning("%s: %d thing(s) passed over, the first: %s: %s", checked.source, len(listed), *listed[0])
    has: dict[str, Any] = {"num_classes": source.num_classes, "train_records": source.num_images}
    if "num_classes" not in given:
        has["class_names"] = source.class_names
    return build(Data, {**has, **given}, where="config.data")


def _of_tokenizer(config: Any, data: Data) -> tuple[Recipe | None, str | None]:
    """Its recipe, or the file of its weights, which goes before a recipe."""
    weights = config.tokenizer.get("weights")
    require(
        weights is None or (isinstance(weights, str) and weights != ""),
        f"config.tokenizer.weights is {weights!r}: it must be a path",
    )
    require(
        weights is not None or "tokenizer_train" in config,
        "config lacks the section 'tokenizer_train', or tokenizer.weights = the file of a finished tokenizer",
    )
    if weights is not None:
        return None, weights
    return _recipe(config.tokenizer_train, "config.tokenizer_train", data), None


def _of_classifier(config: Any, data: Data) -> tuple[classifier.Config, Recipe]:
    shape = {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes}
    judge = build(classifier.Config, {**shape, **config.classifier}, where="config.classifier", ignore=("train",))
    return judge, _recipe(config.classifier.get("train"), "config.classifier.train", data)


def _recipe(section: Any, where: str, data: Data) -> Recipe:
    require(isinstance(section, ml_collections.ConfigDict), f"{where} is missing or a value: it must be a section")
    for key in ("steps", "batch_size"):
        require(key in section, f"{where} lacks {key}: set {where}.{key} in the experiment file")
    batch_size = section.batch_size
    require(
        isinstance(batch_size, int) and batch_size >= 1,
        f"{where}.batch_size is {batch_size!r}: it must be a whole number of at least 1",
    )
    epoch = steps_per_epoch(data.train_records, batch_size)
    steps = resolve_steps(section.steps, f"{where}.steps", None, epoch)
    return build(Recipe, {**section, "steps": steps}, where=where, total_steps=steps, steps_per_epoch=epoch)


def _model(section: Any, kind: str, precision: str, recipe: Recipe, data: Data) -> Model:
    where = f"config.{kind[:-1]}"
    require("name" in section, f"{where} lacks name: it is the file in rar_jax/{kind}/ to use")
    module = find_module(kind, section.name)
    classes = {"num_classes": data.num_classes} if kind == "generators" else {}
    config = build(
        module.Config,
        {"dtype": precision, **classes, **section},
        where=where,
        total_steps=recipe.steps,
        steps_per_epoch=steps_per_epoch(data.train_records, recipe.batch_size),
        ignore=("name", "weights"),
    )
    for field in steps_fields(module.Config):
        # A period may be longer than the training; a moment may not lie after it.
        if not field.endswith("_every") and getattr(config, field) > recipe.steps:
            raise ConfigError(
                f"{where}.{field} is step {getattr(config, field)}, after the training's end at {recipe.steps}: "
                "shorten it, or give it as a share ('75%')"
            )
    return Model(module, config)


def _check_shapes(data: Data, tokenizer: Model, generator: Model, judge: classifier.Config | None) -> None:
    image = (data.image_size, data.image_size, data.channels)
    images = {"tokenizer": tokenizer.module.image_spec(tokenizer.config).shape}
    classes_of = {"generator": generator.config.num_classes}
    if judge is not None:
        images["classifier"] = (judge.image_size, judge.image_size, judge.channels)
        classes_of["classifier"] = judge.num_classes
    for name, takes in images.items():
        require(takes == image, f"data gives images {list(image)}, the {name} takes {list(takes)}: make them equal")
    for name, classes in classes_of.items():
        require(
            classes == data.num_classes,
            f"{name}.num_classes is {classes}, data.num_classes is {data.num_classes}: make them equal",
        )


def open_source(experiment: Experiment, split: Split) -> ImageSource:
    """The images of a split, checked against config.data.

    Raises: ConfigError where the source is not what config.data says.
    """
    data = experiment.data
    crop = "center" if split == "heldout" and data.crop == "random" else data.crop
    source = open_images(data, data.source, split, crop=crop)
    require(
        split != "train" or source.num_images == data.train_records,
        f"{data.source} has {source.num_images} training images, config.data.train_records is {data.train_records}: "
        "set it to that number, epochs are counted by it",
    )
    return source


def open_images(data: Data, spec: str, split: Split, *, crop: str | None) -> ImageSource:
    """A source of any images that are made to look as those of config.data do.

    Raises: ConfigError where they cannot be, or are of other classes.
    """
    source = load_source(spec, split, image_size=data.image_size, crop=crop, channels=data.channels)
    shape = (data.image_size, data.image_size, data.channels)
    require(
        source.image_shape == shape,
        f"{spec} has images {list(source.image_shape)}, config.data says {list(shape)}: make them equal",
    )
    require(
        source.num_classes == data.num_classes,
        f"{spec} has {source.num_classes} classes, config.data.num_classes is {data.num_classes}: make them equal",
    )
    return source
