"""Collectives of a compiled program: which devices each unites, as its text says, and what goes over the wire."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the text. size: bytes of the larger of its operands and results on one device. groups: the devices
    that each unites, places in the order of the mesh; None where the text names none. asynchronous: it runs beside other work.
    slices: that it joins over the data centre's network, each chip with its counterparts; 1 within a slice."""

    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...] | None
    asynchronous: bool
    slices: int = 1


def replica_groups(text: str) -> tuple[tuple[int, ...], ...] | None:
    """The devices that a collective unites, places in the mesh's order; None where it names none, as permutes do.

    Written as lists {{0,1},{2,3}}, as an arrangement [2,2]<=[4] or [2,2]<=[2,2]T(1,0), or as axes of a mesh.
    """
    if found := re.search(r"replica_groups={({[\d,{} ]*})}", text):
        return tuple(tuple(int(x) for x in row.split(",")) for row in re.findall(r"{([\d, ]+)}", found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, of, turned = found.groups()
        places = _arranged(of, turned).reshape(_sizes(shape))
    elif found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? {([^}]*)}", text
    ):
        axes, of, turned, united = found.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
        names, last = list(sizes), re.findall(r"'([^']+)'", united)
        order = [names.index(name) for name in names if name not in last] + [names.index(name) for name in last]
        whole = _arranged(of or ",".join(map(str, sizes.values())), turned).reshape(tuple(sizes.values()))
        places = whole.transpose(order).reshape(-1, math.prod(sizes[name] for name in last))
    else:
        return None
    return tuple(map(tuple, places.tolist()))


def _sizes(text: str | None) -> list[int]:
    return [int(x) for x in (text or "").split(",") if x]


def _arranged(sizes: str, turned: str | None) -> np.ndarray:
    places = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return places.transpose(_sizes(turned)) if turned else places


# ---------------------------------------------------------------- the wire


def wire_bytes(kind: str, size: float, devices: int) -> float:
    """What one device sends in a collective over so many, by the best algorithm (a ring): "all-reduce" is a reduce-scatter and an
    all-gather. size: of the whole array (all-gather: the result, reduce-scatter: the operand) on one device."""
    share = (devices - 1) / devices
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
