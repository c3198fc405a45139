"""The command line: verbs and their flags, no logic. Each verb is a file in programs/."""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rar_jax import cli_texts

# Verbs of the design that are not built yet.
LATER = ("plan", "inspect", "report", "doctor")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="rar-jax", description=cli_texts.DESCRIPTION, formatter_class=formatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, short: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=short, description=f"{short}\n\n{text}", formatter_class=formatter)
        sub.add_argument("--quiet", action="store_true", help="no progress and no summary, only results and errors")
        return sub

    def experiment_verb(name: str, short: str, text: str) -> argparse.ArgumentParser:
        sub = verb(name, short, text + cli_texts.OVERRIDES)
        sub.add_argument("--config", required=True, help="experiment file, or its bare name (digits)")
        sub.add_argument("--workdir", required=True, type=pathlib.Path, help="where everything is written and resumed")
        return sub

    def weights_flags(sub: argparse.ArgumentParser, required: bool = True) -> None:
        sub.add_argument(
            "--weights",
            required=required,
            help="directory of a run or of convert, generator file, or a released name (rar_b)",
        )
        sub.add_argument("--tokenizer", help="the tokenizer's file, with a generator file")
        sub.add_argument(
            "--download", action="store_true", help="fetch released files that are not here, and check them"
        )

    def sampling_flags(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--seed", type=int, default=0, help="same seed, same images (default 0)")
        sub.add_argument(
            "--guidance", help="SCALE[,POWER[,TEMPERATURE]] (default: the experiment's, or the released model's)"
        )
        sub.add_argument("--dtype", help="float32 (default) or bfloat16: what the generator multiplies in")

    experiment_verb("run", "Do the whole job of an experiment, or resume it.", cli_texts.RUN)
    sub = experiment_verb("train", "Train one stage of an experiment, or resume it.", cli_texts.TRAIN)
    sub.add_argument("--stage", default="generator", choices=("tokenizer", "classifier", "generator"))
    sub = verb(
        "tokenize",
        "Turn images into token stores; check, import and export those.",
        cli_texts.TOKENIZE + cli_texts.OVERRIDES,
    )
    sub.add_argument("--config", help="experiment file, or its bare name: says what the images and the tokenizer are")
    sub.add_argument("--workdir", type=pathlib.Path, help="tokenize the experiment's splits with its trained tokenizer")
    sub.add_argument("--source", help="instead: tokenize these images (digits, idx:FOLDER, tfds:NAME)")
    sub.add_argument("--weights", help="the tokenizer: file, directory or released name")
    sub.add_argument(
        "--out", type=pathlib.Path, help="folder of the store; with --verify a PNG, with --export the file"
    )
    sub.add_argument("--crops", help="pad, center or ten: what is cut out of each image (default: the source's own)")
    sub.add_argument("--split", default="train", choices=("train", "heldout"))
    sub.add_argument(
        "--shard-records", type=int, help="records a shard, which is what a killed run loses (default 65536)"
    )
    sub.add_argument("--batch-size", type=int, default=256, help="images at a time over all devices (default 256)")
    sub.add_argument("--download", action="store_true", help="fetch a released tokenizer that is not here")
    sub.add_argument("--verify", type=pathlib.Path, metavar="DIR", help="check a store; with --weights also draw it")
    sub.add_argument("--import", type=pathlib.Path, metavar="FILE", dest="import_", help="make a store of a JSONL file")
    sub.add_argument("--export", type=pathlib.Path, metavar="DIR", help="write a store as a JSONL file")
    sub.add_argument("--codebook-size", type=int, help="of --import (default: of --config, or 1024)")
    sub.add_argument("--num-classes", type=int, help="of --import (default: of --config, or 1000)")
    sub = verb("evaluate", "Score samples, or images made elsewhere.", cli_texts.EVALUATE + cli_texts.OVERRIDES)
    weights_flags(sub, required=False)
    sub.add_argument("--config", help="with --workdir and without --inception: fd_classifier of this experiment")
    sub.add_argument("--workdir", type=pathlib.Path, help="work directory to score")
    sub.add_argument(
        "--inception", type=pathlib.Path, help="Inception's weights (pt_inception-2015-12-05-6726825d.pth)"
    )
    sub.add_argument(
        "--reference", type=pathlib.Path, help="statistics to compare with, ADM's .npz or --make-reference's"
    )
    sub.add_argument("--samples", type=int, default=50_000, help="images to draw (default 50000)")
    sub.add_argument("--images", help="score these instead: a folder, an .npz with arr_0, or a source (tfds:NAME)")
    sub.add_argument("--make-reference", help="write statistics of these images to --out FILE.npz")
    sub.add_argument("--out", type=pathlib.Path, help="folder for result.json (default: WORKDIR/evaluation)")
    sub.add_argument("--split", default="train", choices=("train", "heldout"), help="of a source (default train)")
    sub.add_argument("--steps", help="with --workdir: score these checkpoints (1000,2000 or all) and mark the best")
    sub.add_argument(
        "--reconstruction",
        action="store_true",
        help="score the tokenizer's reconstructions of --images (rFID, PSNR, SSIM)",
    )
    sub.add_argument("--samples-npz", action="store_true", help="also write the samples as ADM's evaluator reads them")
    sub.add_argument("--protocol", default="adm", help="adm (default) or pytorch_fid: how images are resized")
    sub.add_argument("--rounding", default="truncate", help="truncate (default) or round: of samples to uint8")
    sub.add_argument("--batch-size", type=int, default=64, help="images at a time over all devices (default 64)")
    sub.add_argument("--features", default="float32", help="float32 (default) or float64: what Inception computes in")
    sub.add_argument("--chunk", type=int, default=1000, help="images between two saves (default 1000)")
    sub.add_argument(
        "--shares", action="store_true", help="also time one batch: sampling, decoding, Inception, moments"
    )
    sub.add_argument("--no-neighbours", action="store_true", help="leave out precision, recall and KID")
    sampling_flags(sub)
    sub = verb("sample", "Sample images of given classes into PNG files.", cli_texts.SAMPLE)
    weights_flags(sub)
    sub.add_argument("--out", required=True, type=pathlib.Path, help="folder for the images")
    sub.add_argument("--classes", help="numbers, ranges or names: 3,7-9,sneaker (default: all)")
    sub.add_argument("--per-class", type=int, default=4, help="images a class (default 4)")
    sampling_flags(sub)
    sub.add_argument("--batch-size", type=int, help="images at a time (default: all, at most 64)")
    sub = verb("convert", "Convert weights: released files to a directory of ours, and back.", cli_texts.CONVERT)
    weights_flags(sub)
    sub.add_argument("--out", required=True, type=pathlib.Path, help="new directory, or FILE.safetensors, .bin, .pth")
    sub.add_argument("--part", choices=("generator", "tokenizer"), help="what to take out of a directory (generator)")
    sub = verb(
        "bench", "Time a part of an experiment against what this machine can do.", cli_texts.BENCH + cli_texts.OVERRIDES
    )
    sub.add_argument("what", choices=("sample", "train", "evaluate", "loader", "tokenize"))
    sub.add_argument("--config", required=True, help="experiment file, or its bare name (digits)")
    sub.add_argument("--batch-size", help="N[,N...]: images at a time over all devices (default: the experiment's)")
    sub.add_argument("--repeats", type=int, default=5, help="timed runs after one to warm up (default 5)")
    sub.add_argument("--dtype", help="float32 or bfloat16, of matmuls (default: what the verb computes in)")
    sub.add_argument("--decode", action="store_true", help="sample: to images; tokenize: decode instead of encoding")
    sub.add_argument("--whole", action="store_true", help="evaluate: sampling, decoding and Inception in one program")
    sub.add_argument("--records", type=int, default=1_000_000, help="loader: of the store it reads (default 1000000)")
    sub.add_argument("--json", action="store_true", help="JSON on stdout, the table on stderr")
    sub.add_argument("--profile", type=pathlib.Path, metavar="DIR", help="also write a profiler trace of one run")
    for name in LATER:
        verbs.add_parser(name, help="(not built yet)", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rar-jax`. Returns the exit code: 0 done, 1 failed, 2 wrong command or experiment."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.verb in LATER:
        print(f"rar-jax {args.verb}: not built yet", file=sys.stderr)
        return 2
    overrides = [word.removeprefix("--config.") for word in rest if word.startswith("--config.")]
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        parser.error(f"unknown argument {wrong[0]}; see rar-jax {args.verb} --help")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)

    # Imported here so that --help is instant.
    from rar_jax.config import ConfigError
    from rar_jax.data.token_store import StoreError
    from rar_jax.evaluation.reference import ReferenceFileError
    from rar_jax.interop.torch_zip import WeightsError
    from rar_jax.programs.train import TrainingError
    from rar_jax.training.checkpoint import CheckpointError

    try:
        _dispatch(args, overrides)
    except (ConfigError, StoreError, ReferenceFileError, WeightsError, TrainingError, CheckpointError) as error:
        print(f"rar-jax {args.verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:  # a full disk, a file where a folder should be, no permission
        print(f"rar-jax {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint, if there is one yet", file=sys.stderr)
        return 130
    return 0


def _dispatch(args: argparse.Namespace, overrides: list[str]) -> None:
    from rar_jax.config import ConfigError, load_experiment

    if args.verb in ("sample", "convert") and overrides:
        raise ConfigError(f"{args.verb} takes no --config.* arguments: the experiment is the work directory's")
    if args.verb == "convert":
        from rar_jax.programs.convert import convert

        keywords = {name: getattr(args, name) for name in ("tokenizer", "part", "download", "quiet")}
        convert(args.weights, args.out, **keywords)
        return
    if args.verb == "sample":
        from rar_jax.programs.sample import sample

        sample(
            args.weights,
            args.out,
            classes=args.classes,
            per_class=args.per_class,
            seed=args.seed,
            guidance=_guidance(args.guidance),
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            batch_size=args.batch_size,
            download=args.download,
            quiet=args.quiet,
        )
        return

    if args.verb == "bench":
        _bench(args, overrides)
        return

    elsewhere = ("source", "verify", "import_", "export", "weights", "out")
    if args.verb == "tokenize" and (not args.workdir or any(getattr(args, name) for name in elsewhere)):
        _tokenize(args, overrides)
        return

    if args.verb == "evaluate" and (args.inception or args.images or args.make_reference or args.steps):
        _evaluate(args, overrides)
        return

    from rar_jax.programs.experiment import resolve
    from rar_jax.training.workdir import Workdir

    if args.verb == "tokenize" and not args.config:
        raise ConfigError("tokenize --workdir needs --config: the experiment that the directory belongs to")
    if not args.config or not args.workdir:
        raise ConfigError("evaluate needs --inception (FID), or --config and --workdir (fd_classifier): see --help")

    experiment = resolve(load_experiment(args.config, overrides), pathlib.Path(args.config).stem)
    workdir = Workdir(args.workdir)
    if args.verb == "run":
        from rar_jax.programs.run import run

        run(experiment, workdir, quiet=args.quiet)
        return

    from rar_jax.parallel.mesh import make_mesh
    from rar_jax.programs.stages import check_weights

    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    if args.verb != "train":
        workdir.read_config()  # tokenize and evaluate need what another verb has made; they start nothing
    if args.verb == "train":
        check_weights(experiment, workdir)
    workdir.claim(experiment.resolved())
    if args.verb == "train":
        from rar_jax.programs.run import headline
        from rar_jax.programs.train import train

        if not args.quiet:
            print(headline(experiment, workdir, mesh))
        train(experiment, args.stage, workdir, mesh, quiet=args.quiet)
    elif args.verb == "tokenize":
        from rar_jax.programs.tokenize import tokenize

        for split in ("train", "heldout"):
            tokenize(experiment, workdir, mesh, split, quiet=args.quiet)
    else:
        import json

        from rar_jax.programs.fd_classifier import evaluate

        print(json.dumps(evaluate(experiment, workdir, mesh, quiet=args.quiet), indent=1))


def _tokenize(args: argparse.Namespace, overrides: list[str]) -> None:
    from rar_jax.config import ConfigError, load_experiment
    from rar_jax.data.token_writer import SHARD_RECORDS
    from rar_jax.programs.experiment import resolve

    if args.workdir or sum(x is not None for x in (args.verify, args.import_, args.export, args.source)) != 1:
        raise ConfigError("give one of --workdir (alone), --source, --verify, --import and --export: see --help")
    if args.verify:
        from rar_jax.programs.verify_tokens import verify_tokens

        print(verify_tokens(args.verify, weights=args.weights, out=args.out, download=args.download))
        return
    if args.out is None:
        raise ConfigError("give --out: where the store or file shall be written")
    experiment = None
    if args.config:
        experiment = resolve(load_experiment(args.config, overrides), pathlib.Path(args.config).stem)
    common = {"shard_records": SHARD_RECORDS if args.shard_records is None else args.shard_records, "quiet": args.quiet}
    if args.export:
        from rar_jax.programs.verify_tokens import export_tokens

        export_tokens(args.export, args.out, quiet=args.quiet)
    elif args.import_:
        from rar_jax.programs.verify_tokens import import_tokens

        sizes = {"codebook_size": args.codebook_size, "num_classes": args.num_classes}
        import_tokens(args.import_, args.out, experiment=experiment, **sizes, **common)
    else:
        from rar_jax.parallel.mesh import make_mesh
        from rar_jax.programs.tokenize import tokenize_source

        if experiment is None or not args.weights:
            raise ConfigError("tokenize --source needs --config (what the images are) and --weights (the tokenizer)")
        keywords = {name: getattr(args, name) for name in ("source", "weights", "out", "crops", "split", "batch_size")}
        tokenize_source(experiment, make_mesh(experiment.mesh), **keywords, download=args.download, **common)


def _bench(args: argparse.Namespace, overrides: list[str]) -> None:
    import json

    from rar_jax.config import ConfigError, load_experiment
    from rar_jax.programs.bench import bench, table
    from rar_jax.programs.bench_cases import Options
    from rar_jax.programs.experiment import resolve

    try:
        sizes = tuple(int(x) for x in args.batch_size.split(",")) if args.batch_size else ()
    except ValueError:
        raise ConfigError(f"--batch-size {args.batch_size}: give a number, or several as 1,8,64") from None
    keywords = {name: getattr(args, name) for name in ("what", "repeats", "dtype", "decode", "whole", "records")}
    options = Options(batch_sizes=sizes, **keywords)
    experiment = resolve(load_experiment(args.config, overrides), pathlib.Path(args.config).stem)
    report = bench(experiment, options, profile=args.profile, quiet=args.quiet)
    if not (args.json and args.quiet):
        print(table(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, indent=1))


def _guidance(text: str | None) -> Any:
    from rar_jax.config import ConfigError
    from rar_jax.guidance import Guidance

    try:
        return Guidance(*(float(x) for x in text.split(","))) if text else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--guidance {text}: give SCALE[,POWER[,TEMPERATURE]] ({error})") from None


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    from rar_jax.config import ConfigError, build, load_experiment
    from rar_jax.guidance import Guidance
    from rar_jax.programs.evaluate import reference_of, score_images, score_samples, summary
    from rar_jax.programs.evaluate_steps import score_steps, steps_table
    from rar_jax.programs.reconstruct import reconstruct
    from rar_jax.programs.scoring import Settings

    if not args.inception:
        raise ConfigError("give Inception's weights: --inception pt_inception-2015-12-05-6726825d.pth")
    weights = args.tokenizer or args.weights or (args.workdir and str(args.workdir))
    if args.reconstruction:
        if not weights or not args.images or args.make_reference:
            raise ConfigError("--reconstruction needs a tokenizer (--tokenizer FILE, or --workdir) and --images")
    elif sum(x is not None for x in (args.weights, args.workdir, args.images, args.make_reference)) != 1:
        raise ConfigError("give one of --weights, --workdir, --images and --make-reference")
    if args.make_reference and args.reference:
        raise ConfigError("--make-reference compares with nothing: leave --reference out")
    if wrong := [x for x in overrides if not (args.config and x.startswith("guidance."))]:
        raise ConfigError(f"--config.{wrong[0]}: with --inception only --config and --config.guidance.* are read")
    if args.steps and (args.samples_npz or args.shares):
        raise ConfigError("--samples-npz and --shares are of one checkpoint: leave --steps out")
    if args.steps and not args.workdir:
        raise ConfigError("--steps needs --workdir, whose checkpoints it means")
    out = args.out or (args.workdir and args.workdir / "evaluation")
    if out is None:
        raise ConfigError("give --out: where the result shall be written")
    settings = Settings(
        protocol=args.protocol, rounding=args.rounding, features=args.features, seed=args.seed,
        batch_size=args.batch_size, chunk=args.chunk, neighbours=not args.no_neighbours,
    )  # fmt: skip
    guidance = _guidance(args.guidance)
    if args.config and guidance is None:
        section: Any = load_experiment(args.config, overrides).guidance
        guidance = build(Guidance, section, where="config.guidance")
    common: dict[str, Any] = {"settings": settings, "quiet": args.quiet}
    compared = {"reference_path": args.reference, **common}
    drawn = {"samples": args.samples, "guidance": guidance, "dtype": args.dtype, **compared}
    if args.make_reference:
        result = reference_of(args.make_reference, args.inception, out, split=args.split, **common)
    elif args.reconstruction:
        result = reconstruct(
            weights, args.images, args.inception, out, split=args.split, download=args.download, **compared
        )
    elif args.images:
        result = score_images(args.images, args.inception, out, split=args.split, **compared)
    elif args.steps:
        print(steps_table(score_steps(args.workdir, args.inception, out, steps=args.steps, **drawn)))
        return
    else:
        result = score_samples(
            args.weights or str(args.workdir), args.inception, out, tokenizer=args.tokenizer, download=args.download,
            samples_npz=args.samples_npz, shares=args.shares, **drawn,
        )  # fmt: skip
    print(summary(result))
