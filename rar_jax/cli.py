"""The command line: runs the verbs of arguments.py.

Only the verb that runs is imported, so that `rar-jax --help` is instant.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rar_jax.arguments import VERBS, make_parser
from rar_jax.errors import PREEMPTED, Preempted, RarJaxError, describe_import_error, describe_os_error


def split_overrides(words: Sequence[str], section: str) -> tuple[list[str], list[str]]:
    """Separate `--section.a.b=5` and `--section.a.b 5` from the other words, as "a.b=5"."""
    rest, overrides, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith(f"--{section}."):
            rest.append(word)
            continue
        if "=" not in word and queue and not queue[0].startswith("--"):
            word = f"{word}={queue.pop(0)}"
        overrides.append(word.removeprefix(f"--{section}."))
    return rest, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rar-jax`. Exit codes: 0 done, 1 failed, 2 wrong command or experiment, 75 preempted, 130 interrupted."""
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv, "config")
    words, settings = split_overrides(words, "sampling")
    parser = make_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        word, dot, key = unknown[0].partition(".")
        near = difflib.get_close_matches(word, ["--config", "--sampling"], n=1) if dot else []
        hint = f" Did you mean {near[0]}.{key}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}; see rar-jax {args.verb} --help.{hint}")
    keywords = dict(vars(args))
    name, progress = keywords.pop("verb"), keywords.pop("progress")
    place = [keywords.pop(key, None) for key in ("coordinator_address", "process_count", "process_index")]
    if overrides and not keywords.get("config"):
        return _fail(name, f"there is no --config that --config.{overrides[0]} could change", 2)
    if settings and (not VERBS[name].sampling or keywords.get("config")):
        use = "give it to sample or evaluate" + f", or --config.sampling.{settings[0]}" * VERBS[name].has_config
        return _fail(name, f"--sampling.{settings[0]} is not for this command: {use}", 2)
    if VERBS[name].sampling:
        keywords["sampling"] = settings
    try:
        if name == "doctor":  # checks what the other verbs import
            return import_function(name)(**keywords)
        _set_up_logging(progress)
        if VERBS[name].processes:
            return _run_processes(name, keywords, overrides, place)
        return _run(name, keywords, overrides)
    except ImportError as error:
        return _fail(name, describe_import_error(error), 1)


def _set_up_logging(progress: bool) -> None:
    from rar_jax.runs.progress import show_progress_in_files

    show_progress_in_files(progress)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")  # data/decode.py names them


def _run_processes(name: str, keywords: dict[str, Any], overrides: list[str], place: list[Any]) -> int:
    """Run a verb as one of several processes, or alone. The processes end together."""
    from rar_jax.parallel import mesh, processes

    try:
        processes.join_processes(*place)
        mesh.find_devices()
    except RarJaxError as error:
        return _fail(name, error, error.exit_code)
    return processes.run_together(name, lambda: _run(name, keywords, overrides))


def _run(name: str, keywords: dict[str, Any], overrides: list[str]) -> int:
    """Open the experiment and the work directory, and call the verb. Actionable errors are one line on stderr."""
    from rar_jax.config import parse_overrides
    from rar_jax.experiment import open_experiment
    from rar_jax.parallel.memory import exhaustion
    from rar_jax.runs.bucket import is_url
    from rar_jax.runs.workdir import Workdir
    from rar_jax.weights.loading import parse_reading

    written = keywords.get("out") or keywords.get("workdir")
    size = "--batch-size" if "batch_size" in keywords else "config.evaluate.batch_size"
    try:
        if VERBS[name].has_config:
            config, source = keywords.pop("config"), keywords.get("source")
            if source:  # tokenize counts the classes and images of this source
                overrides = [*overrides, f"data.source={source}"]
            keywords["experiment"] = open_experiment(config, overrides) if config else None
        if "raw" in keywords:
            given = {name: keywords.pop(name) for name in ("download", "fact", "model", "raw")}
            keywords["reading"] = parse_reading(**given)
        if "sampling" in keywords:
            keywords["sampling"] = parse_overrides(keywords["sampling"])
        if keywords.get("workdir") is not None:
            keywords["workdir"] = Workdir(keywords["workdir"]).fetch()
        if is_url(keywords.get("weights") or ""):
            keywords["weights"] = str(Workdir(keywords["weights"]).fetch().path)
        with exhaustion(size, "make it smaller, or use more devices"):  # where the verb has no better advice
            return import_function(name)(**keywords) or 0
    except Preempted:
        return _fail(name, "preempted and saved; rerun the same command to resume", PREEMPTED)
    except RarJaxError as error:
        return _fail(name, error, error.exit_code)
    except OSError as error:
        return _fail(name, describe_os_error(error, written), 1)
    except KeyboardInterrupt:
        return _fail(name, "interrupted; rerun the same command to resume", 130)


def import_function(name: str) -> Callable[..., Any]:
    """Import the function of a verb."""
    module, _, function = VERBS[name].function.partition(":")
    return getattr(importlib.import_module(f"rar_jax.{module}"), function)


def _fail(name: str, problem: object, code: int) -> int:
    print(f"rar-jax {name}: {' '.join(str(problem).split())}", file=sys.stderr)
    return code
