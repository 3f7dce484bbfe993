"""Second stages on the parameters of any model; tau, temperature and prior fitted on held-out data."""

import warnings

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import _tree, longtail
from jaxtricks.longtail import decoupling, heads, posthoc

from tests.reference import posthoc as reference

RNG = np.random.default_rng(3)
COUNTS = np.array([500, 100, 20, 4])
F4 = np.float32
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


def close(a, b, rtol):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * np.abs(b).max())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tree():
    """A model's parameters with a list, a branch that has a kernel and a bias, and a head."""
    draw = np.random.default_rng(0).normal
    return {
        "trunk": {0: {"kernel": draw(size=(3, 5)).astype(F4)}, 1: {"scale": np.ones(5, F4)}},
        "head": {"kernel": draw(size=(5, 4)).astype(F4), "bias": draw(size=4).astype(F4)},
        "shared": None,
    }


def trained(mask):
    return [path for path, leaf in _tree.leaves_with_paths(mask) if leaf is True]


# --- where the head is ---------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["head", "head/kernel", "he.d", ".*ead", "head/.*"])
def test_a_head_is_found_by_its_layer_or_its_kernel(head):
    mask = decoupling.head_mask(tree(), head=head)
    assert trained(mask) == ["head/bias", "head/kernel"]
    assert jax.tree.structure(mask) == jax.tree.structure(tree())


@pytest.mark.parametrize(
    ("params", "head", "message"),
    [
        (tree(), "classifier", r"matches no kernel.*'trunk/0/kernel', 'head/kernel'|'head/kernel'"),
        (tree(), "ead", "matches no kernel"),
        (tree(), "head/bias", r"not \[D, C\]"),
        (tree(), "trunk|head", "matches 2 kernels"),
        ({"head": {"kernel": np.ones((2, 3, 4), F4)}}, "head", r"\(2, 3, 4\), not \[D, C\]"),
        ({}, "head", "matches no kernel"),
        (
            {"head": [{"kernel": np.ones((2, 3), F4)}]},
            "head",
            "not a nested dict at 'head/0/kernel'",
        ),
    ],
)
def test_a_head_that_is_not_there_raises_and_names_the_paths(params, head, message):
    for call in (
        lambda: decoupling.crt(params, head=head, key=jax.random.key(0)),
        lambda: decoupling.lws(params, head=head),
        lambda: decoupling.tau_norm(params, 1.0, head=head),
        lambda: decoupling.disalign(params, head=head),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_parameter_of_the_users_own_name_and_a_model_that_is_a_head():
    params = {"W": np.ones((2, 3), F4), "other": {"kernel": np.ones((2, 2), F4)}}
    assert trained(decoupling.head_mask(params, head="W")) == ["W"]
    fresh, mask = decoupling.crt(
        {"kernel": np.ones((2, 3), F4), "bias": np.ones(3, F4)},
        head="kernel",
        key=jax.random.key(0),
    )
    assert trained(mask) == ["bias", "kernel"] and np.all(np.asarray(fresh["bias"]) == 0)


# --- what the stages do --------------------------------------------------------------------------


def test_crt_draws_the_head_anew_and_keeps_the_rest():
    params = tree()
    fresh, mask = decoupling.crt(params, head="head", key=jax.random.key(1))
    assert trained(mask) == ["head/bias", "head/kernel"]
    same(fresh["trunk"], params["trunk"])
    same(params, tree())  # nothing in place
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    assert np.all(np.asarray(fresh["head"]["bias"]) == 0)
    assert np.all(fresh["head"]["kernel"] != params["head"]["kernel"])
    again, _ = decoupling.crt(params, head="head", key=jax.random.key(1))
    same(fresh, again)
    wide = {"head": {"kernel": jnp.zeros((4000, 3), jnp.bfloat16)}}
    drawn = decoupling.crt(wide, head="head", key=jax.random.key(0))[0]["head"]["kernel"]
    assert drawn.dtype == jnp.bfloat16
    assert float(jnp.std(drawn.astype(F4))) == pytest.approx(4000**-0.5, rel=0.03)
    one = decoupling.crt(params, head="head", key=jax.random.key(0), init=jax.nn.initializers.ones)[
        0
    ]
    assert np.all(np.asarray(one["head"]["kernel"]) == 1)


def test_lws_and_its_folding():
    params = tree()
    scaled, mask = decoupling.lws(params, head="head")
    assert trained(mask) == ["head/scale"]
    same({**scaled["head"]}, {**params["head"], "scale": np.ones(4, F4)})
    same(decoupling.fold_lws(scaled, head="head"), params)
    f = np.array([0.5, 1.0, -2.0, 3.0], F4)
    scaled["head"]["scale"] = f
    x = RNG.normal(size=(6, 5)).astype(F4)
    folded = jax.jit(lambda p: decoupling.fold_lws(p, head="head"))(scaled)["head"]
    want = heads.lws(x @ params["head"]["kernel"] + params["head"]["bias"][None], f)
    close(x @ folded["kernel"] + folded["bias"][None], want, 1e-6)
    grad = jax.grad(
        lambda f: decoupling.fold_lws({"head": {**params["head"], "scale": f}}, head="head")[
            "head"
        ]["kernel"].sum()
    )(f)
    close(grad, params["head"]["kernel"].sum(0), 1e-6)
    with pytest.raises(ValueError, match="'scale' beside 'head/kernel' already"):
        decoupling.lws(scaled, head="head")
    with pytest.raises(ValueError, match="no scale beside 'head/kernel'"):
        decoupling.fold_lws(params, head="head")


def test_tau_norm(golden):
    arrays, _ = golden("longtail_more")
    w, x, b = (arrays[f"heads/a__{name}"] for name in ("W", "x", "b"))
    params = {"fc": {"kernel": w.T.copy(), "bias": b}}
    run = jax.jit(
        lambda p, tau, compat: decoupling.tau_norm(p, tau, head="fc", compat=compat)["fc"],
        static_argnums=2,
    )
    for tau in (0.0, 0.5, 0.7, 1.0, 2.0):
        new = run(params, tau, "reference")  # which drops the bias
        close(new["kernel"], arrays[f"heads/a__tau_norm_{tau}__W"].T, 2e-6)
        logits = x @ new["kernel"] + new["bias"][None]
        close(logits, arrays[f"heads/a__tau_norm_{tau}__logits"], 2e-6)
        kept = run(params, tau, None)
        np.testing.assert_array_equal(kept["bias"], b)
        np.testing.assert_array_equal(kept["kernel"], new["kernel"])
    close(run(params, 0.0, None)["kernel"], w.T, 1e-7)
    sweep = jax.vmap(lambda tau: run(params, tau, None)["kernel"])(jnp.array([0.0, 1.0]))
    close(jnp.linalg.norm(sweep[1], axis=0), np.ones(10), 1e-6)
    low = decoupling.tau_norm(
        jax.tree.map(lambda a: jnp.asarray(a, "bfloat16"), params), 1, head="fc"
    )
    assert low["fc"]["kernel"].dtype == low["fc"]["bias"].dtype == jnp.bfloat16
    with pytest.raises(Exception, match="compat"):
        decoupling.tau_norm(params, 1.0, head="fc", compat="paper")


def test_ncm_is_a_linear_head(x64):
    params = jax.tree.map(np.float64, tree())
    x, y = RNG.normal(size=(40, 5)), RNG.integers(0, 3, 40)  # no example of class 3
    means = heads.centroids(x, y, 4, "un")
    new = decoupling.ncm(params, means, head="head")["head"]
    got = jax.nn.log_softmax(x @ new["kernel"] + new["bias"][None])
    want = jax.nn.log_softmax(heads.ncm(x, means))
    close(got[:, :3], want[:, :3], 1e-12)
    assert np.all(np.isneginf(got[:, 3]))
    with pytest.raises(ValueError, match="centroids"):
        decoupling.ncm(params, heads.centroids(x, y, 4, "cl2n"), head="head")
    with pytest.raises(ValueError, match="centroids"):
        decoupling.ncm(params, heads.centroids(x, y, 3, "un"), head="head")
    with pytest.raises(ValueError, match="bias"):
        decoupling.ncm({"head": {"kernel": np.ones((5, 4))}}, means, head="head")


def test_disalign_starts_from_the_trained_model_or_as_the_reference():
    params = tree()
    plain = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    x = RNG.normal(size=(6, 5)).astype(F4)
    z = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    for compat in (None, "reference"):
        new, mask = decoupling.disalign(params, head="head", compat=compat)
        model = jt.nnx.DisAlignHead(5, 4, rngs=nnx.Rngs(0))
        apply, like, state = jt.nnx.functional(model)
        assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, new["head"])
        y, _ = apply(new["head"], state, x, train=False)
        sigma = 1 / (1 + np.exp(-0.1 * x.sum(-1, keepdims=True)))
        close(y, z if compat is None else (1 + sigma) * z, 1e-6)
        assert [path.split("/")[-1] for path in trained(mask)] == [
            "confidence_bias",
            "confidence_kernel",
            "logit_bias",
            "logit_scale",
        ]
    with pytest.raises(ValueError, match="already"):
        decoupling.disalign(new, head="head")
    with pytest.raises(Exception, match="compat"):
        decoupling.disalign(params, head="head", compat="paper")
    assert plain.kernel.shape == (5, 4)


class Net(nn.Module):
    """A linen model whose head is a plain Dense layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(5)(x)))


def nets():
    model = nnx.Sequential(
        nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.relu, jt.nnx.LWSHead(5, 4, rngs=nnx.Rngs(1))
    )
    apply, params, state = jt.nnx.functional(model)
    yield lambda p, x: apply(p, state, x, train=True)[0], params, ".*/2"
    net = Net()
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    yield lambda p, x: net.apply({"params": p}, x), params, "Dense_1"


def test_only_what_the_mask_says_trains_and_the_loss_falls():
    x, y = RNG.normal(size=(32, 3)).astype(F4), RNG.integers(0, 4, 32)
    loss_of = longtail.cross_entropy()
    for apply, params, head in nets():
        stages = [decoupling.crt(params, head=head, key=jax.random.key(2))]
        if head == "Dense_1":
            stages.append(decoupling.lws(params, head=head))
        for start, mask in stages:
            tx = optax.partition({True: optax.adam(0.05), False: optax.set_to_zero()}, mask)
            fold = "scale" in start.get(head, {})

            def loss(p, fold=fold, head=head, apply=apply):
                p = decoupling.fold_lws(p, head=head) if fold else p
                return loss_of(apply(p, x), y).mean()

            @jax.jit
            def step(p, s, loss=loss, tx=tx):
                value, grads = jax.value_and_grad(loss)(p)
                updates, s = tx.update(grads, s, p)
                return optax.apply_updates(p, updates), s, value

            p, s, losses = start, tx.init(start), []
            for _ in range(20):
                p, s, value = step(p, s)
                losses.append(float(value))
            assert losses[-1] < losses[0]
            moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, p)
            assert moved == mask


# --- tau, temperature and prior ------------------------------------------------------------------


def held_out(seed, n=400, sharp=2.0, prior=None):
    """Logits of a model that knows the training prior and is `sharp` times too sure, and labels."""
    draw = np.random.default_rng(seed)
    pi = COUNTS / COUNTS.sum()
    y = draw.choice(4, n, p=np.full(4, 0.25) if prior is None else prior)
    means = np.eye(4) * 2
    x = means[y] + draw.normal(size=(n, 4))
    z = -((x[:, None] - means[None]) ** 2).sum(-1) / 2 + np.log(pi)
    return sharp * z, y


@pytest.mark.parametrize("seed", SEEDS)
def test_calibrate_finds_the_least_balanced_cross_entropy(seed, x64, ours):
    z, y = held_out(seed)
    got = jax.jit(posthoc.calibrate)(z, y, COUNTS)
    tau, temperature = float(got.tau), float(got.temperature)
    assert tau == pytest.approx(1, abs=0.25) and temperature == pytest.approx(2, rel=0.25)
    least = reference.balanced_cross_entropy(z, y, COUNTS, tau, temperature)
    for dt, dT in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (0.1, 0.1), (-0.2, 0.1)):
        assert reference.balanced_cross_entropy(z, y, COUNTS, tau + dt, temperature + dT) > least
    slope = [
        reference.balanced_cross_entropy(z, y, COUNTS, tau + a, 1 / (1 / temperature + b))
        for a, b in ((1e-5, 0), (-1e-5, 0), (0, 1e-5), (0, -1e-5))
    ]
    assert abs(slope[0] - slope[1]) < 1e-11 and abs(slope[2] - slope[3]) < 1e-11
    assert float(jax.jit(posthoc.fit_tau)(z, y, COUNTS)) == pytest.approx(tau * temperature)
    # other orders of classes and examples, leading axes, a scaled prior
    order = np.array([2, 0, 3, 1])
    moved = posthoc.calibrate(
        z[:, order].reshape(20, 20, 4), np.argsort(order)[y].reshape(20, 20), COUNTS[order] * 10
    )
    close(moved, [tau, temperature], 1e-8)
    low = posthoc.calibrate(z.astype(F4), y.astype(np.int32), COUNTS)
    assert low.tau.dtype == jnp.float32
    close(low, [tau, temperature], 2e-3)


def test_calibrate_where_there_is_nothing_to_find(ours):
    z, y = held_out(0)
    z, y = z.astype(F4), y.astype(np.int32)
    fit = jax.jit(posthoc.calibrate)
    level = fit(z, y, np.full(4, 7))
    assert float(level.tau) == 0 and float(level.temperature) > 1
    for nothing in (fit(z, y - 4, COUNTS), fit(z, y, 0 * COUNTS)):
        assert (float(nothing.tau), float(nothing.temperature)) == (0, 1)
    # separable: as sure as is allowed, and finite
    sure = fit(np.eye(4, dtype=F4), np.arange(4, dtype=np.int32), COUNTS)
    assert all(np.isfinite(v) for v in sure) and float(sure.temperature) >= 1e-3 * 0.999
    noise = fit(-z, y, COUNTS)  # the wrong way round: no use of the logits
    assert float(noise.temperature) == pytest.approx(1000, rel=1e-3)
    assert np.isfinite(noise.tau)


def test_a_masked_example_and_a_class_without_examples_do_not_count(x64, ours):
    z, y = held_out(1)
    keep = np.arange(400) % 3 > 0
    bad = np.where(keep[:, None], z, np.nan)
    for fit in (
        lambda z, y, **kw: jnp.stack(posthoc.calibrate(z, y, COUNTS, **kw)),
        lambda z, y, **kw: posthoc.fit_tau(z, y, COUNTS, taus=np.linspace(0, 4, 33), **kw),
    ):
        close(fit(bad, y, where=keep), fit(z[keep], y[keep]), 1e-9)
    wide = np.insert(z, 2, 5.0, axis=1)  # a class that training never saw
    counts, labels = np.insert(COUNTS, 2, 0), np.where(y >= 2, y + 1, y)
    close(posthoc.calibrate(wide, labels, counts), posthoc.calibrate(z, y, COUNTS), 1e-9)
    labels[:7] = 2
    close(posthoc.calibrate(wide, labels, counts), posthoc.calibrate(z[7:], y[7:], COUNTS), 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_tau_on_a_grid_is_the_first_of_the_best(seed, x64, ours):
    z, y = held_out(seed, n=60)
    taus = np.linspace(0, 4, 33)
    scores = [reference.balanced_accuracy(z, y, COUNTS, tau) for tau in taus]
    want = taus[np.flatnonzero(np.isclose(scores, max(scores), atol=1e-9))[0]]
    traces = []

    @jax.jit
    def run(z, y, counts, taus):
        traces.append(None)
        return posthoc.fit_tau(z, y, counts, taus=taus)

    assert float(run(z, y, COUNTS, taus)) == want
    assert float(run(z, y, COUNTS, taus[::-1].copy())) == want
    assert float(run(z, y, COUNTS * 2, taus)) == want
    assert len(traces) == 1
    assert float(posthoc.fit_tau(z, y, COUNTS, taus=[3.0])) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_estimate_prior(seed, x64, ours):
    true = np.array([0.1, 0.2, 0.3, 0.4])
    z, _ = held_out(seed, n=3000, sharp=1.0, prior=true)
    source = COUNTS / 7
    for steps in (1, 3):
        got = jax.jit(posthoc.estimate_prior, static_argnames="max_steps")(
            z, source, max_steps=steps
        )
        close(got, reference.expectation_maximisation(z, COUNTS, steps), 1e-12)
    got = jax.jit(posthoc.estimate_prior)(z, COUNTS, tolerance=1e-9)
    assert float(got.sum()) == pytest.approx(1, abs=1e-14)
    close(got, true, 0.1)
    close(got, reference.expectation_maximisation(z, COUNTS, 300), 1e-6)
    order = np.array([2, 0, 3, 1])
    close(posthoc.estimate_prior(z[:, order], COUNTS[order], tolerance=1e-9), got[order], 1e-7)
    # a model that knows no prior: the same after taking it out of the logits
    level = posthoc.adjust(z, COUNTS)
    close(posthoc.estimate_prior(level, np.ones(4), tolerance=1e-9), got, 1e-5)
    better = posthoc.shift_prior(z, COUNTS, got)
    close(jax.nn.softmax(better).mean(0), got, 1e-6)  # the fixed point


def test_estimate_prior_of_odd_inputs(ours):
    z, _ = held_out(0, n=300, sharp=1.0)
    z = z.astype(F4)
    run = jax.jit(posthoc.estimate_prior)
    wide = np.insert(z, 1, F4(9.0), axis=1)
    got = run(wide, np.insert(COUNTS, 1, 0))
    assert got[1] == 0 and float(got.sum()) == pytest.approx(1, abs=1e-6)
    close(np.delete(got, 1), run(z, COUNTS), 1e-4)
    keep = np.arange(300) < 200
    bad = np.where(keep[:, None], z, F4(np.nan))
    close(run(bad, COUNTS, where=keep), run(z[:200], COUNTS), 1e-4)
    close(run(z, COUNTS, where=np.zeros(300, bool)), COUNTS / COUNTS.sum(), 1e-6)
    assert np.all(np.isfinite(run(z, 0 * COUNTS)))
    assert posthoc.estimate_prior(jnp.asarray(z, "bfloat16"), COUNTS).dtype == jnp.float32
    sure = run(1e4 * z, COUNTS)
    assert np.all(np.isfinite(sure)) and float(sure.sum()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(Exception, match="source"):
        posthoc.estimate_prior(z, COUNTS[:3])
    for fit in (posthoc.fit_tau, posthoc.calibrate):
        with pytest.raises(Exception, match="counts"):
            fit(z, np.zeros(300, np.int32), COUNTS[:3])


# --- kernels -------------------------------------------------------------------------------------


def test_golden_max_norm(golden):
    arrays, meta = golden("longtail_heads")
    w = arrays["heads/a__W"].T
    for tau in (0.5, 1.0):
        close(heads.tau_normalize(w, tau), arrays[f"heads/a__wb_taunorm_{tau}__W"].T, 5e-7)
    for threshold in (0.1, 0.5):
        of = f"heads/a__maxnorm_{threshold}__"
        radius = heads.max_norm_radius(w, threshold)
        close(radius, arrays[f"{of}thresh"], 5e-7)
        got = jax.jit(heads.max_norm)(arrays[f"{of}W_before"].T, radius)
        close(got, arrays[f"{of}W_after"].T, 5e-7)
    assert "weight-balancing" in str(meta["reference"])


def test_max_norm(x64, ours):
    w = RNG.normal(size=(5, 7))
    w[:, 2] = 0
    got = heads.max_norm(w, 1.5)
    close(got, reference.ball(w, 1.5), 1e-14)
    close(heads.max_norm(got, 1.5), got, 1e-14)
    assert np.all(np.asarray(heads.max_norm(w, 0.0)) == 0)
    grad = jax.grad(lambda w: heads.max_norm(w, 1.5).sum())(w)
    assert np.all(np.isfinite(grad))


def test_ldam_warns_where_the_head_is_not_normed():
    z, y = np.array([[3.0, -7.0], [0.5, 0.1]], F4), np.array([0, 1])
    loss = longtail.ldam([90, 10])
    with pytest.warns(UserWarning, match=r"largest \|logit\| is 7.*NormedHead"):
        loss(z, y)
    with pytest.warns(UserWarning, match="nan"):
        heads.check_normed(np.full((1, 2), np.nan, F4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cosines = heads.normed(z, np.eye(2, dtype=F4))
        loss(cosines, y)
        loss(jnp.asarray(cosines, jnp.bfloat16), y)
        loss(z, y, where=np.array([False, True]))
        jax.jit(loss)(z, y)  # traced: nothing to see
        longtail.ldam([90, 10], s=1.0)(z, y)
        heads.check_normed(np.zeros((0, 2), F4))
    # the same loss, eager, jitted and through tree.map
    again = jax.tree.map(lambda a: a, loss)
    close(jax.jit(again)(cosines, y), loss(cosines, y), 1e-6)
    assert type(again) is type(loss)


def test_check_normed_warns_inside_jit():
    @jax.jit
    def step(z, where):
        heads.check_normed(z, where)
        return z.sum()

    keep = np.array([True, False])
    for bad in (3.0, np.nan, -np.inf):
        z = np.array([[0.5, bad], [0.0, 0.0]], F4)
        with pytest.warns(UserWarning, match="not cosines"):
            step(z, keep)
            jax.effects_barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(z[::-1], keep)  # masked
            step(np.clip(np.nan_to_num(z), -1, 1), keep)
            jax.effects_barrier()
