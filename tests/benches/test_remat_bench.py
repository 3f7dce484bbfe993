"""The networks and hand-placed wrappers that recomputation is measured with."""

import jax
import jax.numpy as jnp
import pytest
from benchmarks import remat_chains as chains
from benchmarks import remat_models, remat_plan
from jaxtricks import remat

WRAP = remat.recompute_grad
UNROLLED = {
    "blocks": chains.each(WRAP),
    "segments": chains.segments(WRAP),
    "segments and blocks": chains.segments(WRAP, chains.each(WRAP)),
    "halves": chains.halves(WRAP),
}
STACKED = {
    "body": chains.scanned(WRAP),
    "two levels": chains.two_level(WRAP, chains.scanned()),
    "two levels and body": chains.two_level(WRAP, chains.scanned(WRAP)),
}


@pytest.fixture(autouse=True)
def _promotion():
    # The networks add biases as users do.
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", [*UNROLLED, *STACKED])
def test_a_way_to_run_the_chain_changes_no_gradient(name):
    stacked = name in STACKED
    model = remat_models.mlp(9, width=8, batch=4, stacked=stacked)
    args = model.arrays()
    chain = (STACKED if stacked else UNROLLED)[name]
    found, plain = (jax.grad(model.loss(c))(*args) for c in (chain, None))
    assert remat_plan.gradient_error(found, plain) < 1e-5


def test_segments_cover_the_chain_in_about_sqrt_n_parts():
    parts = []

    def wrap(fn):
        def run(p, x):
            parts.append(len(p))
            return fn(p, x)

        return run

    out = chains.segments(wrap)([lambda p, x: x + p] * 10, list(range(10)), 0)
    assert out == sum(range(10))
    assert parts == [2, 3, 2, 3]


def test_halves_wrap_all_but_the_last_path():
    widths = []

    def wrap(fn):
        def run(p, x):
            widths.append(len(p))
            return fn(p, x)

        return run

    chains.halves(wrap)([lambda p, x: x] * 8, [0] * 8, 0)
    assert widths == [4, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("name", remat_models.models())
def test_every_network_gives_a_scalar_and_names_its_parts(name):
    model = remat_models.models()[name]()
    loss = jax.eval_shape(model.loss(), *model.shapes())
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    params, _ = model.shapes()
    assert set(params) == {"embed", "blocks", "head"}


def test_recomputation_saves_memory_where_the_table_says_so():
    model = remat_models.mlp(16, width=64, batch=512)
    ways = remat_plan.by_hand(model)
    temp = {
        n: remat.memory_analysis(jax.grad(model.loss(c)), *model.shapes()).temp
        for n, c in ways.items()
    }
    for way in ("sqrt(n) segments", "binary recursion"):
        assert temp[way] < 0.6 * temp["no remat"], way


def test_gradient_error_is_relative_to_the_largest_number_of_the_leaf():
    plain = {"a": jnp.array([4.0, -2.0]), "b": jnp.zeros(2)}
    off = {"a": jnp.array([4.0, -1.0]), "b": jnp.zeros(2)}
    assert remat_plan.gradient_error(off, plain) == 0.25
