"""The table of verbs: of each its arguments, its help and its function, which is not imported here."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

DESCRIPTION = """\
Train and sample autoregressive image generators in JAX.

  rar-jax run --config experiments/digits.py --workdir runs/digits     train, sample and score
  rar-jax sample --weights runs/digits --classes 3,7 --out pictures    images of the classes 3 and 7
  rar-jax sample --weights rar_b --download --classes "golden retriever" --out pictures    released weights
"""
OVERRIDES = """
Change any setting of the experiment:
  --config.train.steps=10 --config.mesh.fsdp=4 --config.generator.dropout=0.0
Durations are steps (1000), a share of the training ('50%') or epochs ('200ep').
An experiment file is code: only use files that you trust.
"""

SETTINGS = """
Change any setting of the generator's sampler; by default they are the published ones, or the experiment's:
  --sampling.scale=4 --sampling.temperature=1.02      --sampling.scale=None is no guidance
"""

Argument = tuple[str, dict[str, Any]]  # name and keywords of `add_argument`


def arg(name: str, help: str, **options: Any) -> Argument:
    """Declare an argument of a verb."""
    return name, {"help": help, **options}


def flag(name: str, help: str) -> Argument:
    """Declare an argument that is on or off."""
    return arg(name, help, action="store_true")


def location(text: str) -> pathlib.Path | str:
    """A folder, or a bucket URL as it is: a Path would drop one of its slashes."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a folder")
    return text if "://" in text else pathlib.Path(text)


class Verb(NamedTuple):
    """A verb. Its arguments are the keywords of its function, which gets --config as `experiment`."""

    function: str  # "module:function" of rar_jax
    summary: str
    arguments: Sequence[Argument]
    text: str = ""
    processes: bool = False  # runs as one or many processes
    sampling: bool = False  # takes --sampling.NAME=VALUE

    @property
    def has_config(self) -> bool:
        return "--config" in dict(self.arguments)


FILE = {"type": pathlib.Path}
CONFIG = arg("--config", "experiment file, or its bare name (digits)", required=True)
WORKDIR = arg("--workdir", "where to write and resume: a folder, gs:// or s3://", required=True, type=location)
WEIGHTS = "directory of run or convert, generator file, or released name (rar_b)"
DOWNLOAD = flag("--download", "download released files that are missing, and check them")
READING = (
    DOWNLOAD,
    arg("--fact", "what a file does not tell: image_size=256 (see models)", metavar="NAME=VALUE", action="append"),
    flag("--raw", "read the parameters as trained, not their moving average (EMA)"),
    arg("--model", "module that reads a file, if its keys do not tell: rar", metavar="NAME", action="append"),
)
TOKENIZER = (arg("--tokenizer", "the tokenizer's file, with a generator file"), *READING)
SPLIT = arg("--split", "of a source (default train)", default="train", choices=("train", "heldout"))
JSON = flag("--json", "print JSON")
SAMPLING = (
    arg("--seed", "same seed, same images (default 0)", type=int, default=0),
    arg("--dtype", "of the generator's matmuls: float32 (default) or bfloat16"),
    arg("--tensor", "devices that share one copy of the generator (default 1)", type=int, default=1),
)
PROCESSES = (
    arg("--coordinator-address", "address of process 0", metavar="HOST:PORT"),
    arg("--process-count", "number of processes; 1: do not look for a cluster", type=int, metavar="N"),
    arg("--process-index", "index of this process, 0..N-1", type=int, metavar="K"),
)
PROCESSES_HELP = """Run the same command on every host, on shared storage. TPU pods, GKE and Slurm are detected.
Otherwise give all three, or RAR_JAX_COORDINATOR_ADDRESS, RAR_JAX_PROCESS_COUNT and RAR_JAX_PROCESS_INDEX."""

VERBS = {
    "run": Verb(
        "programs.run:run_experiment",
        "Run all stages of an experiment, or resume it.",
        (CONFIG, WORKDIR),
        "Finished stages are skipped: rerun the same command to resume.",
        processes=True,
    ),
    "train": Verb(
        "programs.train:train_stage",
        "Train one stage of an experiment, or resume it.",
        (CONFIG, WORKDIR, arg("--stage", "tokenizer, classifier or generator (default)", default="generator")),
        "Train the tokenizer first, then tokenize, then train the generator. Its live distance needs the classifier.",
        processes=True,
    ),
    "tokenize": Verb(
        "programs.tokenize:make_tokens",
        "Turn images into token stores; check, import and export stores.",
        (
            arg("--config", "experiment file, or its bare name: what the images and the tokenizer are"),
            arg("--workdir", "tokenize the experiment's splits with its trained tokenizer", type=location),
            arg("--source", "tokenize these images: digits, idx:, tfds:, folder:, parquet:, ... (docs/data.md)"),
            arg("--weights", "the tokenizer: file, directory or released name"),
            arg("--out", "folder of the store; with --verify a PNG, with --export the file", **FILE),
            arg("--crops", "pad, center or ten (default: the source's own)"),
            SPLIT,
            arg("--shard-records", "records per shard; an interruption loses one shard (default 65536)", type=int),
            arg("--batch-size", "images at a time over all devices (default 256)", type=int, default=256),
            *READING,
            arg("--verify", "check a store; with --weights also draw it", metavar="DIR", **FILE),
            arg("--import", "make a store of a JSONL file", metavar="FILE", dest="import_", **FILE),
            arg("--export", "write a store as a JSONL file", metavar="DIR", **FILE),
            arg("--codebook-size", "of --import (default: of --config, or 1024)", type=int),
            arg("--num-classes", "of --import (default: of --config, or 1000)", type=int),
        ),
        """  rar-jax tokenize --config rar_b --source tfds:imagenet2012 --weights TOKENIZER.bin --out tokens
  rar-jax tokenize --verify tokens --weights TOKENIZER.bin         checksums, counts, and a picture of a sample
  rar-jax tokenize --import maskgitvq.jsonl --out tokens           the authors' file; --export does the reverse
Rerun the same command after an interruption. Train on a store with --config.data.tokens=DIR.""",
        processes=True,
    ),
    "sample": Verb(
        "programs.sample:sample_classes",
        "Sample images of given classes into PNG files.",
        (
            arg("--weights", WEIGHTS, required=True),
            *TOKENIZER,
            arg("--out", "folder for the images", required=True, **FILE),
            arg("--classes", "numbers, ranges or names: 3,7-9,sneaker (default: all)"),
            arg("--per-class", "images per class (default 4)", type=int, default=4),
            arg("--complete", "draw a part of this image", metavar="IMAGE", **FILE),
            arg("--mask", "with --complete: an image of the same size, white where to draw", metavar="IMAGE", **FILE),
            flag(
                "--keep-pixels", "with --complete: keep the other pixels as they are, not as the tokenizer decodes them"
            ),
            *SAMPLING,
            arg("--batch-size", "images at a time (default: all, at most 64)", type=int),
        ),
        processes=True,
        sampling=True,
    ),
    "evaluate": Verb(
        "programs.evaluate:print_scores",
        "Score samples, or images made elsewhere.",
        (
            arg("--weights", WEIGHTS),
            *TOKENIZER,
            arg("--config", "with --workdir, without --inception: fd_classifier of this experiment"),
            arg("--workdir", "work directory to score", type=location),
            arg("--inception", "Inception's weights (pt_inception-2015-12-05-6726825d.pth)", **FILE),
            arg("--reference", "statistics to compare with: ADM's .npz or --make-reference's", **FILE),
            arg("--samples", "images to draw (default 50000)", type=int, default=50_000),
            arg("--images", "score these images: a folder, an .npz with arr_0, or a source (folder:PATH)"),
            arg("--make-reference", "write statistics of these images to --out FILE.npz"),
            arg("--out", "folder for result.json (default: WORKDIR/evaluation)", **FILE),
            SPLIT,
            arg("--image-size", "of a source: crop images to this size, as ADM does", type=int),
            arg("--steps", "with --workdir: score these checkpoints (1000,2000 or all) and mark the best"),
            flag("--reconstruction", "score the tokenizer's reconstructions of --images (rFID, PSNR, SSIM)"),
            flag("--samples-npz", "also write the samples for ADM's evaluator"),
            arg("--protocol", "how images are resized: adm (default) or pytorch_fid", default="adm"),
            arg("--rounding", "of samples to uint8: truncate (default) or round", default="truncate"),
            arg("--batch-size", "images at a time over all devices (default 64)", type=int, default=64),
            arg("--features", "Inception's dtype: float32 (default) or float64", default="float32"),
            arg("--chunk", "images between two saves (default 1000)", type=int, default=1000),
            arg("--no-neighbours", "skip precision, recall and KID", dest="neighbours", action="store_false"),
            *SAMPLING,
        ),
        """  rar-jax evaluate --weights rar_b --inception INCEPTION.pth --reference imagenet256.npz --out scores
  rar-jax evaluate --images FOLDER --inception INCEPTION.pth --reference mine.npz --out scores
  rar-jax evaluate --make-reference folder:PATH --image-size 256 --inception INCEPTION.pth --out mine.npz
  rar-jax evaluate --workdir runs/mine --steps all --inception INCEPTION.pth --reference mine.npz --samples 5000
  rar-jax evaluate --reconstruction --tokenizer TOKENIZER.bin --images FOLDER --inception INCEPTION.pth --out scores
  rar-jax evaluate --config digits --workdir runs/digits      fd_classifier: Frechet distance on classifier features
FID, sFID, Inception Score, precision, recall and KID as the ADM suite defines them. Rerun to resume.""",
        processes=True,
        sampling=True,
    ),
    "convert": Verb(
        "programs.convert:convert_weights",
        "Convert weights: released files to a directory, and back.",
        (
            arg("--weights", WEIGHTS, required=True),
            *TOKENIZER,
            arg("--out", "new directory, or FILE.safetensors", required=True, **FILE),
            arg("--part", "model to take out of a directory (default generator)", choices=("generator", "tokenizer")),
        ),
        """  rar-jax convert --weights rar_b.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --out rar_b
  rar-jax convert --weights runs/imagenet --out mine.safetensors          a file with the released names
Records the sha256 of what was read and written.""",
    ),
    "models": Verb(
        "programs.models:print_models",
        "List systems with their released files, sizes, published scores and licences.",
        (flag("--markdown", "print the table of the README"),),
    ),
    "bench": Verb(
        "tools.verbs:print_bench",
        "Time a part of an experiment against what this machine can do.",
        (
            arg("what", "what to time", choices=("sample", "train", "evaluate", "loader", "tokenize")),
            CONFIG,
            arg("--batch-size", "N[,N...]: images at a time over all devices (default: the experiment's)"),
            arg("--repeats", "timed runs after a warm-up (default 5)", type=int, default=5),
            arg("--dtype", "of matmuls: float32 or bfloat16 (default: what the verb computes in)"),
            flag("--decode", "sample: to images; tokenize: decode instead of encoding"),
            flag("--whole", "evaluate: sampling, decoding and Inception in one program"),
            arg("--records", "loader: of the store it reads (default 1000000)", type=int, default=1_000_000),
            flag("--json", "JSON on stdout, the table on stderr"),
            arg("--profile", "also write a profiler trace of one run", metavar="DIR", **FILE),
        ),
        "Weights are random; no files are needed. The ceilings (a large matmul, memory) are measured in the same run.",
    ),
    "plan": Verb(
        "tools.verbs:print_plan",
        "Plan an experiment for accelerators that are not here.",
        (
            CONFIG,
            arg("--topology", "v5e:4x4, v6e:8x8, v5p:4x4x4", required=True),
            arg("--slices", "number of slices, joined by the data centre's network", type=int, default=1),
            arg("--only", "compile only this step", choices=("train", "tokenize", "sample")),
            arg("--sample-rows", "images per chip when sampling (default 16)", type=int, default=16),
            flag("--as-is", "do not search for a configuration that fits"),
            flag("--search", "compile the training step on every suitable mesh; rank them"),
            JSON,
        ),
        """Compiles for TPUs on a machine without one (pip install -e '.[tpu]'; takes minutes).
Reports memory, communication, and estimated time and chip-hours.""",
    ),
    "inspect": Verb(
        "tools.verbs:print_inspect",
        "Summarize a work directory, token store or image source, and its problems.",
        (
            arg("what", "work directory, token store, source, or folder of images", metavar="WHAT"),
            arg("--split", "of a source (default train)", choices=("train", "heldout")),
            arg("--image-size", "count the images that are smaller (default 256)", type=int),
            arg("--limit", "look at this many images, spread evenly (default: all)", type=int),
            arg("--problems", "how many to list (default 20)", type=int),
            arg("--out", "picture of some images of each class (default inspect.png)", **FILE),
            JSON,
        ),
        "The exit code is 1 if there are problems. All images of a source are decoded, unless --limit is given.",
    ),
    "report": Verb(
        "tools.verbs:print_report",
        "Write a work directory as one HTML file.",
        (
            arg("workdirs", "work directory; two are compared side by side", metavar="WORKDIR", nargs="+"),
            arg("--out", "the file (default: report.html in the first work directory)", **FILE),
        ),
        "Curves, samples over time, reconstructions, scores, config and ledger. The page needs no network.",
    ),
    "doctor": Verb(
        "tools.verbs:print_doctor",
        "Check versions, devices, memory and disk. The exit code is 1 if there is a problem.",
        (arg("--workdir", "where to try making, renaming and locking files (default: here)", type=location), JSON),
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all verbs."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="rar-jax", description=DESCRIPTION, formatter_class=formatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        text = f"{verb.summary}\n\n{verb.text}\n{OVERRIDES * verb.has_config}{SETTINGS * verb.sampling}"
        sub = verbs.add_parser(name, help=verb.summary, description=text, formatter_class=formatter)
        sub.add_argument("--quiet", action="store_true", help="print only results and errors")
        sub.add_argument("--progress", action="store_true", help="print progress every 10 s even without a terminal")
        for flag_name, options in verb.arguments:
            sub.add_argument(flag_name, **options)
        if verb.processes:
            group = sub.add_argument_group("several processes", PROCESSES_HELP)
            for flag_name, options in PROCESSES:
                group.add_argument(flag_name, **options)
    return parser
