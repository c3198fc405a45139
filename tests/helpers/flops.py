"""Operations counted in what JAX traced, for comparison with what a compiled program is said to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend
import numpy as np


def multiplied(function: Any, *args: Any) -> int:
    """Operations of the convolutions and matmuls that JAX traced, taps that meet the padding left out."""
    total = 0

    def walk(jaxpr: Any) -> None:
        nonlocal total
        for eqn in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner)
            out = eqn.outvars[0].aval.shape
            if eqn.primitive.name == "conv_general_dilated":
                (batch, height, width, channels), kernel = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
                padding, strides = eqn.params["padding"], eqn.params["window_strides"]
                taps = 1
                for size, k, (low, _), stride, places in zip(
                    (height, width), kernel[:2], padding, strides, out[1:3], strict=True
                ):
                    taps *= sum(0 <= i * stride - low + j < size for i in range(places) for j in range(k))
                total += 2 * batch * taps * channels * out[3]
            elif eqn.primitive.name == "dot_general":
                contracted = [eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][0][0]]
                total += 2 * int(np.prod(out)) * int(np.prod(contracted))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return total
