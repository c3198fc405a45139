"""Read collectives and the compiler's cycle estimates from HLO text.

The text of TPU programs has no trip counts. Loops count as often as they run, because the scalar integers of each
computation are evaluated. The minimum of a known number and of one that depends on data counts as the known number.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rar_jax.errors import TripCountError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the text.

    size: bytes of the larger of its operands and results on one device. groups: the devices that each unites, positions
    in mesh order; None where the text names none. asynchronous: it overlaps with other work. slices: that it joins over
    the data centre's network; 1 within a slice.
    """

    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...] | None
    asynchronous: bool
    slices: int = 1


@dataclasses.dataclass
class Totals:
    """Estimated cycles and number of runs of each collective, on one device."""

    cycles: float = 0.0
    collectives: collections.Counter[Collective] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Totals) -> None:
        """Add what another part of the program does."""
        self.cycles += other.cycles
        self.collectives += other.collectives


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: result type, text inside the parentheses, attributes after them."""

    name: str
    result: str
    opcode: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        arrays = _SHAPE.findall(self.result)
        return sum(math.prod(_parse_ints(sizes)) * _count_bits(dtype) // 8 for dtype, sizes in arrays)

    @property
    def is_scalar(self) -> bool:
        """Whether the result is one integer or bool."""
        return re.match(r"([su]\d+|pred)\[(1,?)*\]", self.result) is not None

    def find_called(self, attribute: str) -> str:
        """The computation that an attribute such as "body" names, "" if there is none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


def _count_bits(dtype: str) -> int:
    digits = _search(r"(\d+)", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits or 0)  # tokens and opaque values have none


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order of the text, and the name of the root."""

    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """Parse computations by name; return them and the name of the entry."""
    found: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            found[name], entry = Computation(), name if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            inside, _, rest = match[5].partition("), ")
            found[name].instructions[match[2]] = Instruction(match[2], match[3], match[4], inside, rest)
            found[name].root = match[2] if match[1] else found[name].root
    assert entry, "the text has no ENTRY computation"
    return found, entry


# ---------------------------------------------------------------- what a program does


def count_program(text: str) -> Totals:
    """Count what one device does in one run, from the text of a compiled program.

    Raises: TripCountError for a loop whose bounds depend on data.
    """
    computations, entry = parse_hlo(text)
    return _Counter(computations).count(entry, [None] * text.count(" parameter("))


class _Counter:
    def __init__(self, computations: dict[str, Computation]) -> None:
        self._computations = computations
        self._without_loops: dict[str, Totals] = {}

    def count(self, name: str, arguments: Sequence[Any], *, fused: bool = False) -> Totals:
        """Count one run of a computation.

        arguments: integers, tuples of them, or None for what is unknown.
        """
        if name in self._without_loops:
            return self._without_loops[name]
        total, value, loops = Totals(), self._make_scope(name, arguments), False
        computation = self._computations[name].instructions
        for instruction in computation.values():
            if instruction.opcode == "while":
                loops = True
                total.add(self._count_loop(instruction, value(instruction.operands[0])))
            total.cycles += float(_search(r'"estimated_cycles":"(\d+)"', instruction.rest) or 0)
            if (collective := _find_collective(instruction, computation, fused)) is not None:
                total.collectives[collective] += 1
            if inner := _find_inner(instruction):
                whole = instruction.opcode == "fusion"  # its own estimate includes everything inside
                counted = self.count(inner, [value(x) for x in instruction.operands], fused=whole)
                loops |= inner not in self._without_loops
                total.add(dataclasses.replace(counted, cycles=0.0) if whole else counted)
        if not loops:
            self._without_loops[name] = total
        return total

    def _count_loop(self, instruction: Instruction, carry: Any) -> Totals:
        total, body = Totals(), instruction.find_called("body")
        while (goes_on := self._evaluate_root(instruction.find_called("condition"), [carry])) is not False:
            if goes_on is None:
                raise TripCountError(f"the trip count of {instruction.name} depends on data")
            total.add(self.count(body, [carry]))
            carry = self._evaluate_root(body, [carry])
        return total

    # ---- integers

    def _evaluate_root(self, name: str, arguments: Sequence[Any]) -> Any:
        return self._make_scope(name, arguments)(self._computations[name].root)

    def _make_scope(self, name: str, arguments: Sequence[Any]) -> Callable[[str], Any]:
        """Function from the name of an instruction to its value, see `_evaluate`."""

        @functools.cache
        def value(name: str) -> Any:
            instruction = instructions[name]
            if instruction.opcode == "parameter":
                return arguments[int(instruction.inside.rstrip(")"))]
            if instruction.opcode == "fusion" and instruction.is_scalar:
                return self._evaluate_root(instruction.find_called("calls"), list(map(value, instruction.operands)))
            return _evaluate(instruction, value)

        instructions = self._computations[name].instructions
        return value


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda a, b: int(a / b),
    "maximum": max,
    "negate": operator.neg,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.not_,
    "select": lambda p, a, b: a if p else b,
    "clamp": lambda low, x, high: max(low, min(x, high)),
}
_UNCHANGED = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "broadcast", "optimization-barrier")


def _evaluate(instruction: Instruction, value: Callable[[str], Any]) -> Any:
    """The integer, bool or tuple that an instruction makes, None if unknown."""
    opcode = instruction.opcode
    if opcode == "tuple":
        return tuple(map(value, instruction.operands))
    if opcode == "get-tuple-element":
        whole, index = value(instruction.operands[0]), _search(r"index=(\d+)", instruction.rest)
        return whole[int(index)] if isinstance(whole, tuple) else None
    if not instruction.is_scalar:
        return None
    if opcode == "constant":
        word = instruction.inside.strip("{}) ")
        return {"true": True, "false": False}[word] if word in ("true", "false") else int(word)
    operands = [value(x) for x in instruction.operands]
    if opcode == "minimum":
        return min((x for x in operands if x is not None), default=None)
    if not operands or any(x is None or isinstance(x, tuple) for x in operands):
        return None
    if opcode == "compare":
        direction = _search(r"direction=(\w+)", instruction.rest)
        return getattr(operator, direction.lower())(*operands)
    if opcode in _UNCHANGED:
        return operands[0]
    return _ARITHMETIC[opcode](*operands) if opcode in _ARITHMETIC else None


def _search(pattern: str, text: str) -> str:
    """The first group of a pattern, "" if it is not found."""
    found = re.search(pattern, text)
    return found[1] if found else ""


# ---------------------------------------------------------------- collectives


def _find_inner(instruction: Instruction) -> str:
    """The computation that an instruction runs once, unless it is a scalar function."""
    if instruction.opcode in ("fusion", "async-start"):
        return instruction.find_called("calls")
    return instruction.find_called("to_apply") if instruction.opcode == "call" else ""


def _find_collective(instruction: Instruction, computation: dict[str, Instruction], fused: bool) -> Collective | None:
    """The collective that an instruction starts, None if it starts none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send":
        return _find_send(instruction, computation)
    if kind not in COLLECTIVES:
        return None
    overlaps = instruction.opcode.endswith("-start")
    if fused:
        # The TPU compiler splits an overlapping collective over fusions, of which the first says AsyncCollectiveStart.
        # An all-reduce that is fused with a slice of its result is a reduce-scatter.
        overlaps = any("AsyncCollectiveStart" in other.rest for other in computation.values())
        scatters = kind == "all-reduce" and any(other.opcode == "dynamic-slice" for other in computation.values())
        if not overlaps and not scatters:
            return None
        kind = "reduce-scatter" if scatters else kind
    operands = sum(computation[x].bytes for x in instruction.operands)
    results = instruction.bytes
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # the result includes the operands
        results -= operands
    return Collective(kind, max(operands, results), parse_replica_groups(instruction.rest), overlaps)


def _find_send(instruction: Instruction, computation: dict[str, Instruction]) -> Collective | None:
    """A collective between slices, a send of a chip's share. Its overlap is not analysed."""
    kind = _search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    target = _search(r'_xla_megascale_target="{([\d,:]+)}', instruction.rest)
    if not (kind and target):  # to the host
        return None
    ends = [[int(end) for end in part.split(":")] for part in target.split(",")]
    slices = sum(part[-1] - part[0] + 1 for part in ends)
    size = computation[instruction.operands[0]].bytes
    return Collective(kind.lower().replace("_", "-"), size, None, asynchronous=False, slices=slices)


def parse_replica_groups(text: str) -> tuple[tuple[int, ...], ...] | None:
    """Parse the devices that a collective unites, positions in mesh order, or None.

    They are written as lists {{0,1},{2,3}}, as an arrangement [2,2]<=[4] or [2,2]<=[2,2]T(1,0), or as axes of a mesh.
    """
    if found := re.search(r"replica_groups={({[\d,{} ]*})}", text):
        return tuple(tuple(int(x) for x in row.split(",")) for row in re.findall(r"{([\d, ]+)}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes, order = found.groups()
        devices = _arrange(sizes, order).reshape(_parse_ints(shape))
    elif found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? {([^}]*)}", text
    ):
        axes, sizes, order, united = found.groups()
        mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        last = re.findall(r"'([^']+)'", united)
        names = [*(name for name in mesh if name not in last), *last]
        whole = _arrange(sizes or ",".join(map(str, mesh.values())), order).reshape(tuple(mesh.values()))
        devices = whole.transpose([list(mesh).index(name) for name in names])
        devices = devices.reshape(-1, math.prod(mesh[name] for name in last))
    else:
        return None
    return tuple(map(tuple, devices.tolist()))


def _arrange(sizes: str, order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_parse_ints(sizes))).reshape(_parse_ints(sizes))
    return devices.transpose(_parse_ints(order)) if order else devices


def _parse_ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]
