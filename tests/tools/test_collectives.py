"""What the compiled train step sends over the wire, and where each parameter lies: golden, so that it cannot rot.

`UPDATE_GOLDEN=1 pytest tests/tools/test_collectives.py` refreshes; look at the difference before you commit it.
"""

import collections
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from rar_jax.models import find_module
from rar_jax.parallel.arrays import make_global_batch
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import sharded
from rar_jax.sections import Recipe
from rar_jax.training.step import compile_training

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def table(sizes: tuple[int, int, int]) -> dict[str, Any]:
    rar = find_module("generators", "rar")
    mesh = make_mesh(MeshConfig(*sizes))
    setup = compile_training(rar, rar.TINY, Recipe(steps=10, batch_size=8), mesh)
    rows = {"tokens": np.zeros((8, rar.TINY.num_tokens), np.int32), "labels": np.zeros((8,), np.int32)}
    with sharded(mesh):
        compiled = setup.step.lower(setup.abstract_state, make_global_batch(rows, mesh), jax.random.key(0)).compile()  # pyright: ignore
    found = re.findall(rf"= .*? ({'|'.join(KINDS)})(?:-start)?\(", compiled.as_text())
    params = jax.tree_util.tree_leaves_with_path(setup.abstract_state["params"])
    return {
        "collectives": dict(sorted(collections.Counter(found).items())),
        "params": {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{list(x.shape)} {x.sharding.spec}"
            for path, x in params
        },
    }


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (2, 1, 2)], ids=["data", "fsdp", "data_tensor"])
def test_sharding_table_and_collectives(golden: pathlib.Path, sizes: tuple[int, int, int]) -> None:
    path = golden / "sharding" / f"rar_tiny_{'x'.join(map(str, sizes))}.json"
    ours = table(sizes)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ours, indent=1) + "\n")
    assert ours == json.loads(path.read_text())
    if sizes == (4, 1, 1):  # data parallel: gradients are summed, nothing else moves
        assert set(ours["collectives"]) == {"all-reduce"}
