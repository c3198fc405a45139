"""Experiment files in, frozen dataclasses out.

An experiment is a Python file with `get_config() -> ml_collections.ConfigDict`. Every section of it
is the keyword arguments of one frozen dataclass, so this module knows how to check any section and
imports no model. A wrong key or type is a `ConfigError` of one line that says where and what to do.

An experiment file is code: running one runs what it says. Only use files that you trust.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import ml_collections

from rar_jax.errors import ConfigError

T = TypeVar("T")

# A field of this type is written "50%", "200ep" or a number of steps, and holds steps.
Steps = Annotated[int, "steps"]


# Single values beside the sections; all have a default.
TOP_LEVEL = ("seed", "precision", "init_from", "wandb")
# Sections whose every field has a default.
OPTIONAL_SECTIONS = ("guidance", "evaluate", "mesh")


# ---------------------------------------------------------------- files


def experiments_folders() -> list[pathlib.Path]:
    """Where a bare experiment name is looked up: the wheel's copy, then the checkout's folder."""
    package = pathlib.Path(__file__).parent
    return [p for p in (package / "experiments", package.parent / "experiments") if p.is_dir()]


def find_experiment(name: str) -> pathlib.Path:
    """Path of an experiment file given its path or its bare name ("digits")."""
    if (path := pathlib.Path(name)).is_file():
        return path
    # "digits", "digits.py" and "experiments/digits.py" are found anywhere; another path must be there.
    bare = pathlib.Path(name).parent.name in ("", "experiments") and len(pathlib.Path(name).parts) <= 2
    for folder in experiments_folders() if bare else []:
        if (path := folder / f"{pathlib.Path(name).stem}.py").is_file():
            return path
    known = sorted(p.stem for folder in experiments_folders() for p in folder.glob("[!_]*.py"))
    near = difflib.get_close_matches(str(name), known, n=1)
    meant = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"no experiment '{name}': give a path or one of: {', '.join(known)}.{meant}")


def load_experiment(name: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Runs `get_config()` of an experiment and applies overrides such as "train.steps=10".

    Args:
      name: path of the file, or its bare name.
      overrides: "section.key=value" strings; values are Python literals, anything else is text.

    Returns: the unlocked ConfigDict, not yet checked against the dataclasses.
    Raises: ConfigError for a missing file, a missing get_config, or an override of an unknown key.
    """
    path = find_experiment(name)
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"{path} is not a Python file: --config takes an experiment file such as experiments/digits.py"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path} line {error.lineno} is not Python: {error.msg}") from None
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(): an experiment file must define it")
    config = module.get_config()
    for name in OPTIONAL_SECTIONS:  # so that they can be overridden where the file leaves them out
        if name not in config:
            config[name] = ml_collections.ConfigDict()
    for override in overrides:
        _apply_override(config, override)
    return config


def _apply_override(config: ml_collections.ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}' is not of the form section.key=value")
    *sections, last = key.split(".")
    node: Any = config
    for depth, name in enumerate(sections):
        if name not in node:
            section = "_".join(sections[: depth + 1])  # tokenizer.train is of the section tokenizer_train
            meant = f" Did you mean config.{section}?" if section in config else nearest(name, node.keys())
            raise ConfigError(f"{'.'.join(['config', *sections[:depth]])} has no key '{name}'.{meant}")
        node = node[name]
        if not isinstance(node, ml_collections.ConfigDict):
            raise ConfigError(f"config.{'.'.join(sections[: depth + 1])} is a single value, so '{key}' cannot be set")
    if not sections and last not in node and last not in TOP_LEVEL:
        raise ConfigError(f"config has no key '{last}'.{nearest(last, node.keys())}")
    # Within a section a key may be missing, since fields have defaults; `build` checks its name.
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # nested too deeply, the last two
        value = text
    with config.unlocked(), config.ignore_type():
        node[last] = value


# ---------------------------------------------------------------- sections


def build(
    cls: type[T],
    section: Mapping[str, Any],
    *,
    where: str,
    total_steps: int | None = None,
    steps_per_epoch: float | None = None,
    ignore: tuple[str, ...] = (),
) -> T:
    """Makes the frozen dataclass `cls` from a config section.

    Args:
      cls: a dataclass. Its annotations are the types that are accepted.
      section: mapping of field names to values; missing ones take the dataclass default.
      where: the section's name in messages.
      total_steps, steps_per_epoch: what "50%" and "200ep" mean for fields of type `Steps`.
      ignore: keys of the section that are not for this dataclass.

    Raises: ConfigError for an unknown key (naming the nearest), a missing one, or a wrong type.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key in ignore:
            continue
        if key not in fields:
            raise ConfigError(f"{where} has no key '{key}'.{nearest(key, list(fields))}")
        if hints[key] == Steps:
            value = resolve_steps(value, f"{where}.{key}", total_steps, steps_per_epoch)
        values[key] = _check_type(value, hints[key], f"{where}.{key}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in values
    ]
    if required:
        raise ConfigError(
            f"{where} lacks {', '.join(required)}: set {where}.{required[0]} in the experiment file, or with "
            f"--{where}.{required[0]}=... on the command line"
        )
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _shown(value: Any) -> str:
    """A value in one line, which a ConfigDict's own text is not, and no longer than a message should be."""
    return " ".join(repr(value).split())[:200]


def steps_fields(cls: type) -> list[str]:
    """Names of the fields of a Config that are durations."""
    return [name for name, hint in typing.get_type_hints(cls, include_extras=True).items() if hint == Steps]


def resolve_steps(value: Any, where: str, total_steps: int | None, steps_per_epoch: float | None) -> int:
    """Turns a duration, "50%" (of the training), "200ep" (epochs) or a number of steps, into steps."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"{where} is {value}: a duration cannot be negative")
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|ep)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(
            f"{where} is {_shown(value)}: write steps (1000), a share of training ('50%') or epochs ('200ep')"
        )
    number, unit = float(match[1]), match[2]
    base = total_steps if unit == "%" else steps_per_epoch
    if base is None:
        raise ConfigError(f"{where} is {value!r}: this duration needs {'steps' if unit == 'ep' else 'steps or epochs'}")
    return round(number / 100 * base if unit == "%" else number * base)


def _check_type(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _check_type(value, inner, where)
    if origin is tuple and args[-1] is not Ellipsis and isinstance(value, (list, tuple)):
        if len(value) != len(args):
            raise ConfigError(f"{where} is {_shown(value)}: it must have {len(args)} entries")
        return tuple(_check_type(v, arg, f"{where}[{i}]") for i, (v, arg) in enumerate(zip(value, args, strict=True)))
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_check_type(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if not isinstance(plain, type) or (isinstance(value, plain) and not (plain is int and isinstance(value, bool))):
        return value
    name = f"a list of {getattr(args[0], '__name__', args[0])}" if origin is tuple else plain.__name__
    raise ConfigError(f"{where} is {_shown(value)} ({type(value).__name__}): it must be {name}")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds; for checks in a Config's __post_init__."""
    if not condition:
        raise ConfigError(message)


# ---------------------------------------------------------------- comparing and naming


def to_dict(config: Any) -> Any:
    """Plain nested dict of a ConfigDict, dataclass, or nest of them; tuples become lists (as JSON has them)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, (Mapping, ml_collections.ConfigDict)):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines "train.steps: 100 -> 200" for every leaf in which two nested dicts differ; long values from where they do."""
    a, b = flatten(old), flatten(new)
    absent = "(absent)"
    return [
        f"{key}: {' -> '.join(shortened(str(a.get(key, absent)), str(b.get(key, absent))))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    ]


def shortened(a: str, b: str, most: int = 80) -> tuple[str, str]:
    """Two texts that differ; of long ones what is around the first difference."""
    if max(len(a), len(b)) <= most:
        return a, b
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    begin = max(same - 10, 0)

    def cut(text: str) -> str:
        return ("..." if begin else "") + text[begin : begin + most] + ("..." if len(text) > begin + most else "")

    return cut(a), cut(b)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the known name nearest to a misspelt one, or the list of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    if len(known) > 40:  # of hundreds of names only the nearest helps
        return f" The nearest is '{difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]}'."
    return f" It has: {', '.join(sorted(known))}." if known else ""
