"""Turn experiment files into frozen dataclasses.

An experiment is a Python file with `get_config() -> ml_collections.ConfigDict`. Each section holds the
keyword arguments of one frozen dataclass. This module checks any section and imports no model.
An experiment file is code: only run files that you trust.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import ml_collections
import numpy as np

from rar_jax.errors import ConfigError

T = TypeVar("T")

# A field of this type is written "50%", "200ep" or a number of steps, and holds steps.
Steps = Annotated[int, "steps"]

# Top-level values; all have a default.
TOP_LEVEL = ("seed", "precision", "init_from", "wandb")
# Sections whose every field has a default.
OPTIONAL_SECTIONS = ("sampling", "evaluate", "mesh")


# ---------------------------------------------------------------- files


def find_experiment(name: str) -> pathlib.Path:
    """Return the path of an experiment file, given its path or bare name ("digits")."""
    path = pathlib.Path(name)
    if path.is_file():
        return path
    # "digits", "digits.py" and "experiments/digits.py" are found from any folder, in the wheel and in a checkout.
    package = pathlib.Path(__file__).parent
    known = {p.stem: p for root in (package.parent, package) for p in (root / "experiments").glob("[!_]*.py")}
    if path.parent.name in ("", "experiments") and len(path.parts) <= 2 and path.stem in known:
        return known[path.stem]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"no experiment '{name}': give a path or one of: {', '.join(sorted(known))}.{hint}")


def load_experiment(name: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Run `get_config()` of an experiment file and apply overrides.

    Args:
      name: path of the file, or its bare name.
      overrides: "section.key=value" strings. Values are Python literals; anything else is text.

    Returns: the unlocked ConfigDict, not yet checked against the dataclasses.
    Raises: ConfigError for a missing file or get_config, or an override of an unknown key.
    """
    path = find_experiment(name)
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file: give an experiment file such as experiments/digits.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path} line {error.lineno} is not Python: {error.msg}") from None
    require(hasattr(module, "get_config"), f"{path} has no get_config(): an experiment file must define it")
    config = module.get_config()
    for section in OPTIONAL_SECTIONS:  # so that they can be overridden where the file leaves them out
        if section not in config:
            config[section] = ml_collections.ConfigDict()
    for override in overrides:
        _apply_override(config, override)
    return config


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return the values of "key=value" strings: Python literals; anything else is text."""
    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        require(bool(equals and key), f"override '{override}' is not of the form section.key=value")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: nested too deeply
            parsed[key] = text
    return parsed


def _apply_override(config: ml_collections.ConfigDict, override: str) -> None:
    ((key, value),) = parse_overrides([override]).items()
    *sections, last = key.split(".")
    node: Any = config
    for depth, name in enumerate(sections):
        if name not in node:
            section = "_".join(sections[: depth + 1])  # tokenizer.train is the section tokenizer_train
            hint = f" Did you mean config.{section}?" if section in config else nearest(name, node.keys())
            raise ConfigError(f"{'.'.join(['config', *sections[:depth]])} has no key '{name}'.{hint}")
        node = node[name]
        path = ".".join(sections[: depth + 1])
        is_section = isinstance(node, ml_collections.ConfigDict)
        require(is_section, f"config.{path} is a single value, so '{key}' cannot be set")
    if not sections and last not in node and last not in TOP_LEVEL:
        raise ConfigError(f"config has no key '{last}'.{nearest(last, node.keys())}")
    # A section may lack a key, because fields have defaults; `build` checks the name.
    with config.unlocked(), config.ignore_type():
        node[last] = value


def parse_value(text: str) -> Any:
    """Return the Python literal that the text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: nested too deeply
        return text


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
    """Make the frozen dataclass `cls` from a config section.

    Args:
      cls: a dataclass. Its annotations are the accepted types.
      section: field names to values; missing ones take the dataclass default.
      where: the section's name in messages.
      total_steps, steps_per_epoch: what "50%" and "200ep" mean for fields of type `Steps`.
      ignore: keys of the section that are not for this dataclass.

    Raises: ConfigError for an unknown key (with the nearest name), a missing one, or a wrong type.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key in section:
        if key in ignore:
            continue
        require(key in fields, f"{where} has no key '{key}'.{nearest(key, fields)}")
        value, path = section[key], f"{where}.{key}"
        if hints[key] == Steps:
            value = resolve_steps(value, path, total_steps, steps_per_epoch)
        values[key] = convert_value(value, hints[key], path)
    for name, field in fields.items():
        optional = dataclasses.MISSING is not field.default or dataclasses.MISSING is not field.default_factory
        lacks = f"{where} lacks {name}: set it in the experiment file, or --{where}.{name}=... on the command line"
        require(optional or name in values, lacks)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def convert_value(value: Any, hint: Any, where: str) -> Any:
    """Return the value as the annotated type: ints become floats, lists become tuples."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in args if a is not type(None)]
        return None if value is None else convert_value(value, inner, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            args = args[:1] * len(value)
        require(len(value) == len(args), f"{where} is {_show(value)}: it must have {len(args)} entries")
        return tuple(convert_value(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if hint is float and (type(value) is int or isinstance(value, (float, np.floating))):
        return float(value)
    plain = origin or hint
    if not isinstance(plain, type) or (isinstance(value, plain) and not (plain is int and isinstance(value, bool))):
        return value
    name = f"a list of {getattr(args[0], '__name__', args[0])}" if origin is tuple else plain.__name__
    raise ConfigError(f"{where} is {_show(value)} ({type(value).__name__}): it must be {name}")


def _show(value: Any) -> str:
    return " ".join(repr(value).split())[:200]  # a ConfigDict's own text has many lines


def steps_fields(cls: type) -> list[str]:
    """Return the names of a Config's fields that are durations."""
    return [name for name, hint in typing.get_type_hints(cls, include_extras=True).items() if hint == Steps]


def resolve_steps(value: Any, where: str, total_steps: int | None, steps_per_epoch: float | None) -> int:
    """Turn "50%" (of the training), "200ep" (epochs) or a number of steps into steps."""
    if type(value) is int:
        require(value >= 0, f"{where} is {value}: a duration cannot be negative")
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|ep)\s*", value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{where} is {_show(value)}: write steps (1000), a share ('50%') or epochs ('200ep')")
    number, unit = float(match[1]), match[2]
    base = total_steps if unit == "%" else steps_per_epoch
    if base is None:
        raise ConfigError(f"{where} is {value!r}: this duration needs {'steps' if unit == 'ep' else 'steps or epochs'}")
    return round(number / 100 * base if unit == "%" else number * base)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise ConfigError unless each named field of a config is at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, f"{name} is {value}: it must be at least {minimum}")


# ---------------------------------------------------------------- comparing and naming


def to_dict(config: Any) -> Any:
    """Return a ConfigDict, dataclass, or nest of them as plain nested dicts and lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, (Mapping, ml_collections.ConfigDict)):
        return {str(k): to_dict(v) for k, v in config.items()}
    return [to_dict(v) for v in config] if isinstance(config, (list, tuple)) else config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "train.steps: 100 -> 200" for each leaf in which two nested dicts differ."""
    a, b, absent = flatten(old), flatten(new), "(absent)"
    pairs = {key: (a.get(key, absent), b.get(key, absent)) for key in sorted(a.keys() | b.keys())}
    return [f"{key}: {' -> '.join(shortened(str(x), str(y)))}" for key, (x, y) in pairs.items() if x != y]


def shortened(a: str, b: str, limit: int = 80) -> tuple[str, str]:
    """Cut two long texts to the part around their first difference."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    begin = max(same - 10, 0) if max(len(a), len(b)) > limit else 0
    cut = ["..." * (begin > 0) + text[begin : begin + limit] + "..." * (len(text) > begin + limit) for text in (a, b)]
    return cut[0], cut[1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or list the names."""
    known = list(known)
    if close := difflib.get_close_matches(str(name), known, n=1, cutoff=0.5):
        return f" Did you mean '{close[0]}'?"
    if len(known) > 40:  # of hundreds of names only the nearest helps
        return f" The nearest is '{difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]}'."
    return f" It has: {', '.join(sorted(known))}." if known else ""
