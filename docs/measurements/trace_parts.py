"""Where the time of a jitted program goes, by the part of the model: reads what `rar-jax bench ... --profile DIR` wrote.

    XLA_FLAGS="--xla_dump_to=DIR/hlo --xla_dump_hlo_as_text" rar-jax bench train --config rar_b --profile DIR --repeats 1
    python docs/measurements/trace_parts.py DIR [--top 12]

XLA's trace has a span for each instruction; the compiled text says which line of the model it comes from (`op_name`) and what
it is made of. Spans overlap where two cores work on two of them, so the sum may be more than the time of the clock.
"""

import argparse
import collections
import pathlib
import re

from jax.profiler import ProfileData

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)")


def instructions(text: str) -> dict[str, tuple[str, str]]:
    """Of each instruction: the shape of its result, and the `op_name` of the line it comes from."""
    found = {}
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            name, rest = match.groups()
            origin = re.search(r'op_name="([^"]*)"', rest)
            found[name] = rest.split("{")[0].split(" ")[0], origin[1] if origin else ""
    return found


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--top", type=int, default=12)
args = parser.parse_args()

texts = {path: path.read_text() for path in (args.folder / "hlo").glob("*after_optimizations.txt")}
if not texts:
    parser.error(f"{args.folder / 'hlo'} has no compiled text: run the bench with the XLA_FLAGS that --help shows")
programs = [instructions(text) for text in texts.values()]
for trace in sorted(args.folder.rglob("*.xplane.pb")):
    lines = [line for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines]
    events = [event for line in lines for event in line.events]
    times = collections.Counter()
    for event in events:
        times[event.name] += event.duration_ns / 1e9
    known = max(programs, key=lambda program: sum(times[name] for name in program))  # the benched one takes the time
    spans = collections.Counter({name: times[name] for name in known if name in times})
    print(trace.relative_to(args.folder), f"{sum(spans.values()):.2f} s in {len(spans)} instructions")
    parts, counts = collections.Counter(), collections.Counter()
    for name, seconds in spans.items():
        shape, origin = known[name]
        part = re.sub(r"[.\d]+$", "", name), shape, re.sub(r".*/(?=[^/]*/)", "", origin)  # the same in each layer
        parts[part] += seconds
        counts[part] += 1
    for part, seconds in parts.most_common(args.top):
        name, shape, origin = part
        print(
            f"{seconds:8.3f} s {seconds / sum(spans.values()):6.1%}  {counts[part]:4} x {name:36} {shape:26} {origin}"
        )
