"""What the census of a compiled program counts, on programs whose collectives are written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks.lab import collectives

# As the compilers for TPU and GPU write them: layouts with tiles, asynchronous pairs, tuples.
ASYNCHRONOUS = """
  %ag = (f32[2,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) all-gather-start(%p), dimensions={0}
  %agd = f32[8,128]{1,0:T(8,128)} all-gather-done(%ag)
  %two = ((f32[2]{0}, s8[4]{0}), (f32[8]{0}, s8[16]{0})) all-gather-start(%a, %b), dimensions={0}
  %ar = (f32[4]{0}, bf16[3]{0}) all-reduce-start(%c, %d), to_apply=%add, metadata={op_name="jit(f)/psum"}
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1}}
  %rs = ((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%g), dimensions={0}, to_apply=%add
  ROOT %aa = (pred[4,<=8]{1,0}, f8e4m3fn[]) all-to-all(%h, %i), replica_groups={{0,1}}
  %gte = f32[4]{0} get-tuple-element(%ar), index=0, metadata={op_name="jit(f)/all-reduce(x)"}
"""


def test_asynchronous_forms_tuples_and_narrow_types():
    found = [(c.kind, c.bytes, c.name) for c in collectives.census(ASYNCHRONOUS)]
    assert found == [
        ("all-gather", 8 * 128 * 4, ""),
        ("all-gather", 8 * 4 + 16, ""),
        ("all-reduce", 4 * 4 + 3 * 2, "jit(f)/psum"),
        ("collective-permute", 5 * 4, ""),
        ("reduce-scatter", 2 * 4, ""),
        ("all-to-all", 32 + 1, ""),
    ]


# As the TPU's compiler writes a gather that a product overlaps, another on its channel, a reduce-scatter
# of two leaves, and a sum.
FUSED = """
%async_start (p: bf16[64]) -> (bf16[64], bf16[256]) {
  %ag.1 = bf16[256]{0:T(256)} all-gather(%p), channel_id=4, frontend_attributes={chain_id="0"}, op_name="w"
  ROOT %start = (bf16[64]{0}, bf16[256]{0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%fused (p: bf16[64]) -> f32[8] {
  %ag.2 = bf16[256]{0:S(1)} all-gather(%p), channel_id=4, frontend_attributes={chain_id="0"}, op_name="w"
}

%all-reduce-scatter.6 (a: f32[256,8], b: f32[16]) -> (f32[64,8], /*index=1*/f32[4]) {
  %a = f32[256,8]{1,0:T(8,128)} parameter(0)
  %ar = (f32[256,8]{1,0:T(8,128)}, f32[16]{0}) all-reduce(%a, %b), channel_id=9, to_apply=%add
}

ENTRY %main (p: bf16[64]) -> f32[8] {
  %ag.3 = bf16[512]{0} all-gather(%p), channel_id=4, frontend_attributes={async_collective_name="ag"}
  ROOT %sum = f32[8]{0} all-reduce(%g), channel_id=9, to_apply=%add
}
"""


def test_what_a_tpu_sends_while_it_computes_is_counted_once():
    found = [(c.kind, c.bytes, c.name) for c in collectives.census(FUSED)]
    assert found == [
        ("all-gather", 256 * 2, "w"),
        ("reduce-scatter", (64 * 8 + 4) * 4, ""),
        ("all-gather", 512 * 2, ""),
        ("all-reduce", 8 * 4, ""),
    ]


def by_hand(x, y):
    """Every kind over the axes data=4 and model=2; the sum over model inside a loop."""
    total = jax.lax.psum(y, "data")
    gathered = jax.lax.all_gather(x, "data")
    part = jax.lax.psum_scatter(y, "data", tiled=True)
    turned = jax.lax.all_to_all(y, "model", 0, 1, tiled=True)
    moved = jax.lax.ppermute(x, "data", [(0, 1), (1, 2)])
    looped = jax.lax.fori_loop(0, 3, lambda i, c: jax.lax.psum(c, "model") / 2, x)
    return total, gathered, part, turned, moved, looped


@pytest.mark.devices
def test_a_compiled_program():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    fn = jax.shard_map(
        by_hand, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=False
    )
    program = jax.jit(fn).lower(jnp.ones((8, 4)), jnp.ones((8, 8))).compile()
    found = collectives.census(program)
    assert sorted((c.kind, c.bytes) for c in found) == [
        ("all-gather", 8 * 4 * 4),
        ("all-reduce", 2 * 4 * 4),
        ("all-reduce", 8 * 8 * 4),
        ("all-to-all", 8 * 8 * 4),
        ("collective-permute", 2 * 4 * 4),
        ("reduce-scatter", 2 * 8 * 4),
    ]
    looped = next(c for c in found if c.bytes == 32 and c.kind == "all-reduce")
    assert "while" in looped.name
    assert collectives.table(found).rows[:2] == (("all-gather", 1, 128), ("all-reduce", 2, 288))


@pytest.mark.devices
def test_what_the_compiler_puts_in_itself():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    x = jax.device_put(np.ones((16, 4), np.float32), rows)
    census = lambda fn, **kw: collectives.census(jax.jit(fn, **kw).lower(x).compile())
    assert census(lambda x: x * 2) == ()
    assert [(c.kind, c.bytes) for c in census(lambda x: x.sum(0))] == [("all-reduce", 16)]
    (gather,) = census(lambda x: x * 2, out_shardings=whole)
    assert gather.kind == "all-gather" and gather.bytes == 16 * 4 * 4
