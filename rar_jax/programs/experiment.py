"""An experiment file, resolved: every section a frozen dataclass, and the sections checked against each other."""

from __future__ import annotations

import dataclasses
import typing
from types import ModuleType
from typing import Any

import ml_collections
from jax.sharding import Mesh

from rar_jax.config import ConfigError, Steps, build, find_module, nearest, require, resolve_steps, to_dict
from rar_jax.data.loader import steps_per_epoch
from rar_jax.evaluation import classifier
from rar_jax.guidance import Guidance
from rar_jax.parallel.mesh import MeshConfig, batch_divisor
from rar_jax.sampling.sampler import Model, check_pair
from rar_jax.training.recipe import Recipe

SECTIONS = ("data", "tokenizer", "tokenizer_train", "generator", "train", "classifier", "guidance", "evaluate", "mesh")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what they are.

    source: "digits", "idx:FOLDER" or "tfds:NAME". image_size: images are padded with zeros to it.
    class_names: default, the numbers. train_records: what an epoch is; checked against the source.
    """

    source: str
    image_size: int
    channels: int
    num_classes: int
    train_records: int
    class_names: tuple[str, ...] = ()
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(i) for i in range(self.num_classes)))
        require(
            len(self.class_names) == self.num_classes,
            f"class_names has {len(self.class_names)} names for {self.num_classes} classes",
        )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """samples: images of the final report. live_samples: of the distance while training; 0 is none.
    batch_size: images at a time. grid_per_class: pictures a class in samples.png."""

    samples: int = 1000
    live_samples: int = 200
    batch_size: int = 200
    grid_per_class: int = 10


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All of an experiment, checked. `classifier` is None where the experiment has none."""

    name: str
    data: Data
    tokenizer: Model
    tokenizer_train: Recipe
    generator: Model
    train: Recipe
    classifier: classifier.Config
    classifier_train: Recipe
    guidance: Guidance
    evaluate: Evaluate
    mesh: MeshConfig
    seed: int

    def resolved(self) -> dict[str, Any]:
        """Plain nested dict with every default and duration filled in, as config.json holds it."""
        out = {f.name: to_dict(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for kind in ("tokenizer", "generator"):
            model: Model = getattr(self, kind)
            out[kind] = {"name": _short_name(model.module), **to_dict(model.config)}
        return out

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ConfigError unless every batch divides over the mesh."""
        parts = batch_divisor(mesh)
        for name in ("tokenizer_train", "train", "classifier_train"):
            recipe: Recipe = getattr(self, name)
            rows = recipe.batch_size // recipe.accumulation
            require(
                rows % parts == 0,
                f"{name}.batch_size {recipe.batch_size}"
                + (f" in {recipe.accumulation} parts" if recipe.accumulation > 1 else "")
                + f" is not divisible by the {parts} devices of mesh axes data x fsdp: change one of them",
            )


def resolve(config: ml_collections.ConfigDict, name: str) -> Experiment:
    """Checks an experiment's ConfigDict and fills in its defaults.

    Raises: ConfigError, one line, for a wrong key, type or combination.
    """
    known = [*SECTIONS, "seed", "precision"]
    for key in config:
        require(key in known, f"config has no section '{key}'.{nearest(key, known)}")
    for key in ("data", "tokenizer", "tokenizer_train", "generator", "train", "classifier"):
        require(key in config, f"config lacks the section '{key}'")
    data = build(Data, config.data, where="config.data")
    precision = config.get("precision", "float32")
    recipes = {
        "tokenizer_train": _recipe(config.tokenizer_train, "config.tokenizer_train", data),
        "train": _recipe(config.train, "config.train", data),
        "classifier_train": _recipe(config.classifier.train, "config.classifier.train", data),
    }
    tokenizer = _model(config.tokenizer, "tokenizers", precision, recipes["tokenizer_train"], data)
    generator = _model(config.generator, "generators", precision, recipes["train"], data)
    check_pair(generator, tokenizer)
    classifier_config = build(
        classifier.Config,
        {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes, **config.classifier},
        where="config.classifier",
        ignore=("train",),
    )
    _check_shapes(data, tokenizer, generator)
    return Experiment(
        name=name,
        data=data,
        tokenizer=tokenizer,
        generator=generator,
        classifier=classifier_config,
        guidance=build(Guidance, config.get("guidance", {"scale": 0.0}), where="config.guidance"),
        evaluate=build(Evaluate, config.get("evaluate", {}), where="config.evaluate"),
        mesh=build(MeshConfig, config.get("mesh", {}), where="config.mesh"),
        seed=config.get("seed", 0),
        **recipes,
    )


def _recipe(section: ml_collections.ConfigDict, where: str, data: Data) -> Recipe:
    epoch = steps_per_epoch(data.train_records, section.batch_size) if "batch_size" in section else None
    require("steps" in section, f"{where} lacks steps: set {where}.steps in the experiment file")
    steps = resolve_steps(section.steps, f"{where}.steps", None, epoch)
    return build(
        Recipe, {**section, "steps": steps}, where=where, total_steps=steps, steps_per_epoch=epoch
    )


def _model(section: ml_collections.ConfigDict, kind: str, precision: str, recipe: Recipe, data: Data) -> Model:
    where = f"config.{kind[:-1]}"
    require("name" in section, f"{where} lacks name: it is the file in rar_jax/{kind}/ to use")
    module = find_module(kind, section.name)
    config = build(
        module.Config,
        {"dtype": precision, **section},
        where=where,
        total_steps=recipe.steps,
        steps_per_epoch=steps_per_epoch(data.train_records, recipe.batch_size),
        ignore=("name",),
    )
    for field, hint in typing.get_type_hints(module.Config, include_extras=True).items():
        if hint == Steps and getattr(config, field) > recipe.steps:
            raise ConfigError(
                f"{where}.{field} is step {getattr(config, field)}, after the training's end at {recipe.steps}: "
                "shorten it, or give it as a share ('75%')"
            )
    return Model(module, config)


def _check_shapes(data: Data, tokenizer: Model, generator: Model) -> None:
    image = (data.image_size, data.image_size, data.channels)
    takes = tokenizer.module.image_spec(tokenizer.config).shape
    require(takes == image, f"data gives images {list(image)}, the tokenizer takes {list(takes)}: make them equal")
    classes = generator.config.num_classes
    require(
        classes == data.num_classes,
        f"generator.num_classes is {classes}, data.num_classes is {data.num_classes}: make them equal",
    )


def _short_name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]
