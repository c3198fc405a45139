"""Count the FLOPs and the memory traffic of a traced program.

FLOPs are those of matmuls, convolutions and fused attention. A multiply-add is two. Masked attention scores and
recomputation count. Products with the padding of a convolution do not.

Bytes are a lower bound. Inputs and outputs of the program count once. In each turn of a loop, the operands of its
matmuls count if they are parameters or carried by the loop. Such parameters do not count again as inputs. A buffer that
the loop fills is half full on average. If the turns do not depend on each other, as in `lax.map`, parameters count
once. Other activations do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

from rar_jax.errors import TripCountError

# Primitives whose result is the operand in memory, or a part of it.
VIEWS = (
    "reshape", "transpose", "convert_element_type", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice",
    "sharding_constraint", "optimization_barrier",
)  # fmt: skip


class Cost(NamedTuple):
    """FLOPs of a computation, and bytes moved to or from memory."""

    flops: float
    bytes: float


class _Value(NamedTuple):
    """A variable's number, its bytes in memory (0: an activation), and its input."""

    number: Any = None
    stored: float = 0.0
    source: Any = None


def count_costs(closed: Any) -> Cost:
    """Count what one run of a program costs, on all devices together.

    Args:
      closed: of `jax.make_jaxpr(function)(...)` or `jax.jit(function).trace(...).jaxpr`.

    Raises: TripCountError.
    """
    jaxpr, arrays = closed.jaxpr, [*closed.jaxpr.constvars, *closed.jaxpr.invars]
    read: set[Any] = set()  # inputs that are counted in loops
    cost, _ = _count(jaxpr, [_Value(None, _size(var), var) for var in arrays], read, in_loop=False)
    once = [var for var in arrays if var not in read]
    return Cost(cost.flops, cost.bytes + sum(map(_size, [*once, *jaxpr.outvars])))


def _count(jaxpr: Any, values: Sequence[_Value], read: set[Any], *, in_loop: bool) -> tuple[Cost, list[_Value]]:
    """Cost of a jaxpr with these constvars and invars, and values of its outvars."""
    env, flops, moved = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True)), 0.0, 0.0

    def find(var: Any) -> _Value:
        return _Value(var.val if np.ndim(var.val) == 0 else None) if hasattr(var, "val") else env.get(var, _Value())

    for eqn in jaxpr.eqns:
        given, name, cost = [find(var) for var in eqn.invars], eqn.primitive.name, Cost(0, 0)
        made = [_Value()] * len(eqn.outvars)
        if products := _count_products(eqn):
            cost = Cost(products, sum(value.stored for value in given) if in_loop else 0)
            read.update(value.source for value in given if in_loop)
        elif name in ("scan", "while"):
            cost, made = _count_loop(eqn, given, read, in_loop)
        elif name == "cond":
            cost = max(_count_call(branch, given[1:], read, in_loop)[0] for branch in eqn.params["branches"])
        elif name in VIEWS:
            share = min(1, eqn.outvars[0].aval.size / max(eqn.invars[0].aval.size, 1))
            made = [given[0]._replace(stored=given[0].stored * share)]
        elif name == "dynamic_update_slice" and given[0].stored:
            made = [_Value(stored=(given[0].stored + _size(eqn.invars[1])) / 2)]
        elif inner := list(jax.extend.core.jaxprs_in_params(eqn.params)):
            cost, made = _count_call(inner[0], given, read, in_loop)
        elif made:
            made[0] = _Value(_evaluate(eqn, [value.number for value in given]))
        flops, moved = flops + cost.flops, moved + cost.bytes
        env.update(zip(eqn.outvars, made, strict=True))
    return Cost(flops, moved), [find(var) for var in jaxpr.outvars]


def _count_call(inner: Any, given: Sequence[_Value], read: set[Any], in_loop: bool) -> tuple[Cost, list[_Value]]:
    """Of jit, custom_vjp and remat: operands are those of the called jaxpr."""
    jaxpr = getattr(inner, "jaxpr", inner)
    given = given if len(given) == len(jaxpr.invars) else [_Value()] * len(jaxpr.invars)
    return _count(jaxpr, [*[_Value()] * len(jaxpr.constvars), *given], read, in_loop=in_loop)


def _count_loop(eqn: Any, given: Sequence[_Value], read: set[Any], in_loop: bool) -> tuple[Cost, list[_Value]]:
    """Of a scan or a `fori_loop`.

    Turns are counted one by one if the trip count of an inner loop may depend on them.
    """
    params, slices = eqn.params, []
    if eqn.primitive.name == "scan":
        body, trips, start = params["jaxpr"].jaxpr, params["length"], params["num_consts"]
        end = start + params["num_carry"]
        consts, carry = given[:start], given[start:end]
        slices = [x._replace(number=None, stored=x.stored / trips) if in_loop else _Value() for x in given[end:]]
    else:
        body, skipped, start = params["body_jaxpr"].jaxpr, params["cond_nconsts"], params["body_nconsts"]
        consts, carry = given[skipped:][:start], given[skipped + start :]
        trips = _count_trips(params["cond_jaxpr"].jaxpr, [*given[:skipped], *carry])
    carried = body.invars[start:][: len(carry)]
    share = max(trips, 1) if _is_map(body, carried) else 1
    consts, flops, moved = [x._replace(stored=x.stored / share) for x in consts], 0.0, 0.0
    one_by_one = _has_while(body)
    for _ in range(trips if one_by_one else min(trips, 1)):
        carry = [_Value(x.number, _size(var) if var.aval.shape else 0) for x, var in zip(carry, carried, strict=True)]
        cost, made = _count(body, [*consts, *carry, *slices], read, in_loop=True)
        times, carry = 1 if one_by_one else trips, made[: len(carry)]
        flops, moved = flops + times * cost.flops, moved + times * cost.bytes
    return Cost(flops, moved), [_Value(stored=_size(var) if var.aval.shape else 0) for var in eqn.outvars]


def _count_trips(condition: Any, values: Sequence[_Value]) -> int:
    """Turns of a `fori_loop`, whose condition compares a counter with an upper bound."""
    env, (compare, *others) = dict(zip(condition.invars, values, strict=True)), condition.eqns
    bounds = [var.val if hasattr(var, "val") else env[var].number for var in compare.invars]
    if others or compare.primitive.name != "lt" or None in bounds:
        raise TripCountError("the trip count of a loop depends on data")
    return max(0, int(bounds[1]) - int(bounds[0]))


def _has_while(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "while" or any(map(_has_while, jax.extend.core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _is_map(body: Any, carried: Sequence[Any]) -> bool:
    """Whether a loop only counts, and fills arrays part by part."""
    for given, made in zip(carried, body.outvars, strict=False):
        users = [eqn for eqn in body.eqns if any(var is given for var in eqn.invars)]
        fills = len(users) == 1 and users[0].primitive.name == "dynamic_update_slice" and users[0].outvars[0] is made
        if given.aval.shape and made is not given and not fills:
            return False
    return True


def _evaluate(eqn: Any, numbers: list[Any]) -> Any:
    """The integer or bool that an operation makes, None if it is unknown.

    A minimum is at most what is known of it.
    """
    known, out = [x for x in numbers if x is not None], eqn.outvars[0].aval
    if out.shape != () or out.dtype not in (np.int32, np.bool_) or not known:
        return None
    if len(known) < len(numbers):
        return min(known) if eqn.primitive.name == "min" else None
    return eqn.primitive.bind(*map(np.asarray, numbers, [var.aval.dtype for var in eqn.invars]), **eqn.params)


def _count_products(eqn: Any) -> int:
    """FLOPs of a matmul, a convolution or a fused attention; 0 of anything else."""
    name, params = eqn.primitive.name, eqn.params
    shapes: list[Any] = [getattr(var.aval, "shape", ()) for var in eqn.invars]
    if name == "dot_general":
        return 2 * eqn.outvars[0].aval.size * math.prod(shapes[0][d] for d in params["dimension_numbers"][0][0])
    if name.startswith("dot_product_attention_fwd"):  # of cuDNN, queries (b, n, h, k) and keys (b, m, h, k)
        return 4 * math.prod(shapes[0]) * shapes[1][1]
    if name != "conv_general_dilated":
        return 0
    (_, _, *xs), (_, channels, *ks), (batch, features, *ys) = params["dimension_numbers"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    left, right, out = *shapes, eqn.outvars[0].aval.shape
    taps = 1
    for x, k, y, stride, (low, _), holes, spread in zip(xs, ks, ys, *(params[name] for name in names), strict=True):
        at = np.arange(out[y])[:, None] * stride + np.arange(right[k]) * spread - low
        taps *= int(((at >= 0) & (at <= (left[x] - 1) * holes) & (at % holes == 0)).sum())
    return 2 * out[batch] * out[features] * right[channels] * taps


def _size(var: Any) -> int:
    """Bytes of an array."""
    return var.aval.size * var.aval.dtype.itemsize
