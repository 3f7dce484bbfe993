"""Further losses, heads, mixing, schedules of weights and sampling: golden arrays and odd inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import longtail
from jaxtricks.longtail import heads, mix

pytestmark = pytest.mark.usefixtures("ours")

COUNTS = np.array([500, 100, 20, 4])
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(6, 4)) * 3
Y = np.array([0, 1, 2, 3, 3, 0])
Q = RNG.dirichlet(np.ones(4), 6)
H = RNG.normal(size=(6, 5))
KEY = 0  # of jax.random.key, which must not be made at import


def close(a, b, rtol):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * np.abs(b).max())


# --- golden arrays of the losses -----------------------------------------------------------------

smoothing, ib = longtail.label_aware_smoothing, longtail.influence_balanced
LOSSES = {
    # golden key: (counts -> loss, tolerance in float64); the smoothing was made in float32
    "smoothing/concave_h0.4_t0.1": (smoothing, 5e-8),
    "smoothing/linear_h0.3_t0.0": (lambda n: smoothing(n, 0.3, 0.0, "linear"), 5e-8),
    "smoothing/convex_h0.3_t0.0": (lambda n: smoothing(n, 0.3, 0.0, "convex"), 5e-8),
    "smoothing/exp_h0.4_t0.1": (lambda n: smoothing(n, shape="exp", power=2.0), 5e-8),
    "seesaw/p0.8_q2.0": (longtail.seesaw, 1e-12),
    "seesaw/p0.8_q0.0": (lambda n: longtail.seesaw(n, q=0.0), 1e-12),
    "seesaw/p0.0_q2.0": (lambda n: longtail.seesaw(n, p=0.0), 1e-12),
    "lade/prior_ce": (lambda n: longtail.lade(n, alpha=0.0), 1e-12),
    "lade/total_lambda0.1_alpha0.1": (lambda n: longtail.lade(n, 0.1, 0.1), 1e-12),
    "lade/total_lambda0.01_alpha0.1": (longtail.lade, 1e-12),
    "equalization/softmax_gamma0.9_lambda0.005": (
        lambda n: longtail.equalization(n, 0.9, 0.005),
        1e-12,
    ),
    "equalization/softmax_gamma0.5_lambda0.05": (
        lambda n: longtail.equalization(n, 0.5, 0.05),
        1e-12,
    ),
    "influence/ib_alpha1000_w_none": (lambda n: ib(), 1e-12),
    "influence/ib_alpha10000_w_none": (lambda n: ib(alpha=1e4), 1e-12),
    "influence/ib_alpha1000_w_inv": (lambda n: ib(inverse(n)), 1e-12),
    "influence/ib_alpha10000_w_inv": (lambda n: ib(inverse(n), alpha=1e4), 1e-12),
    "influence/ibfocal_alpha1000_gamma1_w_none": (lambda n: ib(focal_gamma=1.0), 1e-12),
}


def inverse(n):
    return longtail.weights.inverse_frequency(n)


@functools.cache
def more():
    from tests import conftest

    with np.load(conftest.GOLDEN / "longtail_more.npz") as archive:
        return {key: archive[key] for key in archive.files}


def run(key, case, dtype, monkeypatch):
    """Loss, gradient by the logits, per-example losses, and the gradient by the features."""
    arrays, file = more(), key.split("/")[0]
    of = {k: arrays[f"{file}/{case}__{k}"] for k in ("labels", "counts")}
    name = "logits_used" if file == "influence" else "logits"
    z = arrays[f"{file}/{case}__{name}"].astype(dtype)
    h = arrays[f"{file}/{case}__feature_l1"].astype(dtype) if file == "influence" else None
    kwargs = {}
    if file == "equalization":  # the uniforms that the reference drew
        uniform = arrays[f"{file}/{case}__uniform"].astype(dtype)
        monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: uniform < p)
        kwargs["key"] = jax.random.key(KEY)

    @jax.jit
    def evaluate(n, z, h):
        def mean(z, h):
            extra = kwargs if h is None else {"features": h}
            each = LOSSES[key][0](n)(z, of["labels"].astype(np.int32), **extra)
            return each.mean(), each

        grads = jax.value_and_grad(mean, argnums=(0,) if h is None else (0, 1), has_aux=True)
        return grads(z, h)

    (loss, each), grads = evaluate(of["counts"].astype(dtype), z, h)
    return loss, grads, each


def cases():
    for key in LOSSES:
        yield key, "a"
    for file, setting in (
        ("smoothing", "concave_h0.4_t0.1"),
        ("seesaw", "p0.8_q2.0"),
        ("lade", "total_lambda0.01_alpha0.1"),
        ("equalization", "softmax_gamma0.5_lambda0.05"),  # every class is rare
        ("influence", "ib_alpha1000_w_none"),
    ):
        yield f"{file}/{setting}", "b"


@pytest.mark.parametrize(("key", "case"), list(cases()))
def test_golden_float64(key, case, x64, monkeypatch):
    loss, grads, each = run(key, case, np.float64, monkeypatch)
    want = f"{key.split('/')[0]}/{case}__{key.split('/')[1]}__"
    rtol = LOSSES[key][1]
    close(loss, more()[f"{want}loss64"], rtol)
    close(grads[0], more()[f"{want}grad64"], rtol)
    if f"{want}per_example64" in more():
        close(each, more()[f"{want}per_example64"], rtol)
    if f"{want}grad_feature_l164" in more():
        close(grads[1], more()[f"{want}grad_feature_l164"], rtol)


@pytest.mark.parametrize("key", LOSSES)
def test_golden_float32(key, monkeypatch):
    loss, grads, _ = run(key, "a", np.float32, monkeypatch)
    assert loss.dtype == grads[0].dtype == jnp.float32
    want = f"{key.split('/')[0]}/a__{key.split('/')[1]}__"
    close(loss, more()[f"{want}loss"], 2e-6)
    close(grads[0], more()[f"{want}grad"], 2e-6)


def test_golden_smoothing():
    n = more()["smoothing/a__counts"]
    for key in LOSSES:
        if key.startswith("smoothing"):
            setting = key.split("/")[1]
            close(LOSSES[key][0](n).smoothing, more()[f"smoothing/a__{setting}__smooth"], 2e-7)


# --- what holds for each of them -----------------------------------------------------------------

EVERY = {
    "smoothing": (lambda n: smoothing(n), {}),
    "exp": (lambda n: smoothing(n, shape="exp", power=0.5), {}),
    "seesaw": (lambda n: longtail.seesaw(n), {}),
    "lade": (lambda n: longtail.lade(n), {}),
    "equalization": (lambda n: longtail.equalization(n, 0.5, 0.1), {"key": None}),
    "influence": (lambda n: ib(inverse(n), focal_gamma=1.0), {"features": H}),
}
every = pytest.mark.parametrize("name", EVERY)


def extras(name, dtype):
    return {
        k: jax.random.key(KEY) if k == "key" else v.astype(dtype) for k, v in EVERY[name][1].items()
    }


@every
def test_soft_labels_are_the_expectation_and_shapes_are_free(name, x64):
    extra, n = extras(name, np.float64), COUNTS.astype(np.float64)
    loss = jax.jit(lambda n, z, y, **kw: EVERY[name][0](n)(z, y, **kw))
    each = loss(n, Z, Y, **extra)
    assert each.shape == Y.shape
    close(loss(n, Z, np.eye(4)[Y], **extra), each, 1e-13)
    if name != "lade":  # its regulariser is not linear in the batch of labels
        of_class = [loss(n, Z, np.full(6, c), **extra) for c in range(4)]
        close(loss(n, Z, Q, **extra), sum(Q[:, c] * of_class[c] for c in range(4)), 1e-13)
    else:
        assert np.all(np.isfinite(loss(n, Z, Q)))
    if name != "equalization":  # the draws follow the shape
        wide = {k: v.reshape(3, 2, -1) for k, v in extra.items()}
        close(loss(n, Z.reshape(3, 2, 4), Y.reshape(3, 2), **wide).ravel(), each, 1e-13)
        order = np.array([2, 0, 3, 1])
        moved = loss(n[order], Z[:, order], np.argsort(order)[Y], **extra)
        close(moved, each, 1e-12)


@every
def test_masked_examples_cost_nothing_whatever_they_hold(name):
    extra, keep = extras(name, np.float32), np.array([True, True, False, True, False, True])
    z, y, q = Z.astype(np.float32), Y.astype(np.int32), Q.astype(np.float32)
    bad_z, bad_y, bad_q, bad = z.copy(), y.copy(), q.copy(), dict(extra)
    bad_z[2], bad_y[2], bad_y[4], bad_q[2] = np.nan, 255, -1, np.nan
    if "features" in extra:
        bad["features"] = np.where(keep[:, None], extra["features"], np.float32(np.nan))
    loss = EVERY[name][0](COUNTS)

    @jax.jit
    def total(z, y, extra):
        return jax.value_and_grad(
            lambda z: (lambda each: (each.sum(), each))(loss(z, y, where=keep, **extra)),
            has_aux=True,
        )(z)

    for good_labels, bad_labels in ((y, bad_y), (q, bad_q)):
        (_, want), want_grad = total(z, good_labels, extra)
        (_, each), grad = total(bad_z, bad_labels, bad)
        np.testing.assert_array_equal(np.asarray(each)[~keep], 0)
        np.testing.assert_array_equal(np.asarray(grad)[~keep], 0)
        close(each, want, 1e-6)
        close(grad, want_grad, 1e-6)


def test_a_masked_example_is_not_in_the_regulariser_of_lade(x64):
    keep = np.array([True, True, False, True, False, True])
    loss = longtail.lade(COUNTS, 0.1, 0.5)
    close(loss(Z, Y, where=keep)[keep], loss(Z[keep], Y[keep]), 1e-13)
    assert np.all(np.asarray(loss(Z, Y, where=np.zeros(6, bool))) == 0)


@every
@pytest.mark.parametrize("counts", [[50, 0, 20, 4], [0, 0, 0, 0], [7, 7, 7, 7]], ids=str)
def test_odd_counts_and_logits_are_finite(name, counts):
    extra = extras(name, np.float32)
    y = np.array([0, 1, 2, 3, 3, 0], np.int32)

    @jax.jit
    def total(n, z, y):
        return jax.value_and_grad(lambda z: EVERY[name][0](n)(z, y, **extra).sum())(z)

    for z in (Z, Z * 1e4, np.zeros((6, 4))):
        for labels in (y, Q.astype(np.float32)):
            value, grad = total(np.array(counts), z.astype(np.float32), labels)
            assert np.isfinite(value) and np.all(np.isfinite(grad))


@every
def test_a_class_that_is_not_offered_and_a_label_outside(name):
    extra = extras(name, np.float32)
    z = Z.astype(np.float32)
    z[:, 1] = -np.inf
    loss = EVERY[name][0](COUNTS)
    y = np.array([0, 2, 2, 3, 3, 0], np.int32)
    value, grad = jax.jit(jax.value_and_grad(lambda z: loss(z, y, **extra).sum()))(z)
    assert abs(value) < 1e6 and np.all(np.isfinite(grad))
    z, y = Z.astype(np.float32), np.array([0, 4, -1, 3, 3, 0], np.int32)
    value, grad = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y, **extra).sum()))(z, y)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    assert np.asarray(jax.jit(loss)(z, y, **extra))[1:3].tolist() == [0, 0]
    with pytest.raises(ValueError, match="labels"):
        loss(z, y, **extra)


@every
def test_a_loss_is_a_pytree_and_new_counts_need_no_new_trace(name):
    extra, traces = extras(name, np.float32), []

    @jax.jit
    def step(loss, z):
        traces.append(None)
        return loss(z, Y.astype(np.int32), **extra)

    a, b = (step(EVERY[name][0](n), Z.astype(np.float32)) for n in (COUNTS, COUNTS[::-1].copy()))
    assert len(traces) == 1
    assert not np.allclose(a, b)
    low = jax.jit(EVERY[name][0](COUNTS))(jnp.asarray(Z, jnp.bfloat16), Y.astype(np.int32), **extra)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, a, rtol=0.1, atol=0.3)


@every
def test_counts_that_do_not_fit_raise(name):
    with pytest.raises(ValueError, match="counts|weights"):
        EVERY[name][0](COUNTS[:3])(Z.astype(np.float32), Y.astype(np.int32), **extras(name, "f4"))


def test_balanced_counts(x64):
    level, plain = np.full(4, 7.0), longtail.cross_entropy()(Z, Y)
    close(smoothing(level, 0.3, 0.0)(Z, Y), plain, 1e-14)
    log_p = jax.nn.log_softmax(jnp.asarray(Z))
    close(smoothing(level)(Z, Y), 0.9 * plain - 0.1 * log_p.mean(-1), 1e-14)  # the tail's
    close(longtail.seesaw(level, q=0.0)(Z, Y), plain, 1e-14)
    close(longtail.lade(level, alpha=0.0)(Z, Y), plain, 1e-14)
    key = jax.random.key(KEY)
    close(longtail.equalization(level, 0.9, 0.1)(Z, Y, key=key), plain, 1e-14)
    # every class rare and left out: nothing to compare with
    assert np.all(np.abs(longtail.equalization(level, 1.0, 0.9)(Z, Y, key=key)) < 1e-300)


def test_equalization_draws_by_the_key():
    loss = longtail.equalization(COUNTS, 0.5, 0.1)
    z, y = np.zeros((400, 4), np.float32), np.zeros(400, np.int32)
    a, b = (np.asarray(loss(z, y, key=jax.random.key(k))) for k in (0, 1))
    assert np.any(a != b)
    # classes 2 and 3 are rare: log of 4, 3 or 2 classes left, in shares 1/4, 1/2, 1/4
    np.testing.assert_allclose(np.exp(a).mean(), 3, atol=0.15)
    assert set(np.exp(a).round().astype(int)) == {2, 3, 4}


def test_smoothing_of_another_shape_raises():
    with pytest.raises(Exception, match="shape"):
        smoothing(COUNTS, shape="steep")


# --- heads ---------------------------------------------------------------------------------------


def head(name):
    return more()[f"heads/a__{name}"]


def check_head(setting, fn, args, wants, rtol=2e-6):
    out, back = jax.vjp(jax.jit(fn), *args)
    close(out, head(f"{setting}__out"), rtol)
    for grad, want in zip(back(jnp.asarray(head("cot"))), wants, strict=True):
        close(grad, want, rtol)


def test_golden_heads():
    x, w, b = head("x"), head("W").T.copy(), head("b")
    of = "normed_linear__grad_"
    check_head("normed_linear", heads.normed, (x, w), (head(f"{of}x"), head(f"{of}weight_dxC")))
    of = "cosnorm_oltr__grad_"
    check_head("cosnorm_oltr", heads.cosine, (x, w), (head(f"{of}x"), head(f"{of}W").T))
    scales = head("lws_scales")
    check_head(
        "lws",
        lambda x, f: heads.lws(x @ w + b[None], f),
        (x, scales),
        (head("lws__grad_x"), head("lws__grad_scales")),
    )
    v, v0 = head("disalign_conf_W")[0], head("disalign_conf_b")

    def disalign(x, a, c, v, v0):
        return heads.disalign(x @ w + b[None], x @ v + v0, a, c)

    args = (x, head("disalign_scale")[0], head("disalign_bias")[0], v, v0)
    names = ("x", "scale", "bias", "conf_W", "conf_b")
    wants = [head(f"disalign__grad_{n}") for n in names]
    wants[1:4] = [want[0] for want in wants[1:4]]
    check_head("disalign", disalign, args, wants)
    for tau in (0.0, 0.5, 0.7, 1.0, 2.0):
        got = jax.jit(heads.tau_normalize)(w, tau)
        close(got, head(f"tau_norm_{tau}__W").T, 2e-6)
        close(x @ got, head(f"tau_norm_{tau}__logits"), 2e-6)


@pytest.mark.parametrize("alpha", [3.0, 1.5])
def test_golden_tde(alpha):
    x, w, d = head("x"), head("W").T.copy(), head("tde_embed")
    by_w = 0
    for setting, direction in (("train", None), ("tde", d)):
        of = f"causal_{setting}_a{alpha}"
        fn = functools.partial(heads.tde, direction=direction, alpha=alpha)
        check_head(of, lambda x, fn=fn: fn(x, w), (x,), (head(f"{of}__grad_x"),))
        by_w += jax.vjp(lambda w, fn=fn: fn(x, w), w)[1](jnp.asarray(head("cot")))[0]
    # the reference's buffer of this gradient was not cleared between its two calls
    close(by_w, head(f"causal_tde_a{alpha}__grad_W").T, 2e-6)


@pytest.mark.parametrize("kind", ["un", "l2n", "cl2n"])
def test_golden_ncm(kind):
    fit = jax.jit(heads.centroids, static_argnums=(2, 3))
    means = fit(head("ncm_feats"), head("ncm_labels").astype(np.int32), 10, kind)
    close(means.means, head(f"ncm_centroid_{kind}"), 2e-6)
    close(means.center, head("ncm_mean"), 2e-6)
    for metric, name in (("l2", "l2"), ("dot", "cos")):
        got = jax.jit(heads.ncm, static_argnums=2)(head("x"), means, metric)
        close(got, head(f"ncm_{kind}_{name}__logits"), 2e-6)


def test_heads_are_defined_at_zero_and_without_examples():
    x, w = np.zeros((2, 4), np.float32), np.zeros((4, 3), np.float32)
    w[:, 0] = 1
    for fn in (heads.normed, heads.cosine, lambda x, w: heads.tde(x, w, np.zeros(4, np.float32))):
        out, grads = jax.value_and_grad(lambda x, w, fn=fn: fn(x, w).sum(), (0, 1))(x, w)
        assert out == 0 and all(np.all(np.isfinite(g)) for g in grads)
    grad = jax.grad(lambda w: heads.tau_normalize(w, 0.7).sum())(w)
    assert np.all(np.isfinite(grad)) and np.all(np.asarray(heads.tau_normalize(w, 2.0)[:, 1]) == 0)
    features, labels = np.eye(3, 4, dtype=np.float32), np.array([0, 2, 2], np.int32)
    keep = np.array([True, True, False])
    means = heads.centroids(features, labels, 3, "un", where=keep)
    np.testing.assert_array_equal(means.means, [features[0], 0 * features[0], features[1]])
    assert np.isneginf(heads.ncm(features, means)).tolist() == [[False, True, False]] * 3
    with pytest.raises(Exception, match="kind"):
        heads.centroids(features, labels, 3, "l3n")
    with pytest.raises(Exception, match="metric"):
        heads.ncm(features, means, "l1")
    with pytest.raises(ValueError, match="heads"):
        heads.tde(x, w, heads=3)
    with pytest.raises(Exception, match="kernel"):
        heads.normed(x, w[:3])
    with pytest.raises(Exception, match="scales"):
        heads.lws(x, np.ones(3, np.float32))


# --- schedules, prior shift ----------------------------------------------------------------------


def test_golden_deferred():
    n, epochs = more()["drw/cifar10_lt100__counts"], more()["drw/cifar10_lt100__drw__epochs"]
    after = longtail.weights.effective_number(n, 0.9999)
    weights = jax.jit(lambda e: longtail.weights.deferred(e, 160, np.ones(10, np.float32), after))
    for epoch, want in zip(epochs, more()["drw/cifar10_lt100__drw__w"], strict=True):
        close(weights(epoch.astype(np.int32)), want, 1e-6)
    with pytest.raises(ValueError, match="after"):
        longtail.weights.deferred(0, 1, [1.0, 1.0], [1.0])


def test_golden_progressive():
    n, want = more()["samplers/a__counts"], more()["samplers/a__progressive_cls_prob__prob"]
    got = jax.jit(jax.vmap(lambda t: longtail.sampling.progressive(n, t)))
    close(got(np.linspace(0, 1, 10, dtype=np.float32)), want, 1e-6)
    ends = got(np.array([-1.0, 2.0], np.float32))
    close(ends, want[[0, -1]], 1e-6)
    p = longtail.sampling.progressive([90, 0, 10], 0.5)
    assert p[1] == 0 and float(p.sum()) == pytest.approx(1, abs=1e-6)


def test_golden_shift_prior():
    z, n = more()["mix/a__logits"], more()["mix/a__counts"]
    y = more()["mix/a__labels"].astype(np.int32)
    shift = jax.jit(longtail.posthoc.shift_prior)
    inference = more()["mix/a__bayias__inference_dist"].astype(np.float32)
    got = longtail.cross_entropy()(shift(z, inference, n), y)
    close(got, more()["mix/a__bayias__per_example"], 2e-6)


def test_shift_prior(x64):
    shift = longtail.posthoc.shift_prior
    close(shift(shift(Z, COUNTS, [1, 2, 3, 4]), [1, 2, 3, 4], COUNTS), Z, 1e-13)
    # to the uniform prior is the post-hoc adjustment up to a constant, whatever the sum
    uniform = shift(Z, COUNTS, [0.1] * 4) - longtail.posthoc.adjust(Z, COUNTS)
    close(uniform, np.full((6, 4), np.log(0.25)), 1e-13)
    odd = shift(Z, [5, 0, 1, 0], [1, 1, 0, 0])
    assert np.all(np.isfinite(odd)) and np.all(np.asarray(odd.argmax(-1)) == 0)
    with pytest.raises(ValueError, match="target"):
        shift(Z, COUNTS, [1, 1])


# --- mixing --------------------------------------------------------------------------------------


def inject(monkeypatch, lam, partner):
    """Put the draws of the reference in the place of ours."""
    monkeypatch.setattr(jax.random, "beta", lambda *args: jnp.asarray(lam, jnp.float32))
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.asarray(partner))
    monkeypatch.setattr(jax.random, "categorical", lambda *args, **kw: jnp.asarray(partner))


def test_golden_mixup(monkeypatch):
    of = {k: more()[f"mix/a__{k}"] for k in ("images", "labels", "logits", "perm", "lam")}
    inject(monkeypatch, of["lam"], of["perm"])
    x, q = mix.mixup(jax.random.key(KEY), of["images"], of["labels"].astype(np.int32), 10)
    close(x, more()["mix/a__mixup__mixed"], 2e-7)
    loss = longtail.cross_entropy()(of["logits"], q).mean()
    close(loss, more()["mix/a__mixup__loss"], 1e-6)


def test_golden_remix(monkeypatch):
    of = {k: more()[f"mix/a__{k}"] for k in ("images", "labels", "counts", "perm")}
    y, seen = of["labels"].astype(np.int32), 0
    for key, want in more().items():
        if "__remix_l" not in key:
            continue
        lam, kappa, tau = (float(part[1:]) for part in key.split("__")[1].split("_")[1:])
        inject(monkeypatch, lam, of["perm"])
        x, q = mix.remix(jax.random.key(KEY), of["images"], y, of["counts"], kappa=kappa, tau=tau)
        one_hot = np.eye(10)[y]
        close(q, want[:, None] * one_hot + (1 - want[:, None]) * one_hot[of["perm"]], 1e-6)
        images = of["images"]
        close(x, lam * images + (1 - lam) * images[of["perm"]], 1e-6)
        seen += 1
    assert seen == 10


def test_golden_unimix(monkeypatch):
    of = {k: more()[f"mix/a__{k}"] for k in ("images", "labels", "counts", "perm")}
    y, images, seen = of["labels"].astype(np.int32), of["images"], []
    inject(monkeypatch, more()["mix/a__unimix_factor__beta_draws"], of["perm"])

    def draw(key, log_p, shape):
        seen.append(jax.nn.softmax(log_p))
        return jnp.asarray(of["perm"])

    monkeypatch.setattr(jax.random, "categorical", draw)
    for tau in (-1.0, 0.0, 0.5):
        x, q = mix.unimix(jax.random.key(KEY), images, y, of["counts"], tau=tau)
        close(seen[-1], more()[f"mix/a__unimix_prob_tau{tau}__prob"], 1e-6)
    lam = more()["mix/a__unimix_factor__lam"]
    one_hot = np.eye(10)[y]
    close(q, lam[:, None] * one_hot + (1 - lam[:, None]) * one_hot[of["perm"]], 1e-6)
    lam = lam.reshape(-1, 1, 1, 1)
    close(x, lam * images + (1 - lam) * images[of["perm"]], 1e-6)


def test_mixing_under_jit():
    x, y = np.arange(12, dtype=np.float32).reshape(6, 2), Y.astype(np.int32)
    counts = np.array([50, 0, 20, 4])
    for fn in (
        lambda key, n: mix.mixup(key, x, y, 4, 0.4),
        lambda key, n: mix.remix(key, x, y, n),
        lambda key, n: mix.unimix(key, x, y, n),
    ):
        run = jax.jit(fn)
        mixed, q = run(jax.random.key(0), counts)
        assert mixed.shape == x.shape and q.shape == (6, 4)
        close(q.sum(-1), np.ones(6), 1e-6)
        assert np.all(np.asarray(q) >= 0) and mixed.min() >= 0 and mixed.max() <= 11
        np.testing.assert_array_equal(mixed, run(jax.random.key(0), counts)[0])
        assert np.any(mixed != run(jax.random.key(1), counts)[0])
    byte = mix.mixup(jax.random.key(0), x.astype(np.uint8), y, 4)[0]
    assert byte.dtype == jnp.float32
    half = mix.mixup(jax.random.key(0), jnp.asarray(x, jnp.bfloat16), Q.astype(np.float32), 4)
    assert half[0].dtype == jnp.bfloat16 and half[1].dtype == jnp.float32
    # balanced counts: remix is mixup, the same draws
    plain = mix.mixup(jax.random.key(2), x, y, 4)
    close(mix.remix(jax.random.key(2), x, y, np.full(4, 7))[1], plain[1], 1e-7)
    with pytest.raises(ValueError, match="alpha"):
        mix.mixup(jax.random.key(0), x, y, 4, 0.0)
