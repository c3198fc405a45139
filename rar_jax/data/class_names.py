"""Class numbers from what people type: numbers, ranges and names."""

from __future__ import annotations

import re

from rar_jax.config import nearest
from rar_jax.errors import ConfigError


def parse_classes(text: str, class_names: tuple[str, ...]) -> list[int]:
    """Return the class numbers of "3,sneaker,0-4": numbers, ranges, or names in any case.

    class_names: one per class, with its synonyms: "tench, Tinca tinca". Raises: ConfigError.
    """
    synonyms: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        for synonym in {name.lower(), *(part.strip() for part in name.lower().split(","))}:
            synonyms.setdefault(synonym, []).append(label)
    last = len(class_names) - 1
    labels: list[int] = []
    for part in (" ".join(p.split()) for p in text.split(",")):
        found = synonyms.get(part.lower(), [])
        if part.isdecimal():
            labels.append(int(part))
        elif match := re.fullmatch("([0-9]+)-([0-9]+)", part):
            first, end = map(int, match.groups())
            if first > end:
                raise ConfigError(f"classes {part}: a range is LOW-HIGH, as in {end}-{first}")
            if end > last:
                raise ConfigError(f"classes {part} go beyond 0..{last}")
            labels += range(first, end + 1)
        elif len(found) == 1:
            labels += found
        elif found:
            numbers = " or ".join(f"{label} ({class_names[label]})" for label in found)
            raise ConfigError(f"'{part}' is {len(found)} classes: give {numbers}")
        else:
            raise ConfigError(f"no class '{part}'.{_suggest(part.lower(), synonyms)}")
    return labels


def _suggest(name: str, synonyms: dict[str, list[int]]) -> str:
    """Name the classes that contain `name` as a word, else the nearest."""
    holding = [f"{synonym} ({labels[0]})" for synonym, labels in synonyms.items() if name and name in synonym.split()]
    if holding:
        return f" There is: {', '.join(holding[:8])}{', ...' if len(holding) > 8 else ''}."
    hint = nearest(name, synonyms)
    return hint if "Did you mean" in hint or len(synonyms) <= 20 else ""  # a thousand names are no help
