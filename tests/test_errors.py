"""What goes wrong for people, met as they meet it. docs/errors.md is generated from this file and compared with it."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cheap_inception
import errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import Case, Missing, Page, Place, in_a_process, no_room
from hub import CONTENT, served
from PIL import Image

from rar_jax import cli
from rar_jax.errors import ConfigError, DeviceMemoryError
from rar_jax.evaluation import program as scoring
from rar_jax.evaluation.reference import write_reference
from rar_jax.parallel import memory
from rar_jax.runs import checkpoint
from rar_jax.runs.lock import Lease
from rar_jax.tokenizers import maskgit_vq
from rar_jax.tokens.writer import TokenStoreWriter
from rar_jax.training import loop as train
from rar_jax.training import objective
from rar_jax.weights import maskgit_vq as interop_vq

ROOT = pathlib.Path(__file__).parents[1]
LOAD = "rar_jax.load('rar.bin', tokenizer='vq.safetensors')"
SAMPLE = "sample --weights rar.bin --tokenizer vq.safetensors --out pictures"
RUN = "run --config tiny.py --workdir runs/a"
CASES: list[Case] = []


def case(group: str, title: str) -> Callable[[Callable[[Place], None]], None]:
    return lambda meet: CASES.append(Case(group, title, meet))


def commands(group: str, *rows: tuple[str, str, int]) -> None:
    """Cases that a command alone meets."""
    CASES.extend(
        Case(group, title, lambda at, text=text, code=code: at.command(text, code)) for title, text, code in rows
    )


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with errors.page() as opened:
        yield opened


@pytest.fixture
def at(
    tmp_path: pathlib.Path, released_pair: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    for name, path in (
        ("rar.bin", released_pair.generator),
        ("vq.safetensors", released_pair.tokenizer),
        ("tiny.py", ROOT / "tests" / "experiments" / "tiny.py"),
    ):
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- commands and experiments

commands(
    "Commands and experiments",
    ("A path of weights that is not there", "sample --weights runs/mine --out pictures", 2),
    ("An experiment that is not there", "run --config digist --workdir runs/a", 2),
    ("A misspelt key", f"{RUN} --config.train.stesp=5", 2),
    ("A misspelt section", f"{RUN} --config.trian.steps=5", 2),
    ("A wrong type", f"{RUN} --config.train.batch_size=many", 2),
    ("A duration that is none", f"{RUN} --config.train.steps=soon", 2),
    ("A width that the heads do not divide", f"{RUN} --config.generator.num_heads=5", 2),
    ("Another number of classes than the images have", f"{RUN} --config.generator.num_classes=12", 2),
    ("A class that is not there", f"{SAMPLE} --classes goldfish", 2),
    ("A class number beyond the last", f"{SAMPLE} --classes 10", 2),
)


@case("Commands and experiments", "A label beyond the last class, in Python")
def label_out_of_range(at: Place) -> None:
    at.python(f"{LOAD}.sample([3, 10])", ConfigError)


# ---------------------------------------------------------------- weights

commands(
    "Weights",
    ("A generator file without its tokenizer", "sample --weights rar.bin --out pictures", 2),
    ("A generator where a tokenizer should be", "sample --weights rar.bin --tokenizer rar.bin --out pictures", 1),
    (
        "A tokenizer where a generator should be",
        "sample --weights vq.safetensors --tokenizer vq.safetensors --out pictures",
        1,
    ),
)


@case("Weights", "A tokenizer that does not fit")
def wrong_tokenizer(at: Place) -> None:
    config = maskgit_vq.Config(
        image_size=16, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8, codebook_size=64
    )
    interop_vq.save("other.safetensors", config, maskgit_vq.init(config, jax.random.key(0)))
    at.how = "whose codebook has 64 codes"
    at.command(SAMPLE.replace("vq.safetensors", "other.safetensors"), 2)


@case("Weights", "A file that is cut off")
def truncated(at: Place) -> None:
    at.path.joinpath("half.bin").write_bytes(pathlib.Path("rar.bin").read_bytes()[:50_000])
    at.how = "the first 50,000 bytes of a file of weights"
    at.command(SAMPLE.replace("rar.bin", "half.bin"), 1)


@case("Weights", "A released file that was not downloaded")
def not_downloaded(at: Place) -> None:
    with served(at.patch, at.path / "cache"):
        at.command("sample --weights rar_b --out pictures", 2)


@case("Weights", "huggingface_hub is not installed")
def without_the_hub(at: Place) -> None:
    at.patch.setitem(sys.modules, "huggingface_hub", None)
    at.command("sample --weights rar_b --download --out pictures", 2)


@case("Weights", "A download that is interrupted")
def interrupted(at: Place) -> None:
    at.patch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's own attempts
    with served(at.patch, at.path / "cache") as hub:
        hub.sends = 1000
        at.how = "the hub closes the connection after 1,000 bytes"
        at.command("sample --weights rar_b --download --out pictures", 1, progress=True)


@case("Weights", "A download of other content than the hub says")
def wrong_sha256(at: Place) -> None:
    with served(at.patch, at.path / "cache") as hub:
        hub.content = CONTENT[:-1] + b"X"
        at.how = "one byte is another"
        at.command("sample --weights rar_b --download --out pictures", 1, progress=True)


# ---------------------------------------------------------------- devices and memory


@case("Devices and memory", "No accelerator where one was asked for")
def no_accelerator(at: Place) -> None:
    at.how = "with the environment variable JAX_PLATFORMS=cuda"
    at.command(SAMPLE, 2, run=in_a_process("", JAX_PLATFORMS="cuda"))


commands(
    "Devices and memory",
    ("A batch that the devices do not divide", f"{RUN} --config.train.batch_size=30", 2),
    ("A mesh that is not that of the devices", f"{RUN} --config.mesh.data=3", 2),
)


@case("Devices and memory", "A batch of samples that memory will not hold")
def predicted(at: Place) -> None:
    at.patch.setattr(memory, "needed", lambda program: 3 * 2**30)
    at.patch.setattr(memory, "free", lambda device: 2**30)
    at.how = "which would take 3 GiB, where 1 is free; known before anything is drawn"
    at.command(f"{SAMPLE} --per-class 8 -q", 2)


def exhausted(*_: Any, **__: Any) -> Any:
    """XLA's own error."""
    return jnp.zeros(2**50, jnp.uint8).block_until_ready()


@case("Devices and memory", "Memory is exhausted while sampling")
def exhausted_while_sampling(at: Place) -> None:
    at.patch.setattr("rar_jax.pipeline.Pipeline._program", lambda *_: exhausted)
    at.how = "where the program asks for 2^50 bytes"
    at.python(f"{LOAD}.sample([3] * 128, batch_size=128)", DeviceMemoryError)


@case("Devices and memory", "Memory is exhausted while training")
def exhausted_while_training(at: Place) -> None:
    made = train.compile_training
    at.patch.setattr(train, "compile_training", lambda *args: made(*args)._replace(init=exhausted))
    at.patch.setattr(objective, "open_tokens", lambda experiment, *_: objective.open_source(experiment, "train"))
    at.patch.setattr(objective, "finished", lambda *_: None)
    at.how = "where the state takes 2^50 bytes"
    at.command("train --config tiny.py --workdir runs/a", 1)


@case("Devices and memory", "Memory is exhausted while scoring")
def exhausted_while_scoring(at: Place) -> None:
    at.patch.setattr("rar_jax.evaluation.program.load_inception", lambda *_: scoring.Network({}, "0" * 64))
    at.patch.setattr(scoring.Program, "_params", exhausted)
    np.savez("theirs.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    at.how = "where the program asks for 2^50 bytes"
    at.command("evaluate --images theirs.npz --inception inception.pth --out scores -q", 1)


# ---------------------------------------------------------------- images and tokens

commands(
    "Images and tokens",
    ("A folder of images that is not there", f"{RUN} --config.data.source=folder:pictures", 2),
    ("A kind of source that there is not", f"{RUN} --config.data.source=folders:pictures", 2),
)


@case("Images and tokens", "A folder without images")
def empty_folder(at: Place) -> None:
    (at.path / "pictures").mkdir()
    at.command("run --config my_images --config.data.source=folder:pictures --workdir runs/a", 2)


@case("Images and tokens", "TFDS is not installed")
def without_tfds(at: Place) -> None:
    at.patch.setattr(sys, "meta_path", [Missing("tensorflow_datasets"), *sys.meta_path])
    at.patch.delitem(sys.modules, "tensorflow_datasets", raising=False)
    at.command("inspect tfds:mnist", 2)


def with_a_tokenizer(at: Place, *flags: str) -> None:
    """The experiment mine.py, which is tiny.py with a finished tokenizer, and runs/a, where it has been taken over."""
    config = maskgit_vq.Config(
        image_size=8, channels=1, base_width=8, width_multipliers=(1, 2), blocks_per_level=1, latent_width=8, codebook_size=32
    )  # fmt: skip
    interop_vq.save("vq8.safetensors", config, maskgit_vq.init(config, jax.random.key(0)))
    tiny = pathlib.Path("tiny.py").read_text().replace("def get_config", "def get_tiny_config")
    at.path.joinpath("mine.py").write_text(
        f"{tiny}\n\ndef get_config():\n    config = get_tiny_config()\n    del config['tokenizer_train'], config['classifier']\n"
        "    config.tokenizer = {k: v for k, v in config.tokenizer.items() if not k.startswith('restart')}\n"
        "    config.tokenizer.weights = 'vq8.safetensors'\n    return config\n"
    )
    argv = ["train", "--config", "mine.py", "--workdir", "runs/a", "--stage", "tokenizer", "--quiet", *flags]
    assert cli.main(argv) == 0


@case("Images and tokens", "Tokens that another tokenizer made")
def other_tokens(at: Place) -> None:
    stores = "--config.data.tokens=tokens --config.data.tokens_heldout=tokens"
    with_a_tokenizer(at, *stores.split())
    names = [str(i) for i in range(10)]
    card = {"codebook_size": 32, "grid": [4, 4], "num_classes": 10, "class_names": names, "crops": ["whole image"]}
    writer = TokenStoreWriter("tokens", {**card, "source": "digits", "tokenizer_sha256": "ab" * 32}, source_records=64)
    with writer.shard(0) as shard:
        zeros = np.zeros(64, np.int64)
        shard.append(np.zeros((64, 16), np.int32), zeros, np.arange(64), zeros, zeros.astype(bool))
    writer.finish()
    at.command(f"train --config mine.py --workdir runs/a {stores} -q", 2)


@case("Images and tokens", "A folder that is no token store")
def no_store(at: Place) -> None:
    (at.path / "tokens").mkdir()
    at.command("tokenize --verify tokens", 1)


# ---------------------------------------------------------------- work directory and disk


@case("Work directory and disk", "The work directory of another run")
def other_run(at: Place) -> None:
    with_a_tokenizer(at)
    at.how = "which was begun with another batch size and learning rate"
    at.command(
        "train --config mine.py --workdir runs/a --config.train.batch_size=32 --config.train.learning_rate=1 -q", 2
    )


@case("Work directory and disk", "A folder of something else")
def folder_of_someone(at: Place) -> None:
    (at.path / "thesis").mkdir()
    (at.path / "thesis/thesis.tex").touch()
    at.command("run --config tiny.py --workdir thesis -q", 2)


@case("Work directory and disk", "A second writer")
def second_writer(at: Place) -> None:
    (at.path / "runs/a").mkdir(parents=True)
    held = Lease(at.path / "runs/a", "run")
    try:
        at.command(f"{RUN} -q", 1)
    finally:
        held.release()


@case("Work directory and disk", "A disk that can only be read")
def read_only(at: Place) -> None:
    (at.path / "runs").mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro tmpfs runs && exec "$@"', "sh"]
    tried = subprocess.run([*mount, "true"], capture_output=True, text=True)
    assert tried.returncode == 0, f"unshare -rm and mount are needed to see a read-only disk: {tried.stderr}"
    at.how = "runs is mounted read-only"
    at.command("run --config tiny.py --workdir runs -q", 1, run=in_a_process(inside=mount))


@case("Work directory and disk", "A folder of someone else")
def not_permitted(at: Place) -> None:
    def denied(path: pathlib.Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    at.patch.setattr(pathlib.Path, "mkdir", denied)  # who runs the tests may be permitted everything
    at.command(f"{RUN} -q", 2)


@case("Work directory and disk", "A full disk while sampling")
def full_while_sampling(at: Place) -> None:
    at.patch.setattr(Image.Image, "save", no_room)
    at.how = "the operating system answers ENOSPC"
    at.command(f"{SAMPLE} --classes 3 -q", 1)


@case("Work directory and disk", "A full disk while training")
def full_while_training(at: Place) -> None:
    at.patch.setattr(checkpoint, "write_manifest", no_room)
    at.patch.setattr(checkpoint.log, "warning", lambda *_: None)  # of each save before
    at.how = "the operating system answers ENOSPC to every save"
    at.command(
        "train --config tiny.py --workdir runs/a --stage classifier --config.classifier.train.checkpoint_every=2 -q", 1
    )


# ---------------------------------------------------------------- evaluation

STATISTICS: dict[str, Any] = {"n": 5000, "protocol": "adm", "weights_sha256": "0" * 64, "source": "x"}
SCORE = "evaluate --weights rar.bin --tokenizer vq.safetensors --inception inception.pth --out scores"
commands(
    "Evaluation",
    ("Inception's weights are not there", f"{SCORE} -q", 1),
    ("Too few samples for a distance", f"{SCORE} --samples 1 -q", 2),
    ("Too few samples in an experiment", f"{RUN} --config.evaluate.samples=1", 2),
)


@case("Evaluation", "Statistics of another network")
def other_reference(at: Place) -> None:
    write_reference(pathlib.Path("other.npz"), mean=np.zeros(8), cov=np.eye(8), **STATISTICS)
    at.how = "statistics of 8 features"
    at.command(f"{SCORE} --reference other.npz -q", 1)


@case("Evaluation", "A reference of images of another size")
def larger_reference(at: Place) -> None:
    cheap_inception.patch(at.patch.setattr)
    pixels = np.zeros((4, 256, 256, 3), "u1")
    write_reference(
        pathlib.Path("larger.npz"), mean=[0] * 12, cov=np.eye(12), images=((4, 256, 256, 3), [pixels]), **STATISTICS
    )
    at.note(f"{SCORE} --samples 20 --batch-size 4 --no-neighbours --reference larger.npz -q", "the reference's images")


@case("Evaluation", "Images where statistics should be")
def images_as_reference(at: Place) -> None:
    np.savez("theirs.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    at.command(f"{SCORE} --reference theirs.npz -q", 1)


# ---------------------------------------------------------------- installation


@case("Installation", "A package is missing")
def missing_package(at: Place) -> None:
    at.how = "without the package tensorboardX, which writes TensorBoard's files"
    at.command(f"{RUN} -q", 1, run=in_a_process("sys.modules['tensorboardX'] = None"))


@case("Installation", "Weights & Biases is missing")
def missing_wandb(at: Place) -> None:
    at.patch.setitem(sys.modules, "wandb", None)
    at.command(f"{RUN} --config.wandb=digits -q", 2)
    assert not pathlib.Path("runs").exists(), "it is said before anything is made"


@case("Installation", "TPU's compiler is missing")
def missing_libtpu(at: Place) -> None:
    at.patch.setitem(sys.modules, "libtpu", None)
    at.command("plan --config tiny.py --topology v5e:2x2 -q", 2)


# ---------------------------------------------------------------- the tests


@pytest.mark.promise(11, "each message of docs/errors.md, met by its command: one line, no traceback, the exit code")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_message(case: Case, at: Place, page: Page) -> None:
    case.meet(at)
    page.check(at.entry(case.group, case.title))


def test_the_page_has_no_other_errors(page: Page) -> None:
    titles = [case.title for case in CASES]
    assert len(set(titles)) == len(titles)
    if not page.writes:
        assert page.titles() == titles
