"""The flags of `rar-jax evaluate` with Inception, read and checked: what cli.py hands on to programs/."""

from __future__ import annotations

import argparse
from typing import Any


def parse_guidance(text: str | None) -> Any:
    """Guidance of "SCALE[,POWER[,TEMPERATURE]]", None of nothing. Raises: ConfigError for what is neither."""
    from rar_jax.errors import ConfigError
    from rar_jax.sampling import Guidance

    try:
        return Guidance(*(float(x) for x in text.split(","))) if text else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--guidance {text}: give SCALE[,POWER[,TEMPERATURE]] ({error})") from None


def evaluate(args: argparse.Namespace, overrides: list[str]) -> str:
    """Scores what the flags name; what is to be said of it."""
    from rar_jax.config import build, load_experiment
    from rar_jax.errors import ConfigError
    from rar_jax.evaluation.image_sets import open_image_set
    from rar_jax.evaluation.program import Settings, open_program
    from rar_jax.evaluation.reconstructions import score_reconstructions
    from rar_jax.evaluation.results import format_scores, format_steps
    from rar_jax.evaluation.scores import make_reference, score_images, score_samples
    from rar_jax.evaluation.steps import score_steps
    from rar_jax.runs.workdir import Workdir
    from rar_jax.sampling import Guidance

    if not args.inception:
        from rar_jax.weights.inception import WHERE

        raise ConfigError(f"give Inception's weights with --inception FILE: {WHERE}")
    workdir = Workdir(args.workdir).fetch() if args.workdir else None
    directory: Any = workdir and str(workdir.path)
    weights = args.tokenizer or args.weights or directory
    if args.reconstruction:
        if not weights or not args.images or args.make_reference:
            raise ConfigError("--reconstruction needs a tokenizer (--tokenizer FILE, or --workdir) and --images")
    elif sum(x is not None for x in (args.weights, args.workdir, args.images, args.make_reference)) != 1:
        raise ConfigError("give one of --weights, --workdir, --images and --make-reference")
    if args.make_reference and args.reference:
        raise ConfigError("--make-reference compares with nothing: leave --reference out")
    if wrong := [x for x in overrides if not (args.config and x.startswith("guidance."))]:
        raise ConfigError(f"--config.{wrong[0]}: with --inception only --config and --config.guidance.* are read")
    if args.steps and args.samples_npz:
        raise ConfigError("--samples-npz is of one checkpoint: leave --steps out")
    if args.steps and not args.workdir:
        raise ConfigError("--steps needs --workdir, whose checkpoints it means")
    if args.image_size is not None and not (args.images or args.make_reference):
        raise ConfigError("--image-size is of a source in --images or --make-reference")
    out = args.out or (workdir and workdir.path / "evaluation")
    if out is None:
        raise ConfigError("give --out: where the result shall be written")
    settings = Settings(
        protocol=args.protocol, rounding=args.rounding, features=args.features, seed=args.seed,
        batch_size=args.batch_size, chunk=args.chunk, neighbours=not args.no_neighbours,
    )  # fmt: skip
    guidance = parse_guidance(args.guidance)
    if args.config and guidance is None:
        section: Any = load_experiment(args.config, overrides).guidance
        guidance = build(Guidance, section, where="config.guidance")
    quiet, images = args.quiet, None
    if args.images or args.make_reference:
        images = open_image_set(args.images or args.make_reference, args.split, image_size=args.image_size)
    if args.make_reference and out.suffix != ".npz":
        raise ConfigError(f"--out {out}: a reference is a .npz file")
    if images is None and args.samples < 2:
        raise ConfigError(f"--samples {args.samples}: a distance needs at least 2 (published ones take 50000)")
    program = open_program(args.inception, settings, reference_path=args.reference, tensor=args.tensor)
    drawn = {"samples": args.samples, "guidance": guidance, "dtype": args.dtype, "quiet": quiet}
    if args.make_reference:
        assert images is not None
        told = format_scores(make_reference(program, images, out, quiet=quiet))
    elif args.reconstruction:
        assert images is not None
        told = format_scores(score_reconstructions(program, weights, images, out, download=args.download, quiet=quiet))
    elif images is not None:
        told = format_scores(score_images(program, images, out, quiet=quiet))
    elif args.steps:
        assert workdir is not None
        told = format_steps(score_steps(program, workdir.path, out, steps=args.steps, **drawn))
    else:
        assert args.weights or directory
        result = score_samples(
            program, args.weights or directory, out, tokenizer=args.tokenizer, download=args.download,
            samples_npz=args.samples_npz, **drawn,
        )  # fmt: skip
        told = format_scores(result)
    if workdir is not None:
        workdir.send()
    return told
