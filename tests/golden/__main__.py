"""Print quantity, bound and measured value of a system's golden files. Exits 1 if a bound is missed."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rar_jax.errors import RarJaxError
from tests.golden import HERE, Check, GoldenError, list_systems, measure_parity


def format_table(checks: Sequence[Check]) -> str:
    """One line per quantity."""
    width = max(len(check.quantity) for check in checks)
    rows = [f"{'quantity':<{width}}  {'bound':>9}  {'measured':>9}"]
    for check in checks:
        status = "ok" if check.passed else "MISSED"
        rows.append(f"{check.quantity:<{width}}  {check.bound:>9g}  {check.measured:>9.3g}  {status}")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every bound holds, 1 if one is missed or the package raises, 2 for an unknown name or a missing file."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("name", help=f"one of {', '.join(list_systems())}")
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="golden files (default: tests/golden/NAME)")
    args = parser.parse_args(argv)
    try:
        checks = measure_parity(args.name, args.folder or HERE / args.name)
    except (GoldenError, RarJaxError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, GoldenError) else 1
    print(format_table(checks))
    missed = sum(not check.passed for check in checks)
    print(f"{args.name}: {len(checks) - missed} of {len(checks)} bounds hold")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
