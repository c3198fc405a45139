"""Collectives and cycles read off compiled programs: against the gradients' bytes, nested loops, and texts of the TPU compiler."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rar_jax.errors import TripCountError
from rar_jax.generators import rar
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, sharded
from rar_jax.sections import Recipe
from rar_jax.tools.plan import hlo
from rar_jax.tools.plan.hlo import Collective, parse_replica_groups
from rar_jax.training.step import compile_training

ROWS = 8


def training(config: rar.Config, sizes: tuple[int, int, int], accumulation: int = 1) -> str:
    """Text of the train step over four devices."""
    mesh = make_mesh(MeshConfig(*sizes))
    setup = compile_training(rar, config, Recipe(steps=10, batch_size=ROWS, accumulation=accumulation), mesh)
    batch = {"tokens": (ROWS, config.num_tokens), "labels": (ROWS,)}
    given = {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=batch_sharding(mesh)) for k, s in batch.items()}
    step: Any = setup.step
    with sharded(mesh):
        return step.lower(setup.abstract_state, given, jax.random.key(0)).compile().as_text()


def test_gradients_are_what_data_parallel_training_sends() -> None:
    totals = hlo.count_program(training(rar.TINY, (4, 1, 1)))
    params = jax.eval_shape(functools.partial(rar.init, rar.TINY), jax.random.key(0))
    gradients = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))
    assert {c.kind for c in totals.collectives} == {"all-reduce"}
    sent = sum(n * c.size for c, n in totals.collectives.items())
    table = 4 * (rar.TINY.codebook_size + 1 + rar.TINY.num_classes + 1) * rar.TINY.width
    assert sent == gradients + table + 4  # the token table's for each of its two uses, and the loss
    assert {c.groups for c in totals.collectives} == {((0, 1, 2, 3),)}


def loop_text(steps: int, data: bool = False) -> str:
    """A loop in a loop, with a sum over devices in the inner one. Without `data` it runs min(i, 3) times in turn i of the outer one."""
    mesh = make_mesh(MeshConfig())

    def inner(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: jax.lax.psum(x * x, "data") / 4, x)

    def whole(x: jax.Array, n: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda i, x: inner(x, n * n if data else jnp.minimum(i, 3)), x)

    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(whole, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(jnp.ones((4, 4)), 2).compile().as_text() or ""


@pytest.mark.parametrize(("steps", "runs"), [(3, 0 + 1 + 2), (6, 0 + 1 + 2 + 3 + 3 + 3)])
def test_bounds_that_depend_on_an_outer_loop(steps: int, runs: int) -> None:
    assert sum(hlo.count_program(loop_text(steps)).collectives.values()) == runs


def test_bounds_that_depend_on_data() -> None:
    with pytest.raises(TripCountError, match=r"the trip count of .* depends on data"):
        hlo.count_program(loop_text(3, data=True))


# ---------------------------------------------------------------- as a TPU's compiler writes

TPU = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[1,192,3072]) -> (bf16[1,192,3072], bf16[1,768,3072]) {
  %param_0.1 = bf16[1,192,3072]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,768,3072]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=93, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[1,192,3072]{2,1,0}, bf16[1,768,3072]{2,1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (param_0.2: bf16[1,192,3072]) -> bf16[1,768,3072] {
  %param_0.2 = bf16[1,192,3072]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,768,3072]{2,1,0} all-gather(%param_0.2), channel_id=93, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}, dimensions={1}
}

%all-reduce-scatter.3 (param_0.3: bf16[768,6,768]) -> bf16[192,6,768] {
  %param_0.3 = bf16[768,6,768]{2,0,1} parameter(0)
  %constant.1 = s32[]{:T(128)} constant(0)
  %all-reduce.3 = bf16[768,6,768]{2,0,1} all-reduce(%param_0.3), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %dynamic-slice.3 = bf16[192,6,768]{2,0,1} dynamic-slice(%all-reduce.3, %constant.1, %constant.1, %constant.1), dynamic_slice_sizes={192,6,768}
}

%fused_computation.4 (param_0.4: bf16[128,257,16,48], param_1.4: bf16[128,257,16,48]) -> f32[128,16,257,257] {
  %param_0.4 = bf16[128,257,16,48]{1,3,2,0} parameter(0)
  %param_1.4 = bf16[128,257,16,48]{1,3,2,0} parameter(1)
  ROOT %convolution-base-dilated.4 = f32[128,16,257,257]{2,3,1,0:T(8,128)} convolution(%param_0.4, %param_1.4), window={size=128x16 stride=127x15 lhs_dilate=128x16}, dim_labels=0b1f_0o1i->01bf, operand_precision={highest,highest}, backend_config={"window_config":{"estimated_cycles":"900"}}
}

%body (carry.1: (s32[], bf16[128,257,16,48])) -> (s32[], bf16[128,257,16,48]) {
  %carry.1 = (s32[]{:T(128)}, bf16[128,257,16,48]{1,3,2,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %x.1 = bf16[128,257,16,48]{1,3,2,0} get-tuple-element(%carry.1), index=1
  %constant.2 = s32[]{:T(128)} constant(1)
  %fusion.4 = f32[128,16,257,257]{2,3,1,0} fusion(%x.1, %x.1), kind=kOutput, calls=%fused_computation.4, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %next.1 = s32[]{:T(128)} add(%i.1, %constant.2)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[128,257,16,48]{1,3,2,0}) tuple(%next.1, %x.1)
}

%condition (carry.2: (s32[], bf16[128,257,16,48])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(24)
  %carry.2 = (s32[]{:T(128)}, bf16[128,257,16,48]{1,3,2,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %constant.3), direction=LT
}

ENTRY %main (p.1: bf16[1,192,3072], p.2: bf16[768,6,768], p.3: bf16[128,257,16,48]) -> s32[] {
  %p.1 = bf16[1,192,3072]{2,1,0} parameter(0)
  %p.2 = bf16[768,6,768]{2,0,1} parameter(1)
  %p.3 = bf16[128,257,16,48]{1,3,2,0} parameter(2)
  %constant.4 = s32[]{:T(128)} constant(0)
  %async-collective-start = (bf16[1,192,3072]{2,1,0}, bf16[1,768,3072]{2,1,0}) fusion(%p.1), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = bf16[1,768,3072]{2,1,0} fusion(%p.1), kind=kOutput, calls=%async_collective_fusion.2, backend_config={"window_config":{"estimated_cycles":"7"}}
  %fusion.3 = bf16[192,6,768]{2,0,1} fusion(%p.2), kind=kCustom, calls=%all-reduce-scatter.3
  %tuple.2 = (s32[]{:T(128)}, bf16[128,257,16,48]{1,3,2,0}) tuple(%constant.4, %p.3)
  %while.1 = (s32[]{:T(128)}, bf16[128,257,16,48]{1,3,2,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out.1 = s32[]{:T(128)} get-tuple-element(%while.1), index=0
}
"""


def test_a_tpu_s_text() -> None:
    totals = hlo.count_program(TPU)
    assert totals.cycles == 24 * 1000 + 7  # a fusion's own hold those of what is in it
    rows = tuple((i, i + 1, i + 2, i + 3) for i in range(0, 16, 4))
    assert totals.collectives == {
        Collective("all-gather", 768 * 3072 * 2, rows, True): 1,  # the second is the first one going on
        Collective("reduce-scatter", 768 * 6 * 768 * 2, ((0, 1), (2, 3)), False): 1,
    }


@pytest.mark.parametrize(("target", "slices"), [("{1,2}x{0:3}", 2), ("{1:4}x{0:63}", 4), ("{1,3:5}x{0:3}", 4)])
def test_between_slices(target: str, slices: int) -> None:
    """As libtpu 0.0.42 writes the sum of gradients over slices; what goes to the host is none."""
    attributes = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"'
    megascale = f'_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{target}"'
    text = f"""HloModule jit_step

ENTRY %main (p.1: bf16[144,8,128]) -> token[] {{
  %p.1 = bf16[144,8,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %after-all.12 = token[] after-all()
  %send.11 = (bf16[144,8,128]{{2,1,0}}, u32[], token[]) send(%p.1, %after-all.12), channel_id=2, is_host_transfer=true
  %send.12 = (bf16[144,8,128]{{2,1,0:T(8,128)(2,1)}}, u32[], token[]) send(%p.1, %after-all.12), channel_id=26, {attributes},_xla_host_transfer_rendezvous="all-reduce.40_0",{megascale},_xla_megascale_transfer_type="ALL_REDUCE"}}
  %recv.12 = (bf16[144,8,128]{{2,1,0:T(8,128)(2,1)}}, u32[], token[]) recv(%after-all.12), channel_id=25, {attributes},{megascale},_xla_megascale_transfer_type="ALL_REDUCE"}}
  %recv-done.12 = (bf16[144,8,128]{{2,1,0}}, token[]) recv-done(%recv.12), channel_id=25, is_host_transfer=true
  ROOT %send-done.12 = token[] send-done(%send.12), channel_id=26, is_host_transfer=true
}}
"""
    assert hlo.count_program(text).collectives == {
        Collective("all-reduce", 144 * 8 * 128 * 2, None, False, slices=slices): 1
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3}}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("source_target_pairs={{0,1},{1,0}}", None),
    ],
)
def test_groups(text: str, groups: Any) -> None:
    assert parse_replica_groups(f"channel_id=1, {text}, to_apply=%add") == groups
