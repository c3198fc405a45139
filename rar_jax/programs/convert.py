"""Convert weights: released files to a directory, and back to files that the authors' code loads."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import rar_jax
from rar_jax.config import require, to_dict
from rar_jax.data import imagenet
from rar_jax.errors import ConfigError
from rar_jax.models import Model
from rar_jax.runs.checkpoint import save_params
from rar_jax.runs.manifest import file_sha256, write_json
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import make_sampling
from rar_jax.weights.loading import Reading, Weights, open_pair, open_weights, recognize_file
from rar_jax.weights.registry import find_file, find_released, list_systems

SUFFIX = ".safetensors"
MADE_BY = f"rar_jax {rar_jax.__version__}"


def convert_weights(
    weights: str,
    out: pathlib.Path,
    *,
    tokenizer: str | None = None,
    part: str | None = None,
    reading: Reading = Reading(),
    quiet: bool = False,
) -> None:
    """Write a file (`out` ends in .safetensors) or a directory.

    Records the sha256 of what was read and written: in out.json beside a file, in config.json of a directory.

    Args:
      weights, tokenizer: as in `rar_jax.load`.
      part: "generator" or "tokenizer"; default: what the file is, the generator of a directory.

    Raises: ConfigError, WeightsError or CheckpointError; `out` then does not exist.
    """
    torch = out.suffix.lower() in (".bin", ".pt", ".pth")
    require(not torch, f"--out {out}: give FILE{SUFFIX}; docs/released_weights.md makes a torch file of it")
    require(not out.exists(), f"--out {out} exists: choose another, or move it away")
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}")
    path = find_file(weights, download=reading.download)
    if out.suffix == SUFFIX:
        sidecar = out.with_name(f"{out.name}.json")
        require(not sidecar.exists(), f"{sidecar} exists, and would be overwritten: move it away")
        require(tokenizer is None, "a file holds one model: leave --tokenizer out, and convert it separately")
        kind = (
            f"{part}s" if part else "generators" if path.is_dir() else recognize_file(path, weights, reading.models)[0]
        )
        record = _write_file(open_weights(weights, kind, reading=reading), out, quiet)
        write_json(sidecar, record)
    else:
        require(path.is_file(), f"{path} is a directory already: give --out FILE{SUFFIX}")
        require(part is None, "--part is for an --out that is a file")
        if tokenizer is None:
            raise ConfigError("a directory holds a generator and its tokenizer: give --tokenizer too")
        record = _write_directory(*open_pair(weights, tokenizer, reading=reading), out, quiet)
    if not quiet:
        print(json.dumps(record, indent=1))


def _write_file(weights: Weights, out: pathlib.Path, quiet: bool) -> dict[str, Any]:
    config, systems = _describe_model(weights.model), list_systems()
    require(
        weights.model.name in systems,
        f"{weights.model.name} has no released files: rar_jax/weights has no module of it",
    )
    record: dict[str, Any] = {"file": out.name, "config": config, "made_by": MADE_BY}
    for step in track_progress(
        ("save", "hash", "source"), description=f"convert {weights.path.name}", unit="parts", quiet=quiet
    ):
        if step == "save":
            systems[weights.model.name][1].save(out, weights.model.config, weights.place())
        elif step == "hash":
            record |= {"sha256": file_sha256(out), "bytes": out.stat().st_size}
        else:
            record["made_from"] = _describe_source(weights)
    return record


def _write_directory(generator: Weights, tokenizer: Weights, out: pathlib.Path, quiet: bool) -> dict[str, Any]:
    known = find_released(generator.model)
    numbers = [str(i) for i in range(generator.model.config.num_classes)]
    config: dict[str, Any] = {
        "name": generator.path.stem,
        "data": {"class_names": list(imagenet.class_names()) if known else numbers},
        "sampling": to_dict(make_sampling(generator.model, known.sampling if known else {})),
        "converted_from": {"generator": _describe_source(generator), "tokenizer": _describe_source(tokenizer)},
        "converted_by": MADE_BY,
    }
    partial = out.with_name(f".{out.name}.rar_jax_partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted conversion
    try:
        both = (("generator", generator), ("tokenizer", tokenizer))
        for stage, weights in track_progress(both, description=f"convert {out.name}", unit="models", quiet=quiet):
            config[stage] = _describe_model(weights.model)
            meta = {"stage": stage, "made_from": config["converted_from"][stage]}
            save_params(Workdir(partial).checkpoints(stage), weights.place(), meta)
        Workdir(partial).write_config(config)
        os.replace(partial, out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror or error}): choose another path") from error
    return {"directory": str(out), **{k: config[k] for k in ("name", "sampling", "converted_from")}}


def _describe_model(model: Model) -> dict[str, Any]:
    return {"name": model.name, **to_dict(model.config)}


def _describe_source(weights: Weights) -> dict[str, Any]:
    return {"path": weights.path.name, "sha256": weights.sha256()}
