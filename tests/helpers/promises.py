"""The table of promises in docs/reliability.md, generated from tests with `@pytest.mark.promise(row, what)`.

`PROMISES_TABLE=docs/reliability.md pytest -m promise` writes what it has just seen, the short and the long forms.
What was not run keeps the result of the day on which it was. A test says how many cases it counted by
`record_property("count", "25 of 25")`; otherwise they are its parametrizations.
"""

from __future__ import annotations

import collections
import datetime
import os
import pathlib
from typing import Any

import pytest

BEGIN, END = "<!-- table -->\n", "<!-- end -->"
LONG = " (long form)"
HEAD = ["| # | what is shown | by | cases | last result |", "|---|---|---|---|---|"]


class Promises:
    """Collects the outcome of every marked test, from the workers of `pytest -n` too."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[int, str, str], list[str]] = collections.defaultdict(list)
        self.counts: dict[tuple[int, str, str], str] = {}
        self.seconds: collections.Counter[tuple[int, str, str]] = collections.Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("promise"):
                number, what = mark.args
                long = LONG if item.get_closest_marker("slow") else ""
                item.user_properties.append(("promise", (number, what + long)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        count = dict(report.user_properties).get("count")
        for number, what in (value for name, value in report.user_properties if name == "promise"):
            key = (int(number), str(what), report.nodeid.partition("[")[0])
            self.seconds[key] += report.duration
            if report.when == "call" or report.outcome != "passed":
                self.outcomes[key].append(report.outcome)
                if count is not None:
                    self.counts[key] = str(count)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = os.environ.get("PROMISES_TABLE")
        if path and not hasattr(session.config, "workerinput"):
            self.write(session.config.rootpath / path)

    def write(self, path: pathlib.Path) -> None:
        """Replaces the rows of what was run between BEGIN and END."""
        text = path.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        old = [line.split(" | ") for line in text[begin:end].splitlines()[len(HEAD) :]]
        rows = {
            (int(cells[0].strip("| ")), cells[2].strip("`"), cells[1].endswith(LONG)): " | ".join(cells)
            for cells in old
        }
        today = datetime.date.today().isoformat()
        for (number, what, test), outcomes in self.outcomes.items():
            passed, skipped = outcomes.count("passed"), outcomes.count("skipped")
            result = (
                "passed"
                if passed == len(outcomes)
                else f"skipped {skipped}, passed {passed}"
                if passed + skipped == len(outcomes)
                else "FAILED"
            )
            count = self.counts.get((number, what, test), str(len(outcomes)))
            seconds = self.seconds[(number, what, test)]
            rows[(number, test, what.endswith(LONG))] = (
                f"| {number} | {what} | `{test}` | {count} | {result}, {today}, {seconds:.0f} s |"
            )
        lines = [*HEAD, *(rows[key] for key in sorted(rows))]
        path.write_text(text[:begin] + "\n".join(lines) + "\n" + text[end:])
