"""The command line: help worth reading, one line for every mistake, no traceback, no import before it is needed."""

import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from rar_jax import cli
from rar_jax.arguments import VERBS, make_parser

ROOT = pathlib.Path(__file__).parents[1]


def exit_code(*argv: str) -> int:
    """Of the program, also where argparse ends it."""
    try:
        return cli.main(argv)
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that exits 2."""
    assert exit_code(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    return err.strip()


# ---------------------------------------------------------------- help


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for verb in [
        "run",
        "train",
        "tokenize",
        "sample",
        "evaluate",
        "convert",
        "models",
        "bench",
        "plan",
        "inspect",
        "report",
        "doctor",
    ]:
        assert f"  {verb} " in out
    assert "rar-jax run --config experiments/digits.py --workdir runs/digits" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(verb, "--help") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for flag, options in (*VERBS[verb].arguments, ("--progress", {}), ("--quiet", {})):
        assert options.get("metavar", flag) in out, flag
    assert ("--coordinator-address" in out) == (verb in ("run", "train", "tokenize", "sample", "evaluate"))
    assert ("--config.train.steps=10" in out) == (
        verb not in ("sample", "convert", "models", "inspect", "report", "doctor")
    )


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_takes_its_arguments(name: str) -> None:
    """The function of each verb has the arguments of the table as keywords."""
    verb = VERBS[name]
    keywords = {options.get("dest", flag.lstrip("-").replace("-", "_")) for flag, options in verb.arguments} | {"quiet"}
    if verb.has_config:
        keywords = keywords - {"config"} | {"experiment"}
    keywords |= {"sampling"} if verb.sampling else set()
    if "raw" in keywords:  # all about reading weights is one argument
        keywords = keywords - {"raw", "download", "fact", "model"} | {"reading"}
    bound = inspect.signature(cli.import_function(name)).bind(**dict.fromkeys(keywords))
    assert keywords <= bound.arguments.keys() | set(bound.arguments.get("options", bound.arguments.get("settings", {})))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ((), "the following arguments are required: VERB"),
        (("fly",), "invalid choice: 'fly'"),
        (("run",), "the following arguments are required: --config, --workdir"),
        (
            ("run", "--config", "digits", "--workdir", "x", "--sted", "1"),
            "unknown argument --sted; see rar-jax run --help",
        ),
        (("run", "--config", "digits", "--workdir", "x", "--confg.seed=1"), "--help. Did you mean --config.seed=1?"),
        (("run", "--config", "digits", "--workdir", ""), "argument --workdir: it is empty: give a folder"),
        (("run", "--config", "digits", "--workdir", "x", "y"), "unknown argument y; see rar-jax run --help"),
        (("train", "--config", "digits", "--workdir", "x", "--stage", "decoder"), "no stage 'decoder'"),
        (("sample", "--weights", "x", "--out", "y", "--config.sampling.scale=3"), "--config.sampling.scale=3"),
        (("evaluate", "--workdir", "x", "--config.seed=3"), "no --config"),
        (("run", "--config", "digits", "--workdir", "x", "--sampling.scale=3"), "or --config.sampling.scale=3"),
        (("inspect", "x", "--sampling.scale=3"), "--sampling.scale=3 is not for this command: give it to sample"),
        (("sample", "--weights", "x", "--out", "y", "--seed", "z"), "argument --seed: invalid int value: 'z'"),
    ],
)
def test_wrong_arguments(argv: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and problem in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["--config.train.stesp=5"], "config.train has no key 'stesp'. Did you mean 'steps'?"),
        (
            ["--config.tokenizer.train.stesp=5"],
            "config.tokenizer has no key 'train'. Did you mean config.tokenizer_train?",
        ),
        (["--config.trian.steps=5"], "config has no key 'trian'. Did you mean 'train'?"),
        (["--config.train.steps"], "override 'train.steps' is not of the form section.key=value"),
        (["--config.train.steps=soon"], "config.train.steps is 'soon': write steps (1000), a share ('50%')"),
        (["--config.generator.num_heads=7"], "config.generator: width 96 is not divisible by num_heads 7"),
        (["--config.mesh.data=3"], "mesh {'data': 3, 'fsdp': 1, 'tensor': 1} does not multiply to 4 devices"),
        (["--config.train.batch_size=126"], "train.batch_size 126 is not divisible by the 4 devices"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "train", "tokenize", "evaluate"])
def test_wrong_experiments(
    verb: str, overrides: list[str], problem: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(capsys, verb, "--config", "digits", "--workdir", str(tmp_path / "w"), *overrides)
    assert line.startswith(f"rar-jax {verb}: {problem}")
    assert not (tmp_path / "w").exists(), "nothing is written before the experiment is known to be sound"


def test_overrides_are_written_with_an_equals_sign_or_a_space() -> None:
    words = [
        "train",
        "--config.train.steps=5",
        "--config",
        "digits",
        "--config.train.warmup",
        "-1",
        "--config.x",
        "--quiet",
    ]
    rest, overrides = cli.split_overrides(words, "config")
    assert rest == ["train", "--config", "digits", "--quiet"]
    assert overrides == ["train.steps=5", "train.warmup=-1", "x"]


def test_no_such_experiment(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "run", "--config", "digist", "--workdir", str(tmp_path / "w"))
    assert line.startswith("rar-jax run: no experiment 'digist'") and line.endswith("Did you mean 'digits'?")


def test_a_folder_of_someone_else(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    line = failure(capsys, "run", "--config", "digits", "--workdir", str(tmp_path), "--quiet")
    assert line == f"rar-jax run: {tmp_path} has no config.json but holds thesis.tex: choose another --workdir"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ["--weights", "/nowhere"],
            "/nowhere: no such directory or weights file, and no released one: those are rar_b,",
        ),
        (["--sampling.scale"], "override 'scale' is not of the form section.key=value"),
    ],
)
def test_wrong_sampling(
    flags: list[str], problem: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = [] if "--weights" in flags else ["--weights", str(tmp_path)]
    out = tmp_path / "out"
    line = failure(capsys, "sample", "--out", str(out), *weights, *flags)
    assert line.startswith(f"rar-jax sample: {problem}") and not out.exists()


# ---------------------------------------------------------------- processes


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-W", "error", *argv], env=env, text=True, capture_output=True, timeout=120)


def test_the_command_line_does_not_import_jax() -> None:
    code = "import sys, rar_jax.cli; print(sorted({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)))"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_module_is_the_program() -> None:
    done = python("-m", "rar_jax", "doctor", "--config.seed=1")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "rar-jax doctor: there is no --config that --config.seed=1 could change\n",
    )


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, command.replace("\\\n", " ").strip())
    for page in PAGES
    for command in re.findall(r"^(?:    |```bash\n|)(rar-jax (?:.*\\\n)*.*)$", page.read_text(), re.MULTILINE)
]


def test_commands_are_found_in_the_documentation() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_of_the_documentation_parse(page: str, command: str) -> None:
    text = re.split(r" {2,}(?=\S)", command)[0]  # without the remark behind it
    for placeholder, value in (("...", "FILE"), (" N ", " 2 "), (" K", " 1")):
        text = text.replace(placeholder, value)
    words, _ = cli.split_overrides(shlex.split(text)[1:], "config")
    words, _ = cli.split_overrides(words, "sampling")
    assert make_parser().parse_args(words).verb in VERBS
