"""`pytest tests/faults` shows every row of docs/reliability.md."""

import ast
import pathlib
import re

HERE = pathlib.Path(__file__).parent


def test_every_row_is_proved_here() -> None:
    """In a form that is not slow."""
    rows = re.findall(
        r"^\| (\d+) \| [^|]+ \|$", (HERE.parents[1] / "docs" / "reliability.md").read_text(), re.MULTILINE
    )
    assert list(map(int, rows)) == list(range(1, 14))
    proved = set()
    for path in HERE.glob("test_*.py"):
        for test in ast.walk(ast.parse(path.read_text())):
            marks = [ast.unparse(mark) for mark in getattr(test, "decorator_list", ())]
            if "pytest.mark.slow" not in marks:
                proved |= {int(m[1]) for mark in marks if (m := re.match(r"pytest\.mark\.promise\((\d+)", mark))}
    assert proved == set(range(1, 14))
