"""A command in a terminal, and what that terminal showed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios


def shown_by(command: list[str], env: dict[str, str], *, width: int = 80, seconds: float = 120) -> tuple[int, bytes]:
    """Exit code and output of a command whose stdin, stdout and stderr are one terminal of 24 lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    kept = {k: v for k, v in env.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI")}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=kept | {"TERM": "xterm"})
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 65536):
            out += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    return process.wait(timeout=seconds), out


def frames(output: bytes) -> list[list[str]]:
    """The lines that stood on the screen after each piece of output between two control sequences."""
    lines, row, column = [""], 0, 0
    seen: list[list[str]] = []
    for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output.decode(errors="replace")):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b"):
            count = int(re.sub(r"\D", "", part) or 0)
            if part.endswith("A"):
                row = max(0, row - max(1, count))
            elif part.endswith("K"):
                lines[row] = "" if count == 2 else lines[row][:column]
            elif part[-1] not in "mhl":
                raise AssertionError(f"a control sequence that this terminal does not know: {part!r}")
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
            seen.append(list(lines))
    return seen
