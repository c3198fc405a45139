"""What one device does in a compiled program, read off its HLO text: collectives, matmuls, the compiler's own cycles.

Loops are multiplied out by running their counters: of each computation only the scalar integers are evaluated, so that bounds
which depend on an outer loop (the sampler's) count as often as they run. A bound that is the smaller of something that depends on
data and of a number counts as that number.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rar_jax.errors import HloError
from rar_jax.tools.plan.collectives import COLLECTIVES, Collective, replica_groups

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. result: its type as written. operands: names. rest: everything after the operands."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    rest: str

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute ("calls", "body", "condition", "to_apply") names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, sizes) of each array of the result."""
        return [
            (dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in _SHAPE.findall(self.result)
        ]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text; the root's name."""

    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass
class Totals:
    """Of one run on one device.

    flops: of matmuls, by precision: "default", or "highest", which a TPU makes of six products of bfloat16. cycles: the
    compiler's own estimates, where it gives any. collectives: how often each runs.
    """

    flops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cycles: float = 0.0
    collectives: collections.Counter[Collective] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Totals) -> None:
        """Adds what another part of the program does."""
        self.flops += other.flops
        self.cycles += other.cycles
        self.collectives += other.collectives


# ---------------------------------------------------------------- text


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry, name, lines, root = "", "", {}, ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, lines, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif line == "}" and name:
            found[name], name = Computation(lines, root), ""
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3])
            lines[match[2]] = instruction
            root = match[2] if match[1] else root
    if not entry:
        raise HloError("the text has no ENTRY computation")
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, text = text[:end], text[end:].lstrip()
    begin = text.index("(")
    end = _closing(text, begin)
    inside = text[begin + 1 : end]
    opcode = text[:begin]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, result, opcode, operands, inside, text[end + 1 :])


def _closing(text: str, begin: int) -> int:
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise HloError(f"unbalanced parentheses in {text[:80]}")


# ---------------------------------------------------------------- what a program does


def totals(text: str) -> Totals:
    """Everything that one device does in one run of a compiled program (`jax.stages.Compiled.as_text`).

    Raises: HloError for a loop whose bounds depend on data.
    """
    computations, entry = parse(text)
    parameters = [i for i in computations[entry].instructions.values() if i.opcode == "parameter"]
    return _Program(computations).count(entry, [None] * len(parameters))


class _Program:
    def __init__(self, computations: dict[str, Computation]) -> None:
        self._computations = computations
        self._without_loops: dict[str, Totals] = {}

    def count(self, name: str, arguments: list[Any], *, fused: bool = False) -> Totals:
        """Of one run of a computation, whose arguments are integers, tuples of such, or None for what is not known."""
        if name in self._without_loops:
            return self._without_loops[name]
        total, scope, loops = Totals(), _Scope(self, name, arguments), False
        computation = self._computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                loops = True
                total.add(self._loop(instruction, scope))
            total.flops += _flops(instruction, computation)
            total.cycles += _cycles(instruction)
            if (collective := _collective(instruction, computation, fused)) is not None:
                total.collectives[collective] += 1
            if (inner := _runs(instruction)) is not None:
                whole = instruction.opcode == "fusion"  # its own estimate holds all of it
                counted = self.count(inner, [scope.value(x) for x in instruction.operands], fused=whole)
                loops |= inner not in self._without_loops
                total.add(dataclasses.replace(counted, cycles=0.0) if whole else counted)
        if not loops:
            self._without_loops[name] = total
        return total

    def _loop(self, instruction: Instruction, scope: _Scope) -> Totals:
        condition, body = instruction.called("condition"), instruction.called("body")
        assert condition is not None and body is not None
        carry, total = scope.value(instruction.operands[0]), Totals()
        for _ in range(1_000_000):
            goes_on = _Scope(self, condition, [carry]).root()
            if goes_on is None:
                raise HloError(f"the bounds of {instruction.name} depend on data")
            if not goes_on:
                return total
            total.add(self.count(body, [carry]))
            carry = _Scope(self, body, [carry]).root()
        raise HloError(f"{instruction.name} does not end")

    def computation(self, name: str) -> Computation:
        return self._computations[name]


def _runs(instruction: Instruction) -> str | None:
    """The computation that an instruction runs once, where it holds more than a scalar function."""
    if instruction.opcode in ("fusion", "async-start"):
        return instruction.called("calls")
    return instruction.called("to_apply") if instruction.opcode == "call" else None


# ---------------------------------------------------------------- integers

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "negate": operator.neg,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.not_,
    "select": lambda p, a, b: a if p else b,
    "clamp": lambda low, x, high: max(low, min(x, high)),
}
_UNCHANGED = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "broadcast", "optimization-barrier")
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


class _Scope:
    """The integers of one run of a computation, each evaluated when it is asked for; None for what is no known integer."""

    def __init__(self, program: _Program, name: str, arguments: list[Any]) -> None:
        self._program, self._computation, self._arguments = program, program.computation(name), arguments
        self._known: dict[str, Any] = {}

    def root(self) -> Any:
        return self.value(self._computation.root)

    def value(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = self._evaluate(self._computation.instructions[name])
        return self._known[name]

    def _evaluate(self, i: Instruction) -> Any:
        if i.opcode == "parameter":
            return self._arguments[int(i.literal)]
        if i.opcode == "tuple":
            return tuple(self.value(x) for x in i.operands)
        if i.opcode == "get-tuple-element":
            whole, place = self.value(i.operands[0]), re.search(r"index=(\d+)", i.rest)
            return whole[int(place[1])] if isinstance(whole, tuple) and place else None
        if i.opcode == "fusion" and (inner := _runs(i)) and not i.result.startswith("("):
            if all(sizes == () or math.prod(sizes) == 1 for _, sizes in i.shapes):
                return _Scope(self._program, inner, [self.value(x) for x in i.operands]).root()
            return None
        if not re.match(r"(s|u)\d+\[(1,?)*\]|pred\[(1,?)*\]", i.result):
            return None
        if i.opcode == "constant":
            words = re.findall(r"-?\d+|true|false", i.literal)
            return {"true": True, "false": False}.get(words[0]) if words[0][0] in "tf" else int(words[0])
        if i.opcode in _UNCHANGED:
            value = self.value(i.operands[0])
            return value if not isinstance(value, tuple) else None
        given = [self.value(x) for x in i.operands]
        if i.opcode == "minimum":  # of a number and of what depends on data: the most that it can be
            return min((x for x in given if x is not None), default=None)
        if any(x is None or isinstance(x, tuple) for x in given):
            return None
        if i.opcode == "compare" and (direction := re.search(r"direction=(\w+)", i.rest)):
            return _ORDER[direction[1]](*given)
        if i.opcode == "divide":
            return abs(given[0]) // abs(given[1]) * (1 if given[0] * given[1] >= 0 else -1)
        return _ARITHMETIC[i.opcode](*given) if i.opcode in _ARITHMETIC else None


# ---------------------------------------------------------------- instructions


def _cycles(instruction: Instruction) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return float(found[1]) if found else 0.0


def _flops(i: Instruction, computation: Computation) -> collections.Counter[str]:
    """Operations of a matmul or convolution; a product with padding is none."""
    if i.opcode not in ("dot", "convolution"):
        return collections.Counter()
    out = i.shapes[0][1]
    left, right = (computation.instructions[x].shapes[0][1] for x in i.operands)
    if i.opcode == "dot":
        flops = 2 * math.prod(out) * math.prod(left[d] for d in _numbers(i.rest, "lhs_contracting_dims"))
    else:
        flops = _convolution_flops(i, left, right, out)
    return collections.Counter({"highest" if "highest" in i.rest else "default": flops})


def _numbers(text: str, attribute: str) -> list[int]:
    found = re.search(rf"{attribute}={{([\d,]*)}}", text)
    return [int(x) for x in found[1].split(",") if x] if found else []


def _convolution_flops(i: Instruction, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> int:
    # A TPU's compiler writes matmuls so, too, batch dimensions as spatial ones with holes between the rows.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if labels is None:
        raise HloError(f"{i.name} has no dim_labels")
    inputs, kernel, outputs = labels.groups()
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window={([^}]*)}", i.rest) or [""])[0].removeprefix("window="))
    )
    sizes = [int(x) for x in window["size"].split("x")] if "size" in window else []

    def of(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(sizes)

    taps = 1
    for d, size in enumerate(sizes):
        stride, holes, spread = (int(of(name, "1")[d]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(of("pad", "0_0")[d].split("_")[0])
        at = np.arange(out[outputs.index(str(d))])[:, None] * stride + np.arange(size) * spread - before
        taps *= int(((at >= 0) & (at <= (left[inputs.index(str(d))] - 1) * holes) & (at % holes == 0)).sum())
    rows = out[outputs.index("b")] * out[outputs.index("f")] * right[kernel.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    return 2 * rows * taps // (int(groups[1]) if groups else 1)


def _bytes(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(sizes) * _bits(dtype) // 8 for dtype, sizes in shapes)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 0  # token and opaque: none


def _collective(i: Instruction, computation: Computation, fused: bool) -> Collective | None:
    """What an instruction sends, if it does; None for one that only waits for what another began."""
    kind = re.sub("-start$", "", i.opcode)
    if kind == "send":
        return _between_slices(i, computation)
    if kind not in COLLECTIVES:
        return None
    overlapped = i.opcode.endswith("-start")
    if fused:
        # A TPU's compiler spreads one collective over the fusions beside which it runs: the first says AsyncCollectiveStart. An
        # all-reduce fused with the slice that is kept of it is a reduce-scatter.
        others = list(computation.instructions.values())
        overlapped = any("AsyncCollectiveStart" in other.rest for other in others)
        scattered = kind == "all-reduce" and any(other.opcode == "dynamic-slice" for other in others)
        if not overlapped and not scattered:
            return None
        kind = "reduce-scatter" if scattered else kind
    given = sum(_bytes(computation.instructions[x].shapes) for x in i.operands)
    made = _bytes(i.shapes)
    if i.opcode in ("all-gather-start", "collective-permute-start"):  # their result holds the operands, too
        made -= given
    return Collective(kind, max(given, made), replica_groups(i.rest), overlapped)


def _between_slices(i: Instruction, computation: Computation) -> Collective | None:
    """A TPU's compiler makes of a collective over slices one within each, and of a chip's share this send and its recv. What runs
    between the two is not looked at: all of it counts as waited for."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
    target = re.search(r'_xla_megascale_target="{([\d,:]+)}', i.rest)
    if not (kind and target):  # to the host
        return None
    ends = [[int(end) for end in part.split(":")] for part in target[1].split(",")]
    slices = sum(part[-1] - part[0] + 1 for part in ends)
    size = _bytes(computation.instructions[i.operands[0]].shapes)
    return Collective(kind[1].lower().replace("_", "-"), size, None, asynchronous=False, slices=slices)
