"""docs/errors.md, generated from what tests/test_errors.py meets.

`ERRORS_PAGE=docs/errors.md pytest tests/test_errors.py` writes the page. Without it each message is compared with the page's, so
that the page says what the program says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import rar_jax
from rar_jax import cli

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "errors.md"
BEGIN, END = "<!-- errors -->\n", "<!-- end -->"
Run = Callable[[list[str]], tuple[int, str]]  # of a command line: its exit code and stderr
# What is another on each machine, or each day.
VARYING = (
    (r"[0-9a-f]{64}", "SHA256"),
    (r"[0-9a-f]{12}\.\.\.", "SHA256..."),
    (r"process \d+ on \S+", "process PID on HOST"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"),
    (r"allocating \d+ bytes", "allocating N bytes"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An error as the page has it. how: what the test did to meet it, where the command alone does not."""

    group: str
    title: str
    command: str
    ends: str
    message: str
    how: str

    def __str__(self) -> str:
        how = f" ({self.how})" if self.how else ""
        return f"### {self.title}\n`{self.command}`{how} ends with {self.ends}:\n\n    {self.message}\n"


@dataclasses.dataclass
class Place:
    """A folder to meet errors in, which is the working directory: rar.bin and vq.safetensors fit one another; tiny.py is an experiment."""

    path: pathlib.Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    met: tuple[str, str, str] | None = None
    how: str = ""

    def command(self, text: str, code: int, *, run: Run | None = None, progress: bool = False) -> None:
        """`rar-jax TEXT` as a person types it ("-q" is --quiet, and not shown): one line on stderr, no traceback, this exit code.

        progress: a download shows its own before.
        """
        found, err = (run or self._run)(["--quiet" if word == "-q" else word for word in shlex.split(text)])
        assert found == code, (found, err)
        *before, line = re.split(r"[\r\n]+", err.rstrip())
        assert (progress or not before) and "Traceback" not in err, err
        assert line.startswith(f"rar-jax {text.split()[0]}: "), err
        self.met = f"rar-jax {text.removesuffix(' -q')}", f"exit code {code}", line

    def note(self, text: str, begins: str) -> None:
        """A command that does its work, and says on stdout what its reader must know."""
        code = cli.main(["--quiet" if word == "-q" else word for word in shlex.split(text)])
        (line,) = (line for line in self.capsys.readouterr().out.splitlines() if line.startswith(f"note: {begins}"))
        assert code == 0
        self.met = f"rar-jax {text.removesuffix(' -q')}", "exit code 0 and a note", line

    def python(self, code: str, error: type[Exception]) -> None:
        """Python that a person types; the error's message is one line."""
        with pytest.raises(error) as caught:
            exec(code, {"rar_jax": rar_jax})
        message = str(caught.value)
        assert "\n" not in message, message
        self.met = code, f"`{error.__module__}.{error.__qualname__}`", message

    def _run(self, argv: list[str]) -> tuple[int, str]:
        self.capsys.readouterr()
        try:
            code = cli.main(argv)
        except SystemExit as ended:  # argparse
            assert isinstance(ended.code, int)
            code = ended.code
        return code, self.capsys.readouterr().err

    def entry(self, group: str, title: str) -> Entry:
        """What was met, without what is another on each machine."""
        assert self.met is not None, "the test met nothing"
        command, ends, message = self.met
        message = message.replace(f"{self.path}/", "").replace(str(self.path), ".")
        for pattern, name in VARYING:
            message = re.sub(pattern, name, message)
        return Entry(group, title, command, ends, message, self.how)


def in_a_process(before: str = "", *, inside: Sequence[str] = (), **environ: str) -> Run:
    """Runs a command in a fresh process, after some Python; inside: what starts it (unshare)."""

    def run(argv: list[str]) -> tuple[int, str]:
        script = f"import sys\n{before}\nfrom rar_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [*inside, sys.executable, "-c", script, *argv], env=os.environ | {"PYTHONPATH": str(PAGE.parents[1])} | environ,
            text=True, capture_output=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stderr

    return run


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to meet an error."""

    group: str
    title: str
    meet: Callable[[Place], None]


class Page:
    """The committed page, or the one that is being written."""

    def __init__(self) -> None:
        self.seen: list[Entry] = []
        self.writes = "ERRORS_PAGE" in os.environ
        self.text = PAGE.read_text()

    def check(self, entry: Entry) -> None:
        """Asserts that the page has this entry, to the letter; or keeps it to be written."""
        self.seen.append(entry)
        if not self.writes:
            assert str(entry) in self.text, f"ERRORS_PAGE=docs/errors.md pytest tests/test_errors.py writes:\n{entry}"

    def titles(self) -> list[str]:
        """Of the entries on the page, in its order."""
        return re.findall(r"^### (.*)$", self.text[self.text.index(BEGIN) : self.text.index(END)], re.MULTILINE)

    def write(self) -> None:
        """Replaces what is between BEGIN and END."""
        parts, group = [], None
        for entry in self.seen:
            parts += [f"## {entry.group}\n"] if entry.group != group else []
            parts.append(str(entry))
            group = entry.group
        head, tail = self.text[: self.text.index(BEGIN) + len(BEGIN)], self.text[self.text.index(END) :]
        (PAGE.parents[1] / os.environ["ERRORS_PAGE"]).write_text(head + "\n".join(parts) + tail)


class Missing:
    """On sys.meta_path: what Python says of a package that was not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def page() -> Any:
    """The page of a session of tests."""
    opened = Page()
    yield opened
    if opened.writes:
        missing = set(opened.titles()) - {entry.title for entry in opened.seen}
        assert not missing, f"not written: run all of tests/test_errors.py, or take these off the page first: {missing}"
        opened.write()
