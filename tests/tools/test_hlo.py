"""What is read off compiled programs: against the matmuls that must be there, the gradients' bytes, and texts of TPU's compiler."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rar_jax.errors import HloError
from rar_jax.generators import rar
from rar_jax.parallel.mesh import MeshConfig, make_mesh
from rar_jax.parallel.rules import batch_sharding, replicated, sharded
from rar_jax.sampling import Guidance, sample_keys
from rar_jax.sections import Recipe
from rar_jax.tools.plan import hlo
from rar_jax.tools.plan.collectives import Collective, replica_groups, wire_bytes
from rar_jax.training.step import compile_training

ROWS, SLOTS = 8, rar.TINY.num_tokens + 1


def training(config: rar.Config, sizes: tuple[int, int, int], accumulation: int = 1) -> str:
    """Text of the train step over four devices."""
    mesh = make_mesh(MeshConfig(*sizes))
    setup = compile_training(rar, config, Recipe(steps=10, batch_size=ROWS, accumulation=accumulation), mesh)
    batch = {"tokens": (ROWS, config.num_tokens), "labels": (ROWS,)}
    given = {k: jax.ShapeDtypeStruct(s, jnp.int32, sharding=batch_sharding(mesh)) for k, s in batch.items()}
    step: Any = setup.step
    with sharded(mesh):
        return step.lower(setup.abstract_state, given, jax.random.key(0)).compile().as_text()


def forward_flops_of_blocks(c: rar.Config) -> int:
    """Everything in the blocks, by hand: each weight's multiply-add for every slot, and two products of the attention."""
    weights = (4 + 6) * c.width**2 + 2 * c.width * c.mlp_width
    return 2 * ROWS * c.depth * (SLOTS * weights + 2 * c.width * SLOTS**2)


def masked_flops(c: rar.Config) -> int:
    """Of the attention's two products, for the pairs that the mask throws away and costs.py does not count."""
    return ROWS * c.depth * 4 * c.width * (SLOTS * (SLOTS - 1) // 2)


@pytest.mark.parametrize(
    ("remat", "sizes", "accumulation"), [(False, (4, 1, 1), 1), (True, (1, 4, 1), 1), (True, (2, 1, 2), 2)]
)
def test_flops_of_a_training_step(remat: bool, sizes: tuple[int, int, int], accumulation: int) -> None:
    """Loops over layers and over parts of the batch multiplied out: the analytic count, within a thousandth."""
    config = dataclasses.replace(rar.TINY, remat=remat, depth=3)
    expected = rar.train_flops(config, batch_size=ROWS) + 3 * masked_flops(config)
    expected += forward_flops_of_blocks(config) if remat else 0
    ours = 4 * sum(hlo.totals(training(config, sizes, accumulation)).flops.values())
    if sizes[2] == 1:
        assert ours == pytest.approx(expected, rel=0.001)
    else:  # adaLN is not cut over tensor: its products are done twice, four in the blocks (one again) and three in the end
        twice = 2 * ROWS * SLOTS * (4 * config.depth * 6 + 3 * 2) * config.width**2
        assert ours == pytest.approx(expected + twice, rel=0.001)


def test_gradients_are_what_data_parallel_training_sends() -> None:
    totals = hlo.totals(training(rar.TINY, (4, 1, 1)))
    params = jax.eval_shape(functools.partial(rar.init, rar.TINY), jax.random.key(0))
    gradients = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))
    assert {c.kind for c in totals.collectives} == {"all-reduce"}
    sent = sum(n * c.size for c, n in totals.collectives.items())
    table = 4 * (rar.TINY.codebook_size + 1 + rar.TINY.num_classes + 1) * rar.TINY.width
    assert sent == gradients + table + 4  # the token table's for each of its two uses, and the loss
    assert {c.groups for c in totals.collectives} == {((0, 1, 2, 3),)}


@pytest.mark.parametrize(("devices", "guidance"), [(1, Guidance(2.0)), (4, Guidance(0.0))])
def test_flops_of_the_sampler_whose_loops_have_bounds_of_their_own(devices: int, guidance: Guidance) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    params = jax.eval_shape(functools.partial(rar.init, rar.TINY), jax.random.key(0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), params)
    labels = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=batch_sharding(mesh))

    def sample(params: Any, labels: jax.Array) -> jax.Array:
        keys = sample_keys(0, jnp.arange(ROWS))
        return rar.sample(rar.TINY, params, labels, keys=keys, guidance=guidance)

    with sharded(mesh):
        text = jax.jit(sample).lower(params, labels).compile().as_text()
    needed = rar.sample_flops(rar.TINY, batch_size=ROWS, guided=guidance.enabled)
    # The cache has stages, and attention reads a whole one. On one device the modulation is of distinct classes, all at the most.
    assert needed <= devices * sum(hlo.totals(text).flops.values()) <= 1.02 * needed


def test_bounds_that_depend_on_data() -> None:
    def product(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: x @ x, x)

    def text(bound: Any) -> str:
        return jax.jit(lambda x, n: product(x, bound(n))).lower(jnp.ones((4, 4)), 3).compile().as_text() or ""

    with pytest.raises(HloError, match=r"the bounds of .* depend on data"):
        hlo.totals(text(lambda n: n))
    assert sum(hlo.totals(text(lambda n: jnp.minimum(n * n, 7))).flops.values()) == 7 * 2 * 4**3


def counted(steps: int) -> str:
    """A loop in a loop: the inner one goes as often as the outer one has gone, so that it runs 0 + 1 + ... times."""

    def inner(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: x @ x, x)

    def whole(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda i, x: inner(x, jnp.minimum(i, 3)), x)

    return jax.jit(whole).lower(jnp.ones((4, 4))).compile().as_text() or ""


@pytest.mark.parametrize(("steps", "runs"), [(3, 0 + 1 + 2), (6, 0 + 1 + 2 + 3 + 3 + 3)])
def test_bounds_that_depend_on_an_outer_loop(steps: int, runs: int) -> None:
    assert sum(hlo.totals(counted(steps)).flops.values()) == runs * 2 * 4**3


@pytest.mark.parametrize(
    ("stride", "padding", "spread", "groups"), [(1, "SAME", 1, 1), (2, "VALID", 1, 1), (1, "SAME", 2, 2)]
)
def test_convolutions(stride: int, padding: str, spread: int, groups: int) -> None:
    image, kernel = jnp.zeros((2, 9, 7, 4)), jnp.zeros((3, 3, 4 // groups, 6))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(stride, stride), padding=padding, rhs_dilation=(spread, spread),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    # By ones: a product counts where it meets the image and not the padding.
    hits = float(convolve(jnp.ones_like(image), jnp.ones_like(kernel)).sum())
    text = jax.jit(convolve).lower(image, kernel).compile().as_text()
    assert text and sum(hlo.totals(text).flops.values()) == 2 * hits


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
    totals = hlo.totals(TPU)
    # The scores of 128 rows and 16 heads, 257 slots against 257 over 48, written as a convolution with holes; 24 times.
    assert totals.flops == {"highest": 24 * 2 * 128 * 16 * 257 * 257 * 48}
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
    assert hlo.totals(text).collectives == {Collective("all-reduce", 144 * 8 * 128 * 2, None, False, slices=slices): 1}


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
    assert replica_groups(f"channel_id=1, {text}, to_apply=%add") == groups


def test_bytes_on_the_wire_of_rings() -> None:
    assert wire_bytes("all-gather", 400, 4) == wire_bytes("reduce-scatter", 400, 4) == 300
    assert wire_bytes("all-reduce", 400, 4) == 600 and wire_bytes("all-to-all", 400, 4) == 300
    assert wire_bytes("collective-permute", 400, 2) == 400
    with pytest.raises(HloError, match="no ENTRY"):
        hlo.totals("HloModule nothing")
    assert np.isclose(wire_bytes("all-reduce", 1, 10**6), 2)
