"""The networks and hand-placed wrappers that recomputation is measured with."""

import jax
import jax.numpy as jnp
import pytest
from benchmarks import remat_chains as chains
from benchmarks import remat_models, remat_plan, remat_policies, remat_public
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


SMALL = {
    "vit": lambda: remat_public.vit(2, width=16, patches=16, batch=2, heads=2),
    "convnext": lambda: remat_public.convnext(1, width=8, batch=1),
    "griffin": lambda: remat_public.griffin(3, width=16, length=16, batch=2, heads=2, window=4),
    "dit": lambda: remat_public.dit(2, width=16, patches=16, batch=2, heads=2),
    "qwen3": lambda: remat_public.qwen3(2, width=16, length=16, batch=2, heads=4, pairs=2),
}


@pytest.mark.parametrize("name", remat_public.models())
def test_every_gradient_of_a_public_network_is_alive_and_its_names_are_there(name):
    model = SMALL[name]()
    params, batch = model.arrays()
    assert set(params) == {"embed", "blocks", "head"}
    for leaf in jax.tree.leaves(jax.grad(model.loss())(params, batch)):
        assert jnp.isfinite(leaf).all() and jnp.any(leaf != 0)
    program = str(jax.make_jaxpr(model.loss())(params, batch))
    for names in remat_public.NAMES[name].values():
        assert all(f"name={value}" in program for value in names)
    whole = remat_public.models()[name]()
    loss = jax.eval_shape(whole.loss(), *whole.shapes())
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_a_qwen_block_looks_at_no_later_token_and_a_griffin_block_neither():
    for name in ("qwen3", "griffin"):
        model = SMALL[name]()
        params, _ = model.arrays()
        xs = jax.random.normal(jax.random.key(1), (2, 16, 16))
        later = xs.at[:, 9:].add(1.0)
        for block, p in zip(model.blocks, params["blocks"], strict=True):
            before, after = block(p, xs), block(p, later)
            assert jnp.abs(before - after)[:, :9].max() < 1e-5
            assert jnp.abs(before - after)[:, 9:].max() > 1e-3


def test_policies_wrap_the_loss_the_blocks_and_the_segments():
    names = {"save conv": ("conv",)}
    for stacked in (False, True):
        found = remat_policies.policies(remat_models.mlp(4, 8, 4, stacked=stacked), names)
        assert len(found) == 3 * len(remat_policies.SHARED) + 1
        assert "blocks: save conv" in found and "loss: dots_saveable" in found


def test_the_planner_meets_the_bytes_of_every_policy():
    model = remat_models.mlp(9, width=32, batch=256)
    rows = list(remat_policies.rows(model))
    # XLA for CPU undoes jax.checkpoint before jax 0.12: no policy saves a byte there.
    assert rows or jax.__version_info__ < (0, 12)
    assert [row.temp for row in rows] == sorted(row.temp for row in rows)
    for row in rows:
        assert row.planned is not None and row.found <= row.temp and row.error < 1e-5
        assert row.planned < row.extra + 0.05
        assert len(row.cells()) == len(remat_policies.HEADERS)
    assert f"of {len(rows)} rows" in remat_policies.summary({"mlp": rows})


def test_rows_that_lose_and_budgets_that_are_not_met_are_counted():
    row = remat_policies.Row("dots", 2**20, 0.1, 2**20, 0.2, 0.0, 1e-7, 3, 1.0)
    missed = row._replace(found=2**21, planned=None, gap=None, compiles=None)
    assert row.is_worse and missed.is_worse and not row._replace(planned=0.1).is_worse
    assert row.cells()[5] == "+10.0%, worse" and missed.cells()[5] == "infeasible, worse"
    text = remat_policies.summary({"a": [row], "b": [missed, row._replace(planned=0.0)]})
    assert "worse in 2 of 3 rows, by at most 10.0%" in text and "1 of them" in text
