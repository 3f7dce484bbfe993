"""RIDE, SADE, BBN, PaCo and distillation against golden arrays and references; the survey's table."""

import functools
import operator
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxtricks import longtail
from jaxtricks.longtail import contrib, distill, experts, heads

from tests.reference import longtail_experts as reference

pytestmark = pytest.mark.usefixtures("ours")

COUNTS = np.array([500, 100, 20, 4])
RNG = np.random.default_rng(11)
E = RNG.normal(size=(3, 6, 4)) * 2
Y = np.array([0, 1, 2, 3, 3, 0])
R = np.array([3, 3, 2, 1, 0, 2])
Q = RNG.dirichlet(np.ones(4), 6)
T = RNG.normal(size=(6, 4)) * 2


def close(a, b, rtol):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-30))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def arrays():
    from tests import conftest

    with np.load(conftest.GOLDEN / "longtail_experts.npz") as archive:
        return {key: archive[key] for key in archive.files}


def of(key, dtype=None):
    value = arrays()[key]
    return value.astype(np.int32 if value.dtype == np.int64 else dtype or value.dtype)


# --- golden arrays -------------------------------------------------------------------------------


def scaled_ldam(n):
    return longtail.ldam(n, max_margin=0.5 * 30, s=1.0)  # on logits that were scaled by 30 already


def ride_post(n):
    """After epoch 160 the reference divides by the sum of the weights, here `reduce` does."""
    apart = experts.ride(lambda z, y, where: jnp.zeros(z.shape[:-1], z.dtype), n, diversity=-0.45)
    weights = longtail.weights.effective_number(n, 0.9999)

    def loss(z, y):
        own = jnp.sum(jax.vmap(lambda z: scaled_ldam(n)(z, y))(z), axis=0)
        weighted = longtail.reduce_loss(own, weights[y], "weighted_mean")
        return weighted + apart(z, y).mean()

    return loss


GOLDEN = {
    "ride_ce": lambda n: lambda z, y: experts.ride()(z, y).mean(),
    "ride_ldam_pre": lambda n: (
        lambda z, y: experts.ride(scaled_ldam(n), diversity=-0.45)(z, y).mean()
    ),
    "ride_ldam_post": ride_post,
    "sade_tau2": lambda n: lambda z, y: experts.sade(n, compat="reference")(z, y).mean(),
}


def run_golden(name, case, dtype):
    n, z, y = (of(f"experts/{case}__{k}", dtype) for k in ("counts", "experts", "labels"))
    value = jax.jit(lambda n, z: jax.value_and_grad(lambda z: GOLDEN[name](n)(z, y))(z))
    return value(n.astype(dtype), z)


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, "a") for name in GOLDEN), ("ride_ldam_post", "b"), ("sade_tau2", "b")],
)
def test_golden_experts_float64(name, case, x64):
    loss, grad = run_golden(name, case, np.float64)
    rtol = 5e-7 if "ldam" in name else 1e-7 if "sade" in name else 1e-13  # vectors made in float32
    close(loss, of(f"experts/{case}__{name}__loss64"), rtol)
    close(grad, of(f"experts/{case}__{name}__grad64"), rtol)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_experts_float32(name):
    loss, grad = run_golden(name, "a", np.float32)
    assert loss.dtype == grad.dtype == jnp.float32
    close(loss, of(f"experts/a__{name}__loss"), 1e-6)
    close(grad, of(f"experts/a__{name}__grad"), 5e-6)


@pytest.mark.parametrize(("compat", "rtol"), [("reference", 1e-12), (None, 5e-7)])
@pytest.mark.parametrize("bits", ["", "64"])
def test_golden_paco(compat, rtol, bits, request):
    if bits:
        request.getfixturevalue("x64")
    dtype = np.float64 if bits else np.float32
    n, x, y, z = (of(f"paco/a__{k}", dtype) for k in ("counts", "features", "labels", "sup_logits"))
    pair = experts.paco(n, 12, queue=16, temperature=0.05, compat=compat)
    state = jax.tree.unflatten(jax.tree.structure(pair.init()), (x[16:], y[16:]))

    @jax.jit
    def mean(z, f, k, state):
        return pair.update(state, z, y[:8], features=f, keys=k)[0].mean()

    loss, grads = jax.value_and_grad(mean, argnums=(0, 1, 2))(z, x[:8], x[8:16], state)
    rtol = rtol if bits else 5e-6
    close(loss, of(f"paco/a__paco__loss{bits}"), rtol)
    close(grads[0], of(f"paco/a__paco__grad{bits}"), rtol)
    close(np.concatenate(grads[1:]), of(f"paco/a__paco__grad_features{bits}")[:16], rtol)
    if bits and compat is None:  # the epsilons are seen, so both settings are tested
        assert abs(loss - of("paco/a__paco__loss64")) > 1e-9


@pytest.mark.parametrize(("setting", "power"), [("pn0", 1.0), ("pn1", 0.5)])
@pytest.mark.parametrize("bits", ["", "64"])
def test_golden_dive(setting, power, bits, request):
    if bits:
        request.getfixturevalue("x64")
    dtype = np.float64 if bits else np.float32
    names = ("counts", "logits", "teacher_logits", "labels")
    n, z, teacher, y = (of(f"dive_kd/a__{k}", dtype) for k in names)
    loss = contrib.dive(longtail.balanced_softmax(n), power=power)
    value, grad = jax.value_and_grad(lambda z: loss(z, y, teacher=teacher).mean())(z)
    close(value, of(f"dive_kd/a__{setting}_p0.5_T3.0_a0.5__loss{bits}"), 1e-12 if bits else 1e-6)
    close(grad, of(f"dive_kd/a__{setting}_p0.5_T3.0_a0.5__grad{bits}"), 1e-12 if bits else 5e-6)


def test_golden_bbn_schedule():
    epochs = of("weights_schedules/bbn__alpha_max200__epoch")
    shares = jax.vmap(experts.bbn(200).share)(epochs - 1)
    np.testing.assert_allclose(shares, of("weights_schedules/bbn__alpha_max200__l"), atol=1e-6)
    assert np.all(np.asarray(jax.vmap(experts.bbn(200).share)(np.array([200, 300]))) == 0)


# --- references ----------------------------------------------------------------------------------


def test_ride_is_its_equation(x64):
    want = reference.divergence(E, 1.5)
    close(experts.divergence(E, 1.5), want, 1e-12)
    pi = COUNTS / COUNTS.sum()
    v = 4 * pi * 0.2 + 0.8
    t = 1.5 * v / v.max()
    loss = experts.ride(
        longtail.focal(1.0),
        COUNTS.astype(np.float64),
        diversity=-0.3,
        temperature=1.5,
        reweight=0.2,
    )
    own = sum(longtail.focal(1.0)(z, Y) for z in E)
    close(loss(E, Y), own - 0.3 * reference.divergence(E, t), 1e-12)
    same = np.stack([E[0]] * 3)
    assert np.all(np.abs(experts.divergence(same)) < 1e-14)


@pytest.mark.parametrize(
    "counts", [[500, 100, 20, 4], [5, 5, 1, 7], [3, 3, 3, 3], [9, 2, 2, 2]], ids=str
)
def test_sade_is_its_equation(counts, x64):
    n = np.array(counts, np.float64)
    close(experts.sade(n, tau=1.3)(E, Y), reference.sade(E, Y, n, 1.3), 1e-12)
    plain = experts.sade(n, tau=1.3, compat="reference").offsets
    differs = not np.allclose(plain, experts.sade(n, tau=1.3).offsets, atol=1e-6)
    assert differs == (counts == [9, 2, 2, 2])  # where equal counts would get unequal ones


def test_sade_of_balanced_counts_is_cross_entropy(x64):
    want = 3 * longtail.cross_entropy()(E[0], Y)
    close(experts.sade([7.0] * 4)(np.stack([E[0]] * 3), Y), want, 1e-13)


def paco_inputs(rng, queue=5):
    f, k, old = (unit(rng.normal(size=(n, 3))) for n in (6, 6, queue))
    return f, k, old, np.array([0, 3, -1, 1, 3])[:queue]


def test_paco_is_its_equation(x64):
    f, k, old, old_y = paco_inputs(RNG)
    settings = dict(alpha=0.3, beta=0.7, gamma=0.6, temperature=0.4, center_temperature=1.3)
    pair = experts.paco(COUNTS, 3, queue=5, **settings)
    state = jax.tree.unflatten(jax.tree.structure(pair.init()), (old, old_y))
    each, new = pair.update(state, T, Y, features=f, keys=k)
    want = reference.paco(T, Y, f, k, old, old_y, COUNTS, *settings.values())
    close(each, want, 1e-12)
    np.testing.assert_array_equal(new.features, k[:5])
    np.testing.assert_array_equal(new.labels, Y[:5])


def test_paco_without_examples_is_balanced_softmax(x64):
    f, k, *_ = paco_inputs(RNG)
    pair = experts.paco(COUNTS, 3, alpha=0.0, gamma=0.0)
    each, _ = pair.update(pair.init(), T, Y, features=f, keys=k)
    close(each, longtail.balanced_softmax(COUNTS)(T, Y), 1e-12)


def test_paco_keeps_the_newest_keys_and_the_queue_has_no_gradient():
    pair = experts.paco(COUNTS, 3, queue=9)
    state, update = pair.init(), jax.jit(pair.update)
    f, k, *_ = (x.astype(np.float32) for x in paco_inputs(RNG))
    z, y = T.astype(np.float32), Y.astype(np.int32)
    _, state = update(state, z, y, features=f, keys=k)
    assert np.asarray(state.labels).tolist() == [*Y, -1, -1, -1]
    _, state = update(state, z[:2], y[2:4], features=f[:2], keys=-k[:2])
    assert np.asarray(state.labels).tolist() == [2, 3, *Y, -1]
    np.testing.assert_array_equal(state.features[:8], np.concatenate([-k[:2], k]))

    def later(k):
        _, state = pair.update(pair.init(), z, y, features=f, keys=k)
        return pair.update(state, z, y, features=f, keys=f)[0].sum()

    assert not np.any(jax.grad(later)(k))


def test_paco_masks_and_labels_outside():
    pair = experts.paco(COUNTS, 3, queue=8)
    f, k, *_ = (x.astype(np.float32) for x in paco_inputs(RNG))
    z, y = T.astype(np.float32), Y.astype(np.int32)
    keep = np.array([True, True, False, True, False, True])
    bad = [np.where(keep[:, None], x, np.float32(np.nan)) for x in (z, f, k)]

    def total(z, f, k, y, where=None):
        each, state = pair.update(pair.init(), z, y, features=f, keys=k, where=where)
        return each.sum(), (each, state)

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
    got, (each, state) = grads(*bad, np.where(keep, y, 99).astype(np.int32), keep)
    want, (wanted, _) = grads(z[keep], f[keep], k[keep], y[keep])
    close(np.asarray(each)[keep], wanted, 2e-6)
    assert np.all(np.asarray(each)[~keep] == 0)
    for a, b in zip(got, want, strict=True):
        close(np.asarray(a)[keep], b, 5e-6)
        assert np.all(np.asarray(a)[~keep] == 0)
    assert np.asarray(state.labels).tolist() == [0, 1, -1, 3, -1, 0, -1, -1]
    _, (each, outside) = grads(z, f, k, np.where(keep, y, 99).astype(np.int32))
    np.testing.assert_array_equal(np.asarray(each) == 0, ~keep)
    close(np.asarray(each)[keep], wanted, 2e-6)
    np.testing.assert_array_equal(outside.labels, state.labels)


@pytest.mark.devices
def test_paco_fills_one_queue_from_all_devices():
    rng = np.random.default_rng(3)
    f, k = (unit(rng.normal(size=(16, 3))).astype(np.float32) for _ in range(2))
    z, y = rng.normal(size=(16, 4)).astype(np.float32), rng.integers(0, 4, 16).astype(np.int32)
    split, whole = PartitionSpec("data"), PartitionSpec()
    pair = experts.paco(COUNTS, 3, queue=20, axis_name="data")
    update = jax.jit(
        jax.shard_map(
            lambda s, z, y, f, k: pair.update(s, z, y, features=f, keys=k),
            mesh=Mesh(np.array(jax.devices()), ("data",)),
            in_specs=(whole, split, split, split, split),
            out_specs=(split, whole),
        )
    )
    each, state = update(pair.init(), z, y, f, k)
    _, want = experts.paco(COUNTS, 3, queue=20).update(pair.init(), z, y, features=f, keys=k)
    np.testing.assert_array_equal(state.features, want.features)
    np.testing.assert_array_equal(state.labels, want.labels)
    assert np.all(np.isfinite(each)) and each.shape == (16,)


def test_kd_and_dive_are_their_equation(x64):
    want = reference.kd(E[0], T, 2.0, 0.6)
    close(distill.kd(E[0], T, 2.0, 0.6), want, 1e-12)
    loss = contrib.dive(longtail.focal(1.0), alpha=0.3, temperature=2.0, power=0.6)
    close(loss(E[0], Y, teacher=T), 0.3 * want + 0.7 * longtail.focal(1.0)(E[0], Y), 1e-12)
    grad = jax.grad(lambda t: loss(E[0], Y, teacher=t).sum())(jnp.asarray(T))
    assert not np.any(grad)
    assert np.all(np.abs(distill.kd(T, T, 2.0)) < 1e-14)


def test_bbn_mixes_features_and_losses(x64):
    branch, plain = experts.bbn(10, longtail.focal(1.0)), longtail.focal(1.0)
    a = 1 - 0.4**2
    close(branch(T, Y, R, step=4), a * plain(T, Y) + (1 - a) * plain(T, R), 1e-6)
    close(branch.mix(T, -T, 4), 2 * np.concatenate([a * T, -(1 - a) * T], -1), 1e-6)
    np.testing.assert_array_equal(branch.mix(T, -T), np.concatenate([T, -T], -1))
    low = branch.mix(jnp.asarray(T, jnp.bfloat16), jnp.asarray(T, jnp.bfloat16), 4)
    assert low.dtype == jnp.bfloat16


# --- what holds for each of them -----------------------------------------------------------------

EVERY = {
    "ride": (lambda n: experts.ride(longtail.logit_adjusted(n), n), E, {}),
    "sade": (lambda n: experts.sade(n), E, {}),
    "bbn": (lambda n: experts.bbn(10, longtail.balanced_softmax(n)), T, {"step": 4}),
    "dive": (lambda n: contrib.dive(longtail.balanced_softmax(n)), T, {"teacher": E[0]}),
}
every = pytest.mark.parametrize("name", EVERY)


def call(name, n, z, y, **kwargs):
    loss, _, extra = EVERY[name]
    extra = {k: v.astype(z.dtype) if isinstance(v, np.ndarray) else v for k, v in extra.items()}
    labels = (
        y,
        y[..., ::-1] if y.ndim == z.ndim - (name in ("ride", "sade")) else R.reshape(y.shape),
    )
    labels = labels if name == "bbn" else labels[:1]
    return loss(n)(z, *(x.astype(y.dtype) for x in labels), **{**extra, **kwargs})


@every
def test_soft_labels_shapes_and_the_order_of_classes(name, x64):
    n, z = COUNTS.astype(np.float64), EVERY[name][1]
    each = jax.jit(call, static_argnums=0)(name, n, z, Y)
    assert each.shape == Y.shape
    close(call(name, n, z, Y), each, 1e-13)
    if name != "bbn":
        close(call(name, n, z, np.eye(4)[Y]), each, 1e-13)
        of_class = [call(name, n, z, np.full(6, c)) for c in range(4)]
        close(call(name, n, z, Q), sum(Q[:, c] * of_class[c] for c in range(4)), 1e-12)
        order = np.array([2, 0, 3, 1])
        extra = {"teacher": E[0][:, order]} if name == "dive" else {}
        close(call(name, n[order], z[..., order], np.argsort(order)[Y], **extra), each, 1e-12)
    extra = {"teacher": E[0].reshape(2, 3, 4)} if name == "dive" else {}
    wide = z.reshape(*z.shape[:-2], 2, 3, 4)
    close(call(name, n, wide, Y.reshape(2, 3), **extra).ravel(), each, 1e-13)


@every
def test_masked_examples_cost_nothing_whatever_they_hold(name):
    z, y = EVERY[name][1].astype(np.float32), Y.astype(np.int32)
    keep = np.array([True, True, False, True, False, True])
    bad = np.where(keep[:, None], z, np.float32(np.nan))

    @jax.jit
    def total(z, y):
        def summed(z):
            each = call(name, COUNTS, z, y, where=keep)
            return each.sum(), each

        return jax.grad(summed, has_aux=True)(z)

    want_grad, want = total(z, y)
    grad, each = total(bad, np.where(keep, y, 77).astype(np.int32))
    assert np.all(np.asarray(each)[~keep] == 0) and np.all(np.asarray(grad)[..., ~keep, :] == 0)
    close(each, want, 1e-6)
    close(grad, want_grad, 1e-6)
    close(np.asarray(want)[keep], np.asarray(call(name, COUNTS, z, y))[keep], 1e-6)


@every
@pytest.mark.parametrize("counts", [[50, 0, 20, 4], [0, 0, 0, 0], [7, 7, 7, 7]], ids=str)
def test_odd_counts_and_logits_are_finite(name, counts):
    total = jax.jit(
        lambda n, z: jax.value_and_grad(lambda z: call(name, n, z, Y.astype(np.int32)).sum())(z)
    )
    z = EVERY[name][1]
    hidden = z.copy()
    hidden[..., 1] = -np.inf
    for labels in (Y, R):  # bbn has both: the examples whose label is 1
        at = np.flatnonzero(labels == 1)
        hidden[..., at, :] = z[..., at, :]
    for logits in (z, z * 1e4, np.zeros_like(z), hidden):
        value, grad = total(np.array(counts), logits.astype(np.float32))
        assert np.isfinite(value) and np.all(np.isfinite(grad))


@every
def test_new_counts_need_no_new_trace_and_half_precision_is_widened(name):
    traces = []

    @jax.jit
    def step(loss, z, y):
        traces.append(None)
        extra = {"step": 4} if name == "bbn" else {}
        extra |= {"teacher": z} if name == "dive" else {}
        return loss(z, *([y, y] if name == "bbn" else [y]), **extra)

    z, y = EVERY[name][1].astype(np.float32), Y.astype(np.int32)
    a, b = (step(EVERY[name][0](n), z, y) for n in (COUNTS, COUNTS[::-1].copy()))
    assert len(traces) == 1 and not np.allclose(a, b)
    low = step(EVERY[name][0](COUNTS), jnp.asarray(z, jnp.bfloat16), y)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, a, rtol=0.05, atol=0.1)


@every
def test_gradients(name, x64):
    from jax.test_util import check_grads

    n, z = COUNTS.astype(np.float64), EVERY[name][1]
    if (
        name == "ride"
    ):  # its mean is held constant: the gradient is that of the equation with it fixed
        mean = z.mean(0)

        def fixed(z):
            t = experts.ride(None, n).temperature[None]
            p = jax.nn.log_softmax(mean / t, -1)
            q = jax.nn.log_softmax(z / t[None], -1)
            apart = t.mean() ** 2 * jnp.sum(jnp.exp(p)[None] * (p[None] - q), (0, 2))
            return sum(longtail.logit_adjusted(n)(x, Y) for x in z) - 0.2 * apart

        want = jax.grad(lambda z: fixed(z).sum())(jnp.asarray(z))
        close(jax.grad(lambda z: call(name, n, z, Y).sum())(jnp.asarray(z)), want, 1e-12)
    else:
        check_grads(lambda z: call(name, n, z, Y), (z,), 1, modes=["rev"])


# --- prediction ----------------------------------------------------------------------------------


def test_experts_are_vmapped_heads():
    x, kernels = RNG.normal(size=(6, 5)), RNG.normal(size=(3, 5, 4))
    z = jax.vmap(heads.normed, in_axes=(None, 0))(x.astype("f4"), kernels.astype("f4"))
    assert z.shape == (3, 6, 4)
    close(experts.aggregate(z), np.mean(z, 0), 1e-6)
    w = np.array([0.2, 0.0, 0.8], np.float32)
    broken = z.at[1].set(jnp.nan)
    close(experts.aggregate(broken, w), 0.2 * z[0] + 0.8 * z[2], 1e-6)
    with pytest.raises(Exception, match="weights"):  # jaxtyping sees it first, where it is on
        experts.aggregate(z, w[:2])


def views(rng, noise):
    """Two views whose logits agree as well as `noise` allows, by expert."""
    truth = 4 * np.eye(4)[rng.integers(0, 4, 200)]
    make = lambda: np.stack([truth + s * rng.normal(size=truth.shape) for s in noise])
    return make(), make()


def test_weights_go_to_the_stable_expert_and_raise_the_agreement(x64):
    first, second = views(np.random.default_rng(0), (6.0, 1.0, 6.0))
    weights = jax.jit(experts.fit_weights)(first, second)
    assert np.argmax(weights) == 1 and weights[1] > 0.6 and np.min(weights) >= 0.05
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-12)
    even = np.full(3, 1 / 3)
    before, after = (experts.agreement(w, first, second).mean() for w in (even, weights))
    assert after > before + 0.03
    z = np.einsum("e,enc->nc", even, first), np.einsum("e,enc->nc", even, second)
    p, q = (np.stack([reference.softmax(row) for row in x]) for x in z)
    want = np.sum(p * q, -1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(q, axis=-1)
    close(experts.agreement(even, first, second), want, 1e-12)


def test_weights_do_not_see_masked_examples_and_stop_at_the_least(x64):
    first, second = views(np.random.default_rng(1), (6.0, 1.0, 6.0))
    keep = np.arange(200) % 4 > 0
    bad = [np.where(keep[None, :, None], z, np.nan) for z in (first, second)]
    want = experts.fit_weights(first[:, keep], second[:, keep])
    close(experts.fit_weights(*bad, where=keep), want, 1e-9)
    held = experts.fit_weights(first, second, least=0.25)
    assert 0.25 <= np.min(held) < 0.27
    even = experts.fit_weights(first, second, where=np.zeros(200, bool))
    np.testing.assert_allclose(even, 1 / 3, rtol=1e-12)


def test_errors():
    z, y = E.astype(np.float32), Y.astype(np.int32)
    with pytest.raises(ValueError, match="`logits` have shape"):
        experts.sade(COUNTS)(z[:2], y)
    with pytest.raises(ValueError, match="`logits` have shape"):
        experts.sade(COUNTS[:3])(z, y)
    with pytest.raises(ValueError, match="paco needs `num_features` and `queue` >= 1"):
        experts.paco(COUNTS, 0)
    f = np.eye(6, 3, dtype=np.float32)
    with pytest.raises(ValueError, match="`counts` has 3 classes"):
        pair = experts.paco(COUNTS[:3], 3)
        pair.update(pair.init(), z[0], y, features=f, keys=f)
    with pytest.raises(Exception, match="`keys` has shape|keys"):
        pair = experts.paco(COUNTS, 3)
        pair.update(pair.init(), z[0], y, features=f, keys=f[:3])
    with pytest.raises(ValueError, match="`features` has shape"):
        pair = experts.paco(COUNTS, 4)
        pair.update(pair.init(), z[0], y, features=f, keys=f)


# --- the survey's table --------------------------------------------------------------------------


SURVEY = pathlib.Path(__file__).parents[2] / "docs" / "longtail_survey.md"


def survey_rows():
    """The cells of every method's row: (method, venue, marks, what it does, names here, left out)."""
    lines = SURVEY.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]


def test_what_the_table_says_is_here_is_here():
    rows = survey_rows()
    assert len({row[0] for row in rows}) == len(rows)
    for method, venue, marks, what, here, left_out in rows:
        assert method and venue and what and (here or left_out)
        assert marks and set(marks) <= set("SCLTARD2E")
        for name in here.split(", ") if here else ():
            assert callable(operator.attrgetter(name.strip("`"))(longtail)), name
    assert sum(venue != "beyond" for _, venue, *_ in rows) == 66


def test_every_loss_is_in_the_table():
    named = {name.strip("`") for row in survey_rows() for name in row[4].split(", ")}
    plain = {"cross_entropy", "softmax_loss", "weighted", "logit_adjusted"}
    losses = plain | {"focal", "class_balanced", "ldam", "balanced_softmax", "vs", "cdt", "seesaw"}
    losses |= {"lade", "equalization", "influence_balanced", "label_aware_smoothing"}
    losses |= {"equalization_v2", "contrib.online_seesaw", "experts.ride", "experts.sade"}
    losses |= {"experts.bbn", "experts.paco", "contrib.dive"}
    assert losses - named <= {"cross_entropy", "softmax_loss"}
