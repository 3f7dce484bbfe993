"""What optimizers and normalizations cost on the CPU backend, exactly: bytes, temporaries, state, equations.

Nothing is timed. The counts are those of the compiled step (update and apply_updates, params and state
donated); 12 bytes a parameter are the least possible: read p and g, write p. Those of a normalization
are of its forward pass in training and of value_and_grad, in sizes of its input.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import blocks, common, grouping
from jaxtricks import _jaxpr
from jaxtricks.memopt import state_bytes

pytestmark = pytest.mark.stock
LEAF = common.shapes(w=(512, 1024))
TREE = common.shapes(w=(512, 1024), q=(256, 256), up=(256, 1024), bias=(1024,), scale=(256,))
TREES = {"leaf": LEAF, "tree": TREE}
N = 512 * 1024
# Before jax 0.10 the CPU backend fuses less: arrays of a leaf's size are written in between.
NEW = jax.__version_info__ >= (0, 10)

# name: (bytes accessed per parameter, temporaries / parameters in bytes), on jax >= 0.10 and before.
LIMITS = {
    "memopt.adafactor": ((26, 0.02), (66, 2.1)),
    "memopt.sm3": ((21, 0.02), (29, 1.1)),
    "memopt.sm3 momentum 0.9": ((33, 0.02), (41, 1.1)),
    "agc, sgd momentum 0.9": ((33, 0.02), (57, 2.1)),
}
# ours: (optax's with the same settings, ours / optax's at most). agc reports two scalars more.
PEERS = {
    "memopt.adafactor": ("optax.adafactor", 0.5 if NEW else 0.96),
    "memopt.sm3 momentum 0.9": ("optax.sm3 momentum 0.9", 0.75 if NEW else 0.92),
    "agc, sgd momentum 0.9": ("optax's agc, sgd momentum 0.9", 1.005),
}
SIDES = 4 * (512 + 1024)
STATE = {
    "adamw": 8 * N + 4,
    "memopt.adafactor": SIDES + 4,
    "memopt.sm3": SIDES + 4,
    "memopt.sm3 momentum 0.9": 4 * N + SIDES + 4,
    "agc, sgd momentum 0.9": 4 * N + 8,
    "memopt.adafactor momentum int8": N + 2 * (N // 64) + SIDES + 4,
    "memopt.sm3 momentum int8": N + 2 * (N // 64) + SIDES + 4,
}
# ours: the jitted function that updates one leaf.
INNER = {
    "memopt.adafactor": "step",
    "memopt.sm3": "_step",
    "memopt.sm3 momentum 0.9": "_step",
    "agc, sgd momentum 0.9": "_clip_leaf",
}


@functools.cache
def cost_of(name: str, tree: str) -> common.Cost:
    tx, params = common.optimizers()[name], TREES[tree]
    return common.cost(common.compile_step(tx, params), tx, params)


def update_jaxpr(name: str, params: dict) -> _jaxpr.Jaxpr:
    tx = common.optimizers()[name]
    return jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params).jaxpr


def equations(jaxpr: _jaxpr.Jaxpr) -> int:
    """Equations of the program with every inner program counted where it is called."""
    return sum(1 + sum(map(equations, _jaxpr.sub_jaxprs(eqn))) for eqn in jaxpr.eqns)


@pytest.mark.parametrize("tree", ["leaf", "tree"])
@pytest.mark.parametrize("name", LIMITS)
def test_bytes_accessed_and_temporaries(name, tree):
    accessed, temp = LIMITS[name][0 if NEW else 1]
    found = cost_of(name, tree)
    assert 12 <= found.accessed <= accessed
    assert found.temp <= temp * 4 * common.count(TREES[tree])


@pytest.mark.parametrize("name", PEERS)
def test_no_more_traffic_than_optax(name):
    peer, ratio = PEERS[name]
    assert cost_of(name, "leaf").accessed <= ratio * cost_of(peer, "leaf").accessed


@pytest.mark.parametrize("name", STATE)
def test_state_bytes(name):
    tx = common.optimizers()[name]
    assert state_bytes(tx, LEAF) == STATE[name]
    assert sum(x.nbytes for x in jax.tree.leaves(tx.init(common.draw(LEAF)))) == STATE[name]


@pytest.mark.parametrize("name", INNER)
def test_program_grows_by_a_constant_per_equal_leaf(name):
    def programs(n):
        return update_jaxpr(name, common.shapes(**{f"w{i}": (256, 256) for i in range(n)}))

    # From two leaves on: what is done once over all leaves needs less for a single one.
    outer = [len(programs(n).eqns) for n in (2, 3, 4, 10)]
    total = [equations(programs(n)) for n in (2, 3, 4, 10)]
    for two, three, four, ten in (outer, total):
        assert three - two == four - three > 0
        assert ten == two + 8 * (three - two)


@pytest.mark.parametrize("name", INNER)
def test_equal_leaves_share_one_trace(name):
    params = common.shapes(**{f"w{i}": (256, 256) for i in range(5)}, b0=(96,), b1=(96,))
    calls = [e for e in update_jaxpr(name, params).eqns if e.params.get("name") == INNER[name]]
    assert len(calls) == len(params)
    traces = {id(e.params["jaxpr"]): e.invars[0].aval.shape for e in calls}
    assert sorted(traces.values()) == [(96,), (256, 256)]


@pytest.mark.parametrize("name", grouping.makers())
def test_stacking_equal_leaves_is_the_same_step(name):
    make = grouping.makers()[name]
    params = common.draw(common.shapes(a=(128, 256), b=(128, 256), c=(128, 256), d=(64,), e=(64,)))
    one, other = make(), grouping.stacked(make)
    updates, _ = jax.jit(one.update)(params, one.init(params), params)
    stacked, _ = jax.jit(other.update)(params, other.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(stacked)
    for u, s in zip(jax.tree.leaves(updates), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_allclose(u, s, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(u))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extended_batch_norm_moves_fewer_bytes_than_batch_norm(dtype):
    found = {name: blocks.norm_bytes(make, dtype) for name, make in blocks.norms(64).items()}
    for theirs in ("BatchNorm", "BatchNorm, fast variance"):
        for ours, other in zip(found["ExtendedBatchNorm"], found[theirs], strict=True):
            assert ours <= 0.9 * other
    # Forward: read for the sample (1/16, counted three times), read once, read and write.
    if NEW and dtype == "float32":
        assert found["ExtendedBatchNorm"][0] <= 3.4
