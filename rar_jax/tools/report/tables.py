"""Numbers for the page of `report`: curves out of metrics.jsonl, and scores with all that they depend on."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

POINTS = 2000  # of a curve in the page; of more, the smallest and the largest of each short span

# What a score depends on: the column of the table, and where result.json has it (the first of these). Not the sizes of batches and
# chunks, which change its last bits at most; they stand with all that it was made from, and on.
CONDITIONS = (
    ("reference", ("reference_sha256", "reference")),
    ("weights", ("generator_sha256", "weights.generator", "images_sha256")),
    ("tokenizer", ("tokenizer_sha256", "weights.tokenizer")),
    ("features of", ("inception_sha256", "weights.classifier")),
    ("rounding", ("rounding",)),
    ("resize protocol", ("protocol",)),
    ("precision", ("features",)),
    ("sampled in", ("generator_dtype",)),
    ("seed", ("seed",)),
    ("guidance", ("guidance",)),
    ("images a split", ("split_size",)),
    ("device", ("device",)),
    ("mesh", ("mesh",)),
    ("jax", ("versions.jax",)),
    ("rar_jax", ("versions.rar_jax",)),
)
# These stand, with what they depend on, in evaluation/result.json; result.json has them beside fd_classifier's conditions.
BY_INCEPTION = re.compile(r"(fid|fid_in_graph_float32|sfid|inception_score|precision|recall|kid)_n\d+")


def curves(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every metric as {"stage", "panel", "name", "steps", "values", "of"}; `of`: how many points there are.

    A panel holds what can be compared: "loss" of the training, "validation/loss" and "validation/raster_loss".
    Panels with held-out numbers come first.
    """
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step", "time") and isinstance(value, int | float):
                points.setdefault((row["stage"], name), []).append((row["step"], value))
    out = []
    for (stage, name), told in points.items():
        base = _base(name, [other for of, other in points if of == stage])
        steps, values = _fewer(*np.array(sorted(dict(told).items()), np.float64).T)
        out.append(
            {
                "stage": stage,
                "panel": base,
                "name": name,
                "steps": [int(step) for step in steps],
                "values": values.tolist(),
                "of": len(told),
            }
        )
    heldout = {(c["stage"], c["panel"]) for c in out if c["name"].startswith("validation/")}
    return sorted(out, key=lambda c: ((c["stage"], c["panel"]) not in heldout, "_n" not in c["name"]))


def _base(name: str, others: list[str]) -> str:
    """The shortest name in the stage that this one ends in: "loss" of "validation/raster_loss"."""
    bare = name.removeprefix("validation/")
    ends = [other for other in others if bare == other or bare.endswith("_" + other)]
    return min(ends, key=len) if name.startswith("validation/") and ends else bare


def _fewer(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of them, all real: peaks stay."""
    if len(steps) <= POINTS:
        return steps, values
    spans = np.array_split(np.arange(len(steps)), POINTS // 2)
    kept = np.unique([span[i] for span in spans for i in (values[span].argmin(), values[span].argmax())])
    return steps[kept], values[kept]


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested mappings as ("section.key", text)."""
    out: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            out += flat(value, f"{prefix}{name}.")
        else:
            out.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return out


def scores(workdir: pathlib.Path, problems: list[str]) -> list[dict[str, Any]]:
    """The result files of a work directory: {"file", "numbers": [[name, value, n or None], ...], "conditions", "made_on", "said"}.

    What cannot be read is added to `problems`.
    """
    found = []
    for path in [workdir / "result.json", *sorted((workdir / "evaluation").rglob("result.json"))]:
        try:
            result = json.loads(path.read_text())
            if not isinstance(result, dict):
                raise ValueError("it holds no mapping")
            found.append({"file": str(path.relative_to(workdir)), **_score(result)})
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, AttributeError) as error:  # of types that are not ours, too
            problems.append(f"{path} cannot be read ({error}): remove it, and run the same command again")
    return found


def side_by_side(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores (of `scores`) that two work directories have in files of the same name, both values in one row.

    Returns: {"file", "numbers": [[name, value, value, n, n], ...], "conditions": [[column, text, text], ...]} of each file; None
      where a run has no such number.
    """
    found = []
    for pair in ((a, b) for a in one for b in other if a["file"] == b["file"]):
        rows: dict[str, list[Any]] = {}
        for i, score in enumerate(pair):
            for name, value, n in score["numbers"]:
                row = rows.setdefault(name, [name, None, None, None, None])
                row[1 + i], row[3 + i] = value, n
        conditions = [[column, *(score["conditions"][column] for score in pair)] for column, _ in CONDITIONS]
        found.append({"file": pair[0]["file"], "numbers": list(rows.values()), "conditions": conditions})
    return found


def _score(result: Mapping[str, Any]) -> dict[str, Any]:
    made_from, made_on = (result.get(name) or {} for name in ("made_from", "made_on"))
    told = {k: v for k, v in result.items() if k not in ("made_from", "made_on", "remarks", "seconds", "n")}
    told = {k: v for k, v in told.items() if not BY_INCEPTION.fullmatch(k)}
    numbers: list[list[Any]] = []
    said = list(result.get("remarks", []))

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name} ")
            elif isinstance(value, bool) or value is None or name == "step":
                continue
            elif isinstance(value, float) and not math.isfinite(value):
                said.append(f"{prefix}{name}: {value}")
            elif isinstance(value, int | float):
                n = re.search(r"_n(\d+)", name)
                whole = result.get("n")
                numbers.append([f"{prefix}{name}".replace("validation/", ""), value, int(n[1]) if n else whole])
            elif isinstance(value, str):
                said.append(f"{prefix}{name}: {value}")

    walk(told, "")
    everything = dict(flat(made_from))
    beside = ("protocol", "features", "generator_dtype", "split_size", "device", "versions.jax", "versions.rar_jax")
    everything |= {name: text for name, text in flat(made_on) if name in beside}
    together = {"guidance": made_from.get("guidance"), "mesh": made_on.get("mesh")}
    everything |= {name: _in_one(values) for name, values in together.items() if values}
    distance = result.get("fd_classifier") or {}
    everything.setdefault("reference", distance.get("reference") or result.get("reference") or "none")
    conditions = {
        column: next((everything[name] for name in names if everything.get(name, "null") != "null"), "not recorded")
        for column, names in CONDITIONS
    }
    return {
        "numbers": numbers,
        "conditions": conditions,
        "made_from": flat(made_from),
        "made_on": flat(made_on),
        "said": said,
    }


def _in_one(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
