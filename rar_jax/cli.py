"""The command line: from the flags of a verb (flags.py) to its file in programs/, no logic."""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from rar_jax.flags import MANY, parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rar-jax`. Returns the exit code: 0 done, 1 failed, 2 wrong command or experiment, 75 preempted."""
    flags = parser()
    args, rest = flags.parse_known_args(argv)
    try:
        return _run(args, rest, flags)
    except ImportError as error:
        from rar_jax.programs.refusals import of_import

        print(f"rar-jax {args.verb}: {of_import(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, rest: list[str], flags: argparse.ArgumentParser) -> int:
    overrides = [word.removeprefix("--config.") for word in rest if word.startswith("--config.")]
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        word, dot, key = wrong[0].partition(".")
        meant = f" Did you mean --config.{key}?" if dot and get_close_matches(word, ["--config"]) else ""
        flags.error(f"unknown argument {wrong[0]}; see rar-jax {args.verb} --help.{meant}")
    if args.verb == "doctor":  # before anything is imported that an old version may break
        return _doctor(args, overrides)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Images that large are refused and listed by name (data/decode.py): Pillow's own warning has none.
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")

    # Imported here so that --help is instant.
    from rar_jax.errors import ConfigError, ProcessError
    from rar_jax.parallel import mesh, processes

    if args.verb not in MANY:
        return _guarded(args, overrides)
    try:
        processes.start(args.coordinator_address, args.process_count, args.process_index)
        mesh.find_devices()
    except (ConfigError, ProcessError) as error:
        print(f"rar-jax {args.verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return processes.together(args.verb, lambda: _guarded(args, overrides))


def _guarded(args: argparse.Namespace, overrides: list[str]) -> int:
    """Does the verb; errors that people can mend are one line."""
    from rar_jax.errors import (
        PREEMPTED,
        CheckpointError,
        ConfigError,
        DeviceMemoryError,
        LeaseError,
        Preempted,
        ProcessError,
        ReferenceFileError,
        StorageError,
        StoreError,
        TrainingError,
        WeightsError,
    )
    from rar_jax.parallel import mesh
    from rar_jax.parallel.memory import exhaustion
    from rar_jax.programs import refusals
    from rar_jax.runs.object_store import ObjectStoreError
    from rar_jax.runs.progress import show_progress_in_files

    def fail(problem: object, code: int = 1) -> int:
        print(f"rar-jax {args.verb}: {' '.join(str(problem).split())}", file=sys.stderr)
        return code

    show_progress_in_files(args.progress)
    ours = ConfigError, StoreError, ReferenceFileError, WeightsError, TrainingError, CheckpointError, LeaseError
    try:
        if args.verb == "inspect":
            return _inspect(args, overrides)
        if args.verb == "report":
            return _report(args, overrides)
        if args.verb != "plan":  # whose devices are elsewhere
            mesh.find_devices()
        rows = f"--batch-size {args.batch_size or ''}" if "batch_size" in args else "config.evaluate.batch_size"
        with exhaustion(rows.strip(), "make it smaller, or take more devices"):  # where the work itself says no more
            _dispatch(args, overrides)
    except Preempted:
        print(f"\nrar-jax {args.verb}: preempted; the same command resumes", file=sys.stderr)
        return PREEMPTED
    except (*ours, ProcessError, StorageError, ObjectStoreError, DeviceMemoryError) as error:
        return fail(error, 2 if isinstance(error, ConfigError) else 1)
    except OSError as error:  # a full disk, a file where a folder should be, no permission
        return fail(refusals.of_system(error, getattr(args, "out", None) or getattr(args, "workdir", None)))
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint, if there is one yet", file=sys.stderr)
        return 130
    return 0


def _fetched(path: Any) -> Any:
    """The folder of a work directory that is in a bucket, brought here; anything else as it is."""
    from rar_jax.runs.object_store import is_url
    from rar_jax.runs.workdir import Workdir

    return str(Workdir(path).fetch().path) if path and is_url(path) else path


def _dispatch(args: argparse.Namespace, overrides: list[str]) -> None:
    from rar_jax.config import load_experiment
    from rar_jax.errors import ConfigError

    if hasattr(args, "weights"):
        args.weights = _fetched(args.weights)
    if args.verb in ("sample", "convert") and overrides:
        raise ConfigError(f"{args.verb} takes no --config.* arguments: the experiment is the work directory's")
    if args.verb == "convert":
        from rar_jax.programs.convert import convert

        keywords = {name: getattr(args, name) for name in ("tokenizer", "part", "download", "quiet")}
        convert(args.weights, args.out, **keywords)
        return
    if args.verb == "sample":
        from rar_jax.cli_evaluate import parse_guidance
        from rar_jax.programs.sample import sample

        sample(
            args.weights,
            args.out,
            classes=args.classes,
            per_class=args.per_class,
            seed=args.seed,
            guidance=parse_guidance(args.guidance),
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            tensor=args.tensor,
            batch_size=args.batch_size,
            download=args.download,
            quiet=args.quiet,
        )
        return

    if args.verb == "bench":
        _bench(args, overrides)
        return

    if args.verb == "plan":
        _plan(args, overrides)
        return

    elsewhere = ("source", "verify", "import_", "export", "weights", "out")
    if args.verb == "tokenize" and (not args.workdir or any(getattr(args, name) for name in elsewhere)):
        _tokenize(args, overrides)
        return

    if args.verb == "evaluate" and (args.inception or args.images or args.make_reference or args.steps):
        from rar_jax.cli_evaluate import evaluate as score

        _say(score(args, overrides))
        return

    from rar_jax.experiment import resolve
    from rar_jax.runs.workdir import Workdir

    if args.verb == "tokenize" and not args.config:
        raise ConfigError("tokenize --workdir needs --config: the experiment that the directory belongs to")
    if not args.config or not args.workdir:
        raise ConfigError("evaluate needs --inception (FID), or --config and --workdir (fd_classifier): see --help")

    experiment = resolve(load_experiment(args.config, overrides), pathlib.Path(args.config).stem)
    workdir = Workdir(args.workdir).fetch()
    if args.verb == "run":
        from rar_jax.programs.run import run

        run(experiment, workdir, quiet=args.quiet)
        return

    from rar_jax.parallel.mesh import make_mesh
    from rar_jax.weights.stages import check_start

    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    if args.verb != "train":
        workdir.read_config()  # tokenize and evaluate need what another verb has made; they start nothing
    if args.verb == "train":
        check_start(experiment, workdir)
    from rar_jax.runs.session import open_session

    with open_session(workdir, args.verb, lambda: workdir.claim(experiment.resolved())) as around:
        if args.verb == "train":
            from rar_jax.programs.run import headline
            from rar_jax.training.loop import train

            if not args.quiet:
                _say(headline(experiment, workdir, mesh))
            train(experiment, args.stage, workdir, mesh, quiet=args.quiet, session=around)
        elif args.verb == "tokenize":
            from rar_jax.tokens.tokenize import tokenize

            for split in ("train", "heldout"):
                tokenize(experiment, workdir, mesh, split, quiet=args.quiet)
                around.ledger.lap("tokenizing")
                around.ledger.row("tokenized", split=split)
        else:
            import json

            from rar_jax.evaluation.fd_classifier import score_with_classifier

            _say(json.dumps(score_with_classifier(experiment, workdir, mesh, quiet=args.quiet), indent=1))
            around.ledger.lap("evaluating")


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    import json

    import jax

    from rar_jax.config import load_experiment
    from rar_jax.experiment import resolve
    from rar_jax.tools.plan.plan import list_parts, plan_experiment, search_meshes
    from rar_jax.tools.plan.text import format_plan, format_search
    from rar_jax.tools.plan.topology import parse_topology

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    jax.config.update("jax_platforms", "cpu")  # whatever is here: the chips are elsewhere
    topology = parse_topology(args.topology, args.slices)
    experiment = resolve(load_experiment(args.config, overrides), pathlib.Path(args.config).stem)
    if args.search:
        found = search_meshes(experiment, topology, say=say)
        print(json.dumps(found, indent=1) if args.json else format_search(found))
        return
    report: dict[str, Any] = {}
    for part in (
        (args.only,) if args.only else list_parts(experiment)
    ):  # each is told when it is there: they take minutes
        found = plan_experiment(
            experiment, topology, sample_rows=args.sample_rows, parts=(part,), remedies=not args.as_is, say=say
        )
        if not args.json:
            print(format_plan(found, heading=not report), flush=True)
        report |= found
    if args.json:
        print(json.dumps(report, indent=1))


def _say(text: str) -> None:
    """Prints once, however many processes there are."""
    from rar_jax.parallel.processes import is_main

    if is_main():
        print(text, flush=True)


def _tokenize(args: argparse.Namespace, overrides: list[str]) -> None:
    from rar_jax.config import load_experiment
    from rar_jax.errors import ConfigError
    from rar_jax.experiment import resolve
    from rar_jax.parallel.processes import is_main
    from rar_jax.tokens.writer import SHARD_RECORDS

    if args.workdir or sum(x is not None for x in (args.verify, args.import_, args.export, args.source)) != 1:
        raise ConfigError("give one of --workdir (alone), --source, --verify, --import and --export: see --help")
    if not args.source and not is_main():
        return  # files in and out: process 0's work
    if args.verify:
        from rar_jax.tokens.verify import verify_tokens

        keywords = {name: getattr(args, name) for name in ("weights", "out", "download", "quiet")}
        print(verify_tokens(args.verify, **keywords))
        return
    if args.out is None:
        raise ConfigError("give --out: where the store or file shall be written")
    experiment = None
    if args.config:
        # In the place of the experiment's own: what is not written there is counted here.
        instead = [f"data.source={args.source}"] if args.source else []
        experiment = resolve(load_experiment(args.config, [*overrides, *instead]), pathlib.Path(args.config).stem)
    common = {"shard_records": SHARD_RECORDS if args.shard_records is None else args.shard_records, "quiet": args.quiet}
    if args.export:
        from rar_jax.tokens.verify import export_tokens

        export_tokens(args.export, args.out, quiet=args.quiet)
    elif args.import_:
        from rar_jax.tokens.verify import import_tokens

        sizes = {"codebook_size": args.codebook_size, "num_classes": args.num_classes}
        import_tokens(args.import_, args.out, experiment=experiment, **sizes, **common)
    else:
        from rar_jax.parallel.mesh import make_mesh
        from rar_jax.tokens.tokenize import tokenize_source

        if experiment is None or not args.weights:
            raise ConfigError("tokenize --source needs --config (what the images are) and --weights (the tokenizer)")
        keywords = {name: getattr(args, name) for name in ("source", "weights", "out", "crops", "split", "batch_size")}
        tokenize_source(experiment, make_mesh(experiment.mesh), **keywords, download=args.download, **common)


def _inspect(args: argparse.Namespace, overrides: list[str]) -> int:
    import json

    import jax

    from rar_jax.errors import ConfigError
    from rar_jax.tools.inspect.inspect import inspect_target
    from rar_jax.tools.inspect.layout import print_summary

    if overrides:
        raise ConfigError("inspect takes no --config.* arguments")
    # It reads files; the accelerator may be another program's, the training's that one asks after, or not there.
    jax.config.update("jax_platforms", "cpu")
    names = ("split", "image_size", "limit", "problems", "out", "quiet")
    summary = inspect_target(args.what, **{name: getattr(args, name) for name in names})
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print_summary(summary)
    return 1 if summary["num_problems"] else 0


def _report(args: argparse.Namespace, overrides: list[str]) -> int:
    from rar_jax.errors import ConfigError
    from rar_jax.tools.report.report import write_report

    if overrides:
        raise ConfigError("report takes no --config.* arguments: the experiment is the work directory's")
    print(write_report([_fetched(workdir) for workdir in args.workdirs], args.out))
    return 0


def _doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    import json

    from rar_jax.tools.doctor import check_machine, format_checkup

    if overrides:
        print("rar-jax doctor: it takes no --config.* arguments", file=sys.stderr)
        return 2
    if isinstance(args.workdir, str):
        told = "is a bucket, whose work is done in a folder here: give that, RAR_JAX_SCRATCH (default ~/.cache/rar_jax)"
        print(f"rar-jax doctor: {args.workdir} {told}", file=sys.stderr)
        return 2
    checkup = check_machine(args.workdir)
    if args.json or not args.quiet or checkup["problems"]:
        print(json.dumps(checkup, indent=1) if args.json else format_checkup(checkup))
    return 1 if checkup["problems"] else 0


def _bench(args: argparse.Namespace, overrides: list[str]) -> None:
    import json

    from rar_jax.config import load_experiment
    from rar_jax.errors import ConfigError
    from rar_jax.experiment import resolve
    from rar_jax.tools.bench.bench import bench_experiment, format_bench
    from rar_jax.tools.bench.cases import Options

    try:
        sizes = tuple(int(x) for x in args.batch_size.split(",")) if args.batch_size else ()
    except ValueError:
        raise ConfigError(f"--batch-size {args.batch_size}: give a number, or several as 1,8,64") from None
    keywords = {name: getattr(args, name) for name in ("what", "repeats", "dtype", "decode", "whole", "records")}
    options = Options(batch_sizes=sizes, **keywords)
    experiment = resolve(load_experiment(args.config, overrides), pathlib.Path(args.config).stem)
    report = bench_experiment(experiment, options, profile=args.profile, quiet=args.quiet)
    if not (args.json and args.quiet):
        print(format_bench(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, indent=1))
