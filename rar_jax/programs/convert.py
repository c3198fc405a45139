"""Converts weights: released files to a directory of ours, and back to files that the authors' code loads."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import rar_jax
from rar_jax.config import require, to_dict
from rar_jax.data import imagenet
from rar_jax.errors import ConfigError, WeightsError
from rar_jax.models import check_pair, find_module
from rar_jax.runs.checkpoint import save_params
from rar_jax.runs.manifest import file_sha256, write_json
from rar_jax.runs.progress import track_progress
from rar_jax.runs.workdir import Workdir
from rar_jax.sampling import Guidance
from rar_jax.weights import registry as released
from rar_jax.weights.loading import Weights, open_weights

SUFFIX = ".safetensors"


def convert(
    weights: str,
    out: pathlib.Path,
    *,
    tokenizer: str | None = None,
    part: str | None = None,
    download: bool = False,
    quiet: bool = False,
) -> None:
    """Write a file (`out` ends in .safetensors) or a directory of ours.

    The sha256 of what was read and written is recorded: in out.json beside a file, in config.json of a directory.

    Args:
      weights, tokenizer: as in `rar_jax.load`.
      part: "generator" or "tokenizer"; default: what the file is, the generator of a directory.

    Raises: ConfigError, WeightsError or CheckpointError that say what is wrong; `out` is then not there.
    """
    require(not out.exists(), f"--out {out} exists: choose another, or move it away")
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}")
    path = released.locate(weights, download=download)
    if out.suffix == SUFFIX:
        require(not _record(out).exists(), f"{_record(out)} exists, and would be written too: move it away")
        require(tokenizer is None, "a file holds one model: leave --tokenizer out, and convert it by itself")
        record = _to_file(_open(path, part), out, quiet)
    else:
        require(
            path.is_file(),
            f"{path} is a directory of ours already; --out FILE{SUFFIX} takes its weights out of it",
        )
        require(part is None, "--part is for an --out that is a file")
        require(tokenizer is not None, "a directory holds a generator and its tokenizer: give --tokenizer too")
        generator = open_weights(path, "generators")
        num_tokens = generator.model.module.token_spec(generator.model.config).shape[0]
        where = released.locate(str(tokenizer), download=download)
        record = _to_directory(generator, open_weights(where, "tokenizers", num_tokens=num_tokens), out, quiet)
    if not quiet:
        print(json.dumps(record, indent=1))


def _open(path: pathlib.Path, part: str | None) -> Weights:
    kinds = [f"{part}s"] if part else ["generators"] if path.is_dir() else ["generators", "tokenizers"]
    refused: list[WeightsError] = []
    for kind in kinds:
        try:
            return open_weights(path, kind)
        except WeightsError as error:
            refused.append(error)
    # A file that is neither: the error of what it looks most like.
    raise next((e for e in refused if "is a tokenizer" not in str(e)), refused[0])


def _to_file(weights: Weights, out: pathlib.Path, quiet: bool) -> dict[str, Any]:
    name = weights.model.module.__name__.rpartition(".")[2]
    save = find_module("weights", name).save
    parts: tuple[Callable[[], Any], ...] = (
        lambda: save(out, weights.model.config, weights.place()),
        lambda: file_sha256(out),
        lambda: _source(weights),
    )
    told = track_progress(parts, description=f"convert {weights.path.name}", unit="parts", quiet=quiet)
    _, sha256, made_from = [part() for part in told]
    record = {
        "file": out.name,
        "sha256": sha256,
        "bytes": out.stat().st_size,
        "config": {"name": name, **to_dict(weights.model.config)},
        "made_from": made_from,
        "made_by": f"rar_jax {rar_jax.__version__}",
    }
    write_json(_record(out), record)
    return record


def _record(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f"{out.name}.json")


def _to_directory(generator: Weights, tokenizer: Weights, out: pathlib.Path, quiet: bool) -> dict[str, Any]:
    check_pair(generator.model, tokenizer.model)
    known = released.preset(generator.model.config)
    classes = generator.model.config.num_classes
    config: dict[str, Any] = {
        "name": generator.path.stem,
        "data": {"class_names": list(imagenet.class_names()) if known else [str(i) for i in range(classes)]},
        "guidance": to_dict(known.guidance if known else Guidance(0.0)),
        "converted_from": {"generator": _source(generator), "tokenizer": _source(tokenizer)},
        "converted_by": f"rar_jax {rar_jax.__version__}",
    }
    partial = out.with_name(f".{out.name}.rar_jax_partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was cut off
    try:
        both = (("generator", generator), ("tokenizer", tokenizer))
        for stage, weights in track_progress(both, description=f"convert {out.name}", unit="models", quiet=quiet):
            module = weights.model.module.__name__.rpartition(".")[2]
            config[stage] = {"name": module, **to_dict(weights.model.config)}
            meta = {"stage": stage, "made_from": config["converted_from"][stage]}
            save_params(Workdir(partial).checkpoints(stage), weights.place(), meta)
        write_json(Workdir(partial).config, config)
        os.replace(partial, out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror or error}): choose another place") from error
    return {"directory": str(out), **{k: config[k] for k in ("name", "guidance", "converted_from")}}


def _source(weights: Weights) -> dict[str, Any]:
    return {"path": weights.path.name, "sha256": weights.sha256()}
