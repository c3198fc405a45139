"""The verbs of `rar-jax` and their flags, and what --help says. What they do is cli.py's."""

from __future__ import annotations

import argparse
import pathlib

DESCRIPTION = """\
Train and sample autoregressive image generators in JAX.

  rar-jax run --config experiments/digits.py --workdir runs/digits     the whole job, pixels to distance
  rar-jax sample --weights runs/digits --classes 3,7 --out pictures    images of the classes 3 and 7
  rar-jax sample --weights rar_b --download --classes "golden retriever" --out pictures    from the released weights
"""

# Verbs that run as one or many processes.
MANY = ("run", "train", "tokenize", "evaluate", "sample")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line: `verb`, and the flags of each."""
    formatter = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="rar-jax", description=DESCRIPTION, formatter_class=formatter)
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, short: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=short, description=f"{short}\n\n{text}", formatter_class=formatter)
        sub.add_argument("--quiet", action="store_true", help="no progress and no summary, only results and errors")
        sub.add_argument("--progress", action="store_true", help="a line every 10 s where stderr is no terminal, too")
        return sub

    def experiment_verb(name: str, short: str, text: str) -> argparse.ArgumentParser:
        sub = verb(name, short, text + _OVERRIDES)
        sub.add_argument("--config", required=True, help="experiment file, or its bare name (digits)")
        sub.add_argument(
            "--workdir",
            required=True,
            type=place,
            help="where everything is written and resumed: a folder, gs:// or s3://",
        )
        return sub

    experiment_verb("run", "Do the whole job of an experiment, or resume it.", _RUN)
    sub = experiment_verb("train", "Train one stage of an experiment, or resume it.", _TRAIN)
    sub.add_argument("--stage", default="generator", choices=("tokenizer", "classifier", "generator"))
    _tokenize_flags(
        verb("tokenize", "Turn images into token stores; check, import and export those.", _TOKENIZE + _OVERRIDES)
    )
    _evaluate_flags(verb("evaluate", "Score samples, or images made elsewhere.", _EVALUATE + _OVERRIDES))
    _sample_flags(verb("sample", "Sample images of given classes into PNG files.", _SAMPLE))
    _convert_flags(verb("convert", "Convert weights: released files to a directory of ours, and back.", _CONVERT))
    _inspect_flags(
        verb("inspect", "Say what a work directory, token store or source holds, and what is wrong.", _INSPECT)
    )
    _bench_flags(verb("bench", "Time a part of an experiment against what this machine can do.", _BENCH + _OVERRIDES))
    _plan_flags(verb("plan", "Rehearse an experiment on chips that are not here.", _PLAN + _OVERRIDES))
    _report_flags(verb("report", "Write all that a work directory holds as one HTML file.", _REPORT))
    _doctor_flags(verb("doctor", "Say whether this machine can do the work.", _DOCTOR))
    for name in MANY:
        _process_flags(verbs.choices[name])
    return whole


def place(text: str) -> pathlib.Path | str:
    """A folder, or a URL as it is: a Path would lose one of its slashes. Nothing is not the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a folder")
    return text if "://" in text else pathlib.Path(text)


def _tokenize_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", help="experiment file, or its bare name: says what the images and the tokenizer are")
    sub.add_argument("--workdir", type=place, help="tokenize the experiment's splits with its trained tokenizer")
    sub.add_argument(
        "--source",
        help="instead: tokenize these images (digits, idx:, tfds:, folder:, parquet:, webdataset: or array_record:, see docs/data.md)",
    )
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


def _evaluate_flags(sub: argparse.ArgumentParser) -> None:
    _weights_flags(sub, required=False)
    sub.add_argument("--config", help="with --workdir and without --inception: fd_classifier of this experiment")
    sub.add_argument("--workdir", type=place, help="work directory to score")
    sub.add_argument(
        "--inception", type=pathlib.Path, help="Inception's weights (pt_inception-2015-12-05-6726825d.pth)"
    )
    sub.add_argument(
        "--reference", type=pathlib.Path, help="statistics to compare with, ADM's .npz or --make-reference's"
    )
    sub.add_argument("--samples", type=int, default=50_000, help="images to draw (default 50000)")
    sub.add_argument("--images", help="score these instead: a folder, an .npz with arr_0, or a source (folder:PATH)")
    sub.add_argument("--make-reference", help="write statistics of these images to --out FILE.npz")
    sub.add_argument("--out", type=pathlib.Path, help="folder for result.json (default: WORKDIR/evaluation)")
    sub.add_argument("--split", default="train", choices=("train", "heldout"), help="of a source (default train)")
    sub.add_argument("--image-size", type=int, help="of a source with images of many sizes: ADM's centre crop to it")
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
    sub.add_argument("--no-neighbours", action="store_true", help="leave out precision, recall and KID")
    _sampling_flags(sub)


def _sample_flags(sub: argparse.ArgumentParser) -> None:
    _weights_flags(sub)
    sub.add_argument("--out", required=True, type=pathlib.Path, help="folder for the images")
    sub.add_argument("--classes", help="numbers, ranges or names: 3,7-9,sneaker (default: all)")
    sub.add_argument("--per-class", type=int, default=4, help="images a class (default 4)")
    _sampling_flags(sub)
    sub.add_argument("--batch-size", type=int, help="images at a time (default: all, at most 64)")


def _convert_flags(sub: argparse.ArgumentParser) -> None:
    _weights_flags(sub)
    sub.add_argument("--out", required=True, type=pathlib.Path, help="new directory, or FILE.safetensors")
    sub.add_argument("--part", choices=("generator", "tokenizer"), help="what to take out of a directory (generator)")


def _inspect_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "what", metavar="WHAT", help="work directory, folder of a token store, source, or folder with a folder a class"
    )
    sub.add_argument("--split", choices=("train", "heldout"), help="of a source (default train)")
    sub.add_argument("--image-size", type=int, help="count the images that are smaller (default 256)")
    sub.add_argument("--limit", type=int, help="look into so many images, spread evenly (default: all)")
    sub.add_argument("--problems", type=int, help="how many to list (default 20)")
    sub.add_argument("--out", type=pathlib.Path, help="the picture of some images of each class (default inspect.png)")
    sub.add_argument("--json", action="store_true", help="the same as JSON, of all classes")


def _bench_flags(sub: argparse.ArgumentParser) -> None:
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


def _plan_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help="experiment file, or its bare name (rar_xxl)")
    sub.add_argument("--topology", required=True, help="v5e:4x4, v6e:8x8, v5p:4x4x4")
    sub.add_argument("--slices", type=int, default=1, help="so many of them, joined by the data centre's network")
    sub.add_argument("--only", choices=("train", "tokenize", "sample"), help="compile only this step")
    sub.add_argument("--sample-rows", type=int, default=16, help="images a chip when sampling (default 16)")
    sub.add_argument("--as-is", action="store_true", help="where it does not fit, look for nothing that would")
    sub.add_argument(
        "--search", action="store_true", help="compile the training step on every mesh that could suit; rank"
    )
    sub.add_argument("--json", action="store_true", help="the same as JSON")


def _report_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("workdirs", metavar="WORKDIR", nargs="+", help="work directory; two are put side by side")
    sub.add_argument("--out", type=pathlib.Path, help="the file (default: report.html in the first work directory)")


def _doctor_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", type=place, help="where to try making, renaming and locking files (default: here)")
    sub.add_argument("--json", action="store_true", help="the same as JSON")


def _process_flags(sub: argparse.ArgumentParser) -> None:
    many = sub.add_argument_group("several processes", _PROCESSES)
    many.add_argument("--coordinator-address", metavar="HOST:PORT", help="where process 0 is reached")
    many.add_argument("--process-count", type=int, metavar="N", help="how many; 1: alone, and look for no cluster")
    many.add_argument("--process-index", type=int, metavar="K", help="which of them this is, 0..N-1")


def _weights_flags(sub: argparse.ArgumentParser, required: bool = True) -> None:
    sub.add_argument(
        "--weights",
        required=required,
        help="directory of a run or of convert, generator file, or a released name (rar_b)",
    )
    sub.add_argument("--tokenizer", help="the tokenizer's file, with a generator file")
    sub.add_argument("--download", action="store_true", help="fetch released files that are not here, and check them")


def _sampling_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seed", type=int, default=0, help="same seed, same images (default 0)")
    sub.add_argument(
        "--guidance", help="SCALE[,POWER[,TEMPERATURE]] (default: the experiment's, or the released model's)"
    )
    sub.add_argument("--dtype", help="float32 (default) or bfloat16: what the generator multiplies in")
    sub.add_argument("--tensor", type=int, default=1, help="devices that share one copy of the generator (default 1)")


_OVERRIDES = """
Any number of the experiment can be changed:
  --config.train.steps=10 --config.mesh.fsdp=4 --config.generator.dropout=0.0
Durations are steps (1000), a share of the training ('50%') or epochs ('200ep').
An experiment file is code: use only those that you trust.
"""
_PROCESSES = """The same command on every host, on storage that all share. TPU pods, GKE and Slurm are found without flags; by hand give
all three, or RAR_JAX_COORDINATOR_ADDRESS, RAR_JAX_PROCESS_COUNT and RAR_JAX_PROCESS_INDEX."""
_RUN = """\
Trains the tokenizer and the classifier, tokenizes, trains the generator, samples and scores it, and draws pictures. A
stage whose output exists and verifies is skipped: the same command again resumes after a crash, or does nothing.
"""
_TRAIN = """\
The stages lean on one another: tokenizer, then (tokenize), then generator; the generator's live distance also needs the
classifier.
"""
_TOKENIZE = """\
  rar-jax tokenize --config digits --workdir runs/digits           tokens/train and tokens/heldout there
  rar-jax tokenize --config rar_b --source tfds:imagenet2012 --weights TOKENIZER.bin --out tokens
  rar-jax tokenize --verify tokens --weights TOKENIZER.bin         checksums, counts, and a picture of a sample
  rar-jax tokenize --import maskgitvq.jsonl --out tokens           the authors' file, and back: --export tokens --out FILE
The same command goes on where a killed one was. Train on a store with --config.data.tokens=DIR.
"""
_EVALUATE = """\
  rar-jax evaluate --weights rar_b --inception INCEPTION.pth --reference VIRTUAL_imagenet256_labeled.npz --out scores
  rar-jax evaluate --workdir runs/mine --inception INCEPTION.pth --reference mine.npz
  rar-jax evaluate --images FOLDER --inception INCEPTION.pth --reference mine.npz --out scores
  rar-jax evaluate --make-reference FOLDER --inception INCEPTION.pth --out mine.npz
  rar-jax evaluate --make-reference folder:PATH --image-size 256 --inception INCEPTION.pth --out mine.npz     cropped
  rar-jax evaluate --workdir runs/mine --steps all --inception INCEPTION.pth --reference mine.npz --samples 5000
  rar-jax evaluate --reconstruction --tokenizer TOKENIZER.bin --images FOLDER --inception INCEPTION.pth --out scores
FID, sFID, Inception Score, precision, recall and KID as the ADM suite defines them. The same command resumes.

  rar-jax evaluate --config digits --workdir runs/digits
Without Inception's weights: the Frechet distance on classifier features (fd_classifier, not FID) of samples, held-out images
and an untrained generator.
"""
_SAMPLE = """\
  rar-jax sample --weights runs/digits --classes 3,7 --per-class 8 --out pictures
  rar-jax sample --weights rar_b.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --classes 207 --out pictures
  rar-jax sample --weights rar_b --download --classes "golden retriever,tench" --out pictures
"""
_INSPECT = """\
  rar-jax inspect runs/digits                    goodput, last losses, checkpoints and their verification, what to do next
  rar-jax inspect tokens/train
  rar-jax inspect folder:imagenet --limit 10000
  rar-jax inspect tfds:imagenet2012 --split heldout --out validation.png
The exit code is 1 if there are problems. A source is read and decoded whole, where --limit does not say otherwise.
"""
_PLAN = """\
  rar-jax plan --config rar_xxl --topology v5p:4x4x4
  rar-jax plan --config rar_b --topology v5e:16x16 --slices 4 --only train
  rar-jax plan --config rar_xxl --topology v5e:4x4 --search           a table of meshes, the fastest first
The steps of training, of tokenizing, and of sampling with FID are compiled by TPU's own compiler, on a machine without a TPU (pip
install -e '.[tpu]'; minutes): memory, communication, and an estimate of time and chip-hours.
"""
_REPORT = """\
  rar-jax report runs/digits                    runs/digits/report.html
  rar-jax report runs/a runs/b --out ab.html    both in one page
Curves, samples over time, reconstructions, scores with all that they depend on, config, environment and ledger, of a run in
any state. The page needs no network and no other file.
"""
_DOCTOR = """\
  rar-jax doctor
  rar-jax doctor --workdir /shared/runs/rar_b
Versions, devices, memory, disk, an accelerator that jax does not see, and versions that are known to be bad with what to do
about each. The exit code is 1 if something is bad.
"""
_CONVERT = """\
  rar-jax convert --weights rar_b.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --out rar_b     for --weights rar_b
  rar-jax convert --weights rar_b.bin --out rar_b.safetensors
  rar-jax convert --weights runs/imagenet --out mine.safetensors          a file with the released names
Records the sha256 of what was read and written.
"""
_BENCH = """\
  rar-jax bench sample --config rar_b --batch-size 1,8 --repeats 3      labels to tokens; with --decode to images
  rar-jax bench train --config rar_b --batch-size 8 --dtype float32     the training step
  rar-jax bench evaluate --config rar_b --batch-size 16                 Inception; with --whole sampling and decoding too
  rar-jax bench tokenize --config rar_b --batch-size 8                  images to tokens; with --decode tokens to images
  rar-jax bench loader --config rar_b                                   records/s from a store made for it
Weights are random and no files are needed. The ceilings (a large matmul, memory) are measured in the same run, before and
after, and the better counts. The share is the time that arithmetic or memory traffic must take at those rates, whichever is
longer, over the time measured.
"""
