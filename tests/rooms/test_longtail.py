"""Long-tailed losses, weights, data, metrics, sampling: golden arrays, identities, odd inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import longtail

from tests import registry
from tests.reference import longtail as reference

pytestmark = pytest.mark.usefixtures("ours")

COUNTS = [500, 100, 20, 4]
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(6, 4)) * 3
Y = np.array([0, 1, 2, 3, 3, 0])
Q = RNG.dirichlet(np.ones(4), 6)


def close(a, b, rtol):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * np.abs(b).max())


# --- golden arrays -------------------------------------------------------------------------------

CB = functools.partial(longtail.weights.effective_number, beta=0.9999)
SETTINGS = {
    # golden key: (loss of counts, weights of counts, kind)
    "balanced_softmax/mean": (longtail.balanced_softmax, None),
    "vs_la_cdt/vs_g0.3_t1.0_w_none": (lambda n: longtail.vs(n, 0.3, 1.0), None),
    "vs_la_cdt/vs2_g0.15_t1.25_w_none": (lambda n: longtail.vs(n, 0.15, 1.25), None),
    "vs_la_cdt/vs_g0.3_t1.0_w_cb0.9999": (lambda n: longtail.vs(n, 0.3, 1.0), CB),
    "vs_la_cdt/la_g0.0_t1.0_w_none": (lambda n: longtail.logit_adjusted(n, tau=1.0), None),
    "vs_la_cdt/cdt_g0.2_t0.0_w_none": (lambda n: longtail.cdt(n, 0.2), None),
    "vs_la_cdt/bot_cdt_g0.2": (lambda n: longtail.cdt(n, gamma=0.2), None),
    "ldam/m0.5_s30_w_none": (longtail.ldam, None),
    "ldam/m0.5_s30_w_drw0.9999": (longtail.ldam, CB),
    "focal/softmax_gamma0.5_w_none": (lambda n: longtail.focal(0.5), None),
    "focal/softmax_gamma1.0_w_none": (lambda n: longtail.focal(1.0), None),
    "focal/softmax_gamma2.0_w_none": (lambda n: longtail.focal(2.0), None),
    "ce_weighted/ce": (lambda n: longtail.cross_entropy(), None),
    "ce_weighted/cbce_beta0.999": (
        lambda n: longtail.cross_entropy(),
        functools.partial(longtail.weights.effective_number, beta=0.999),
    ),
    "ce_weighted/csce_gamma1.0": (
        lambda n: longtail.cross_entropy(),
        lambda n: longtail.weights.inverse_frequency(n, 1.0),
    ),
}


def of_case(arrays, key, case):
    file, setting = key.split("/")
    logits = arrays[f"ldam/{case}__cos_logits" if file == "ldam" else f"shared/{case}__logits"]
    fields = {
        field: arrays.get(f"{file}/{case}__{setting}__{field}")
        for field in ("loss", "grad", "loss64", "grad64", "per_example64")
    }
    return logits, arrays[f"shared/{case}__labels"], arrays[f"shared/{case}__counts"], fields


def evaluate(key, logits, labels, counts):
    make, weights_of = SETTINGS[key]
    n = counts.astype(logits.dtype)

    @jax.jit
    def run(z, n):
        w = None if weights_of is None else weights_of(n)[labels]

        def total(z):
            per_example = make(n)(z, labels)
            return longtail.reduce_loss(per_example, w, "weighted_mean"), per_example

        (loss, per_example), grad = jax.value_and_grad(total, has_aux=True)(z)
        return loss, grad, per_example if w is None else per_example * w

    return run(logits, n)


@pytest.mark.parametrize("key", SETTINGS)
def test_golden_float64(key, golden, x64):
    arrays, _ = golden("longtail")
    # csce weights were built in float32 by the reference
    rtol = 1e-6 if "csce" in key else 2e-13
    for case in "ab":
        logits, labels, counts, want = of_case(arrays, key, case)
        if want["loss64"] is None:  # 100 classes for one setting of each kind only
            continue
        loss, grad, per_example = evaluate(key, logits.astype(np.float64), labels, counts)
        close(loss, want["loss64"], rtol)
        close(grad, want["grad64"], rtol)
        # the reference's weights may have another scale, which cancels in the weighted mean
        if "csce" not in key:
            close(per_example, want["per_example64"], rtol)


@pytest.mark.parametrize("key", ["balanced_softmax/mean", "ldam/m0.5_s30_w_drw0.9999"])
def test_golden_float32(key, golden):
    logits, labels, counts, want = of_case(golden("longtail")[0], key, "a")
    loss, grad, _ = evaluate(key, logits, labels.astype(np.int32), counts)
    assert loss.dtype == grad.dtype == jnp.float32
    close(loss, want["loss"], 5e-7)
    close(grad, want["grad"], 2e-6)


def test_golden_tensorflow(golden):
    arrays, _ = golden("longtail")
    z, y, n = (arrays[f"shared/a__{name}"] for name in ("logits", "labels", "counts"))
    y = y.astype(np.int32)
    file = "tf_logit_adjustment_cb/a__"
    for tau in (0.5, 1.0, 2.0):

        def total(z, tau=tau):
            return longtail.reduce_loss(longtail.logit_adjusted(n, tau)(z, y), kind="mean")

        loss, grad = jax.jit(jax.value_and_grad(total))(z)
        close(loss, arrays[f"{file}la_tau{tau}__loss"], 1e-6)
        close(grad, arrays[f"{file}la_tau{tau}__grad"], 5e-6)
        adjusted = jax.jit(longtail.posthoc.adjust)(z, n, tau)
        close(adjusted, arrays[f"{file}posthoc_tau{tau}__logits"], 1e-6)
        np.testing.assert_array_equal(adjusted.argmax(-1), arrays[f"{file}posthoc_tau{tau}__pred"])
    for beta in (0.99, 0.9999):

        def balanced(z, beta=beta):
            return longtail.reduce_loss(longtail.class_balanced(n, beta)(z, y))

        loss, grad = jax.jit(jax.value_and_grad(balanced))(z)
        close(loss, arrays[f"{file}cb_softmax_beta{beta}_gamma0.0__loss"], 1e-6)
        close(grad, arrays[f"{file}cb_softmax_beta{beta}_gamma0.0__grad"], 5e-6)
        close(
            longtail.weights.effective_number(n, beta),
            arrays[f"{file}cb_beta{beta}__weights"],
            5e-7,
        )


def test_golden_weights_and_class_probabilities(golden):
    arrays, _ = golden("longtail")
    n = arrays["weights_schedules/cifar10_lt100__counts"]
    file = "weights_schedules/cifar10_lt100__"
    close(longtail.weights.effective_number(n, 0.9999), arrays[f"{file}reweight_0.9999__w"], 5e-7)
    close(longtail.weights.inverse_frequency(n), arrays[f"{file}ib_reweight__w"], 5e-7)
    n = arrays["samplers/a__counts"]
    for power, name in ((1, "instance"), (0, "balanced"), (0.5, "square_root")):
        want = arrays[f"samplers/a__bagoftricks_class_prob__{name}"]
        close(longtail.sampling.class_probabilities(n, power), want, 1e-6)
    want = arrays["samplers/a__bbn_reverse_class_prob__prob"]
    close(longtail.sampling.class_probabilities(n, -1.0), want, 1e-6)


def test_golden_counts(golden):
    arrays, meta = golden("longtail")
    profiles = {"exp": longtail.data.exponential_counts, "step": longtail.data.step_counts}
    seen = 0
    for key, want in arrays.items():
        if not key.startswith("counts/") or not key.endswith("__n"):
            continue
        case, setting, _ = key.removeprefix("counts/").split("__")
        kind, factor = setting.split("_")
        n_max = {"cifar10": 5000, "cifar100": 500}.get(case) or meta["n_max"][case]
        got = profiles[kind](n_max, len(want), 1 / float(factor))
        np.testing.assert_array_equal(got, want)
        seen += 1
    assert seen >= 20


@pytest.mark.parametrize("case", ["s0", "s1"])
def test_golden_selection_is_byte_exact(case, golden):
    arrays, _ = golden("longtail")
    labels, counts, want = (
        arrays[f"counts/select__{case}__{name}"] for name in ("labels", "cls_num", "selected_index")
    )
    got = longtail.data.longtail_indices(labels, counts, seed=0)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_metrics(case, golden):
    arrays, _ = golden("longtail")
    names = ("counts", "labels", "preds", "confidence")
    counts, labels, predictions, confidence = (arrays[f"metrics/{case}__{n}"] for n in names)
    state = longtail.metrics.init(len(counts))
    for half in (slice(0, 60), slice(60, None)):  # two updates
        state = jax.jit(longtail.metrics.update_predictions)(
            state, predictions[half], confidence[half], labels[half]
        )
    for many, few in ((100, 20), (200, 50)):
        got = jax.jit(longtail.metrics.summary)(state, counts, many=many, few=few)
        file = f"metrics/{case}__shot_{many}_{few}__"
        close(got["per_class"], arrays[f"{file}cls"], 1e-6)
        for ours, theirs in (("many", "many"), ("medium", "median"), ("few", "low")):
            value = float(got[ours])
            # the reference gives an empty group 0
            assert np.nan_to_num(value) == pytest.approx(float(arrays[file + theirs]), abs=1e-6)
    assert float(got["accuracy"]) == pytest.approx(float(arrays[f"metrics/{case}__overall"]))
    want = float(arrays[f"metrics/{case}__ece_15__expected_calibration_error"])
    assert float(got["ece"]) == pytest.approx(want, abs=1e-6)
    np.testing.assert_array_equal(state.bin_count, arrays[f"metrics/{case}__ece_15__counts"])


# --- the algebra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_any_composition_equals_the_float64_reference(soft, x64):
    w, margins = reference.effective_number(COUNTS, 0.99), np.array([0.1, 0.2, 0.4, 0.5])
    loss = longtail.softmax_loss(
        longtail.margin(margins),
        longtail.scale(3.0),
        longtail.temper(COUNTS, 0.2),
        longtail.add_log_prior(COUNTS, 0.7),
        weights=w,
        focal_gamma=1.5,
    )
    of = reference.soft_loss if soft else reference.hard_loss
    want = of(
        Z,
        Q if soft else Y,
        counts=COUNTS,
        gamma=0.2,
        tau=0.7,
        margins=margins,
        s=3.0,
        w=w,
        focal=1.5,
    )
    close(jax.jit(loss)(Z, Q if soft else Y), want, 1e-13)


def test_transforms_apply_left_to_right(x64):
    prior = longtail.add_log_prior(COUNTS, 1.0)
    before = longtail.softmax_loss(longtail.scale(2.0), prior)
    after = longtail.softmax_loss(prior, longtail.scale(2.0))
    log_prior = np.log(np.array(COUNTS) / sum(COUNTS))
    plain = longtail.cross_entropy()
    close(before(Z, Y), plain(2 * Z + log_prior, Y), 1e-13)
    close(after(Z, Y), plain(2 * (Z + log_prior), Y), 1e-13)


def test_identities(x64):
    bs = longtail.balanced_softmax(COUNTS)(Z, Y)
    close(longtail.vs(COUNTS, 0.0, 1.0)(Z, Y), bs, 1e-14)
    close(longtail.logit_adjusted(COUNTS, 1.0)(Z, Y), bs, 1e-14)
    plain = longtail.cross_entropy()(Z, Y)
    for same in (
        longtail.logit_adjusted(COUNTS, 0.0),
        longtail.vs(COUNTS, 0.0, 0.0),
        longtail.cdt(COUNTS, 0.0),
        longtail.focal(0.0),
        longtail.class_balanced(COUNTS, 0.0),
        longtail.ldam(COUNTS, 0.0, 1.0),
        longtail.weighted([1, 1, 1, 1]),
    ):
        close(same(Z, Y), plain, 1e-14)
    # training with the prior and predicting raw = training plain and adjusting
    close(longtail.posthoc.adjust(Z, COUNTS, 0.0), Z, 1e-15)
    adjusted = longtail.posthoc.adjust(Z, COUNTS, 1.0)
    close(longtail.logit_adjusted(COUNTS)(adjusted, Y), plain, 1e-13)


@pytest.mark.parametrize("name", registry.LOSSES)
def test_every_loss_of_the_registry(name, x64):
    make = registry.LOSSES[name]
    loss = jax.jit(lambda n, z, y: make(n)(z, y))
    n = np.array(COUNTS, np.float64)
    per_example = loss(n, Z, Y)
    assert per_example.shape == Y.shape and np.all(per_example >= 0)
    # the same for any leading shape, for one-hot labels, and for permuted classes
    close(loss(n, Z.reshape(3, 2, 4), Y.reshape(3, 2)).ravel(), per_example, 1e-14)
    close(loss(n, Z[0], np.asarray(Y[0])), per_example[0], 1e-14)
    close(loss(n, Z, np.eye(4)[Y]), per_example, 1e-13)
    order = np.array([2, 0, 3, 1])
    close(loss(n[order], Z[:, order], np.argsort(order)[Y]), per_example, 1e-13)
    # balanced counts: plain cross entropy (LDAM keeps its one margin)
    level = loss(np.full(4, 7.0), Z, Y)
    if name == "longtail.ldam":
        plain = longtail.softmax_loss(longtail.margin(0.5))(Z, Y)
    elif name == "longtail.focal":
        plain = longtail.focal(1.0)(Z, Y)
    else:
        plain = longtail.cross_entropy()(Z, Y)
    close(level, plain, 1e-13)


def test_a_loss_is_linear_in_a_soft_label(x64):
    loss = longtail.softmax_loss(longtail.margin([0.5, 0.1, 0.2, 1.0]), focal_gamma=2.0)
    mixed = 0.3 * np.eye(4)[Y] + 0.7 * np.eye(4)[Y[::-1]]
    close(loss(Z, mixed), 0.3 * loss(Z, Y) + 0.7 * loss(Z, Y[::-1]), 1e-13)


def test_new_counts_and_tau_need_no_new_trace():
    traces = []

    @jax.jit
    def step(loss, counts, z, y):
        traces.append(None)
        return loss(z, y) + longtail.vs(counts, 0.2, 1.0)(z, y)

    z, y = Z.astype(np.float32), Y.astype(np.int32)
    outs = [
        step(longtail.logit_adjusted(np.array(n), tau), np.array(n), z, y)
        for n, tau in (([5, 3, 2, 1], 1.0), ([1, 2, 3, 5], 0.5))
    ]
    assert len(traces) == 1
    assert not np.allclose(outs[0], outs[1])


def test_tau_is_differentiable_and_vmappable(x64):
    @jax.jit
    def mean(tau):
        return longtail.vs(COUNTS, 0.2 * tau, tau)(Z, Y).mean()

    taus = np.array([0.0, 0.5, 1.3])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(mean)))(taus)
    numeric = [(mean(t + 1e-6) - mean(t - 1e-6)) / 2e-6 for t in taus]
    close(values, [mean(t) for t in taus], 1e-14)
    close(slopes, numeric, 1e-8)
    losses = jax.vmap(lambda loss: loss(Z, Y))(
        jax.vmap(lambda t: longtail.logit_adjusted(COUNTS, t))(taus)
    )
    close(losses[1], longtail.logit_adjusted(COUNTS, 0.5)(Z, Y), 1e-14)


def test_low_precision_logits_are_summed_in_float32():
    z = jnp.asarray(Z, jnp.bfloat16)
    y = Y.astype(np.int32)
    loss = longtail.balanced_softmax(COUNTS)
    out, grad = jax.jit(jax.value_and_grad(lambda z: loss(z, y).sum()))(z)
    assert out.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    wide = jax.jit(lambda z: loss(z.astype(jnp.float32), y))(z)
    np.testing.assert_array_equal(jax.jit(loss)(z, y), wide)
    assert longtail.posthoc.adjust(z, COUNTS).dtype == jnp.float32


@pytest.mark.devices
def test_batches_sharded_over_devices_give_the_same():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    z = np.tile(Z.astype(np.float32), (4, 1))
    y = np.tile(Y.astype(np.int32), 4)
    loss = longtail.balanced_softmax(COUNTS)
    run = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).mean()))
    value, grad = run(jax.device_put(z, sharding), jax.device_put(y, sharding))
    assert grad.sharding.is_equivalent_to(sharding, 2)
    close(value, run(z, y)[0], 1e-6)
    close(grad, run(z, y)[1], 1e-6)


# --- odd inputs ----------------------------------------------------------------------------------


def test_masked_examples_cost_nothing_whatever_they_hold():
    z, y = Z.astype(np.float32), Y.astype(np.int32)
    bad_z, bad_y = z.copy(), y.copy()
    bad_z[2], bad_y[2], bad_y[4] = np.nan, 255, -1
    where = np.array([True, True, False, True, False, True])
    loss = longtail.softmax_loss(longtail.add_log_prior(COUNTS), focal_gamma=0.5)
    value, grad = jax.jit(jax.value_and_grad(lambda z: loss(z, bad_y, where=where).sum()))(bad_z)
    want, kept = jax.jit(jax.value_and_grad(lambda z: loss(z, y[where]).sum()))(z[where])
    close(value, want, 1e-6)
    want_grad = np.zeros_like(z)
    want_grad[where] = kept
    close(grad, want_grad, 1e-6)
    soft = jax.jit(loss)(bad_z, np.eye(4, dtype=np.float32)[y], where=where)
    close(soft, np.where(where, jax.jit(loss)(z, y), 0), 1e-6)


def test_a_label_outside_the_classes_costs_nothing_in_jit_and_raises_outside():
    z, y = Z.astype(np.float32), np.array([0, 4, -1, 3, 3, 0])
    loss = longtail.cross_entropy()
    value, grad = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).sum()))(z, y)
    inside = np.array([0, 3, 4, 5])
    assert float(value) == pytest.approx(float(loss(z[inside], y[inside]).sum()), rel=1e-6)
    assert not np.any(grad[1:3]) and np.all(np.any(np.asarray(grad)[inside], axis=1))
    with pytest.raises(ValueError, match="labels.*4 where the logits have 4"):
        loss(z, y)
    where = np.array([True, False, False, True, True, True])
    assert np.asarray(loss(z, y, where=where))[1:3].tolist() == [0, 0]
    with pytest.raises(ValueError, match="labels.*-1"):
        loss(z, jnp.asarray(y), where=np.arange(6) != 1)


@pytest.mark.parametrize("name", registry.LOSSES)
def test_a_class_without_examples_is_finite(name):
    counts = np.array([50, 0, 20, 4])
    z, y = Z.astype(np.float32), Y.astype(np.int32)

    @jax.jit
    def run(n, z):
        return jax.value_and_grad(lambda z: registry.LOSSES[name](n)(z, y).sum())(z)

    for n in (counts, np.zeros(4, np.int64)):
        for x in jax.tree.leaves(run(n, z)):
            assert np.all(np.isfinite(x))


def test_a_class_without_examples_is_out_of_the_softmax(x64):
    counts = np.array([50, 0, 20, 4])
    present = counts > 0
    y = np.array([0, 2, 1, 0, 2, 1])  # among the three classes that are present
    want = longtail.balanced_softmax(counts[present])(Z[:, present], y)
    got = longtail.balanced_softmax(counts)(Z, np.flatnonzero(present)[y])
    close(got, want, 1e-10)
    assert not np.any(longtail.posthoc.adjust(Z, counts).argmax(-1) == 1)
    for w in (
        longtail.weights.effective_number(counts),
        longtail.weights.inverse_frequency(counts),
    ):
        assert w[1] == 0 and float(w.sum()) == pytest.approx(4, rel=1e-6)
    assert np.all(np.asarray(longtail.weights.effective_number([0, 0])) == 0)
    # no example anywhere: no prior, so plain cross entropy
    close(longtail.balanced_softmax([0] * 4)(Z, Y), longtail.cross_entropy()(Z, Y), 1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_have_finite_losses_and_gradients(gamma):
    z = np.array([[1e4, -1e4, 0, 0], [-np.inf, 3, 0, -np.inf], [80, 0, 0, 0]], np.float32)
    loss = longtail.softmax_loss(focal_gamma=gamma)
    for labels in (np.array([0, 1, 0]), np.array([1, 2, 3]), np.full((3, 4), 0.25, np.float32)):
        offered = np.isfinite(z).all(-1) if labels.ndim == 2 else np.ones(3, bool)

        @jax.jit
        def total(z, labels=labels, offered=offered):
            return jnp.sum(jnp.where(offered, loss(z, labels), 0))

        value, grad = jax.jit(jax.value_and_grad(total))(z)
        assert np.isfinite(value) and np.all(np.isfinite(grad))
    # 1 - p_y is kept where p_y rounds to 1: -log p = log1p(3 e^-80)
    assert float(jax.jit(loss)(z, np.array([0, 1, 0]))[2]) == pytest.approx(
        (3 * np.exp(-80.0)) ** (1 + gamma), rel=1e-3, abs=1e-37
    )


def test_one_class_costs_nothing():
    z = np.ones((2, 1), np.float32)
    loss = longtail.focal(0.5)
    value, grad = jax.jit(jax.value_and_grad(lambda z: loss(z, np.array([0, 0])).sum()))(z)
    assert value == 0 and np.all(np.asarray(grad) == 0)


def test_static_mistakes_raise_and_name_the_argument():
    loss = longtail.balanced_softmax(COUNTS)
    with pytest.raises(ValueError, match="counts"):
        loss(np.zeros((2, 3), np.float32), np.array([0, 1]))
    with pytest.raises(Exception, match="counts"):
        longtail.balanced_softmax(np.ones((2, 2)))
    with pytest.raises(ValueError, match="weights"):
        longtail.weighted([1.0, 2.0])(np.zeros((2, 3), np.float32), np.array([0, 1]))
    with pytest.raises(ValueError, match="counts"):
        longtail.posthoc.adjust(np.zeros((2, 3), np.float32), COUNTS)
    with pytest.raises(Exception, match="kind"):
        longtail.reduce_loss(np.zeros(3, np.float32), None, "median")
    with pytest.raises(ValueError, match="beta"):
        longtail.weights.effective_number(COUNTS, 1.0)
    with pytest.raises(ValueError, match="imbalance"):
        longtail.data.exponential_counts(100, 10, 0.01)
    with pytest.raises(ValueError, match="class 1"):
        longtail.data.longtail_indices([0, 0, 1], [2, 2], seed=0)
    with pytest.raises(ValueError, match="num_classes"):
        longtail.class_counts([0, 1], 0)
    with pytest.raises(ValueError, match="labels"):
        longtail.class_counts([0.5, 1.0], 2)
    with pytest.raises(ValueError, match=r"init\(3\)"):
        longtail.metrics.update(
            longtail.metrics.init(4), np.zeros((2, 3), np.float32), np.array([0, 1])
        )
    with pytest.raises(ValueError, match="counts"):
        longtail.metrics.summary(longtail.metrics.init(3), COUNTS)
    with pytest.raises(ValueError, match="labels"):
        longtail.sampling.table(np.array([0, 5]), longtail.sampling.class_probabilities(COUNTS))


def test_labels_that_do_not_fit_the_logits_raise():
    z = jnp.zeros((2, 3))
    for labels in (
        jnp.zeros((3,), int),
        jnp.zeros((2,)),
        jnp.zeros((2, 4)),
        jnp.zeros((2, 3), int),
    ):
        with pytest.raises(Exception, match="labels"):
            longtail.cross_entropy()(z, labels)


# --- reduce, counts, data ------------------------------------------------------------------------


def test_reduce():
    losses, w = jnp.array([1.0, 3.0, 5.0]), jnp.array([1.0, 0.0, 3.0])
    assert float(longtail.reduce_loss(losses)) == 3
    assert float(longtail.reduce_loss(losses, w)) == pytest.approx(16 / 3)
    assert float(longtail.reduce_loss(losses, w, "weighted_mean")) == 4
    assert float(longtail.reduce_loss(losses, w, "sum")) == 16
    assert float(longtail.reduce_loss(losses, jnp.array([True, True, False]), "weighted_mean")) == 2
    for kind in ("mean", "weighted_mean", "sum"):
        assert float(longtail.reduce_loss(jnp.zeros(0), None, kind)) == 0
        assert float(longtail.reduce_loss(jnp.array([jnp.nan]), jnp.array([0.0]), kind)) == 0
    assert longtail.reduce_loss(losses.astype(jnp.bfloat16)).dtype == jnp.float32


def test_class_counts_on_host_and_device():
    labels = np.array([[0, 2, 2], [7, -1, 1]])
    want = [1, 1, 2, 0]
    host = longtail.class_counts(labels, 4)
    assert isinstance(host, np.ndarray) and host.tolist() == want
    device = jax.jit(longtail.class_counts, static_argnums=1)(labels, 4)
    assert device.tolist() == want and device.dtype == jnp.int32
    assert longtail.class_counts([], 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    "profile", ["exponential_counts", "step_counts", "pareto_counts"], ids=lambda p: p[:4]
)
def test_profiles_fall_from_n_max_to_n_min(profile):
    make = getattr(longtail.data, profile)
    for num_classes in (1, 2, 5, 100):
        n = make(1280, num_classes, 256)
        assert len(n) == num_classes and n.dtype == np.int64
        assert np.all(np.diff(n) <= 0)
        if num_classes > 1:
            assert (n[0], n[-1]) == (1280, 5)
    assert make(30, 4, 100)[-1] == 1  # never an empty class
    assert make(np.int64(30), np.int64(4), 1).tolist() == [30] * 4


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_count_what_they_should():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]]))
    logits = np.concatenate([logits, np.full((1, 3), np.nan), logits[:2]]).astype(np.float32)
    labels = np.array([0, 1, 2, 1, 2, -1, 0])  # row 4 is no number, row 5 no class
    where = np.array([True] * 6 + [False])
    update = jax.jit(longtail.metrics.update)
    state = update(longtail.metrics.init(3), logits, labels, where)
    assert state.confusion.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    summary = jax.jit(longtail.metrics.summary)(state, np.array([200, 50, 3]))
    assert summary["per_class"].tolist() == [1, 0.5, 0.5]
    assert float(summary["accuracy"]) == pytest.approx(3 / 5)
    assert float(summary["balanced_accuracy"]) == pytest.approx(2 / 3)
    assert [float(summary[k]) for k in ("many", "medium", "few")] == [1, 0.5, 0.5]
    # calibration: four examples with a confidence, each alone in its bin but none
    assert float(summary["ece"]) == pytest.approx((0.3 + 0.6 + 0.2 + 0.6) / 4, abs=1e-6)
    twice = jax.tree.map(jnp.add, state, state)
    again = update(state, logits, labels, where)
    np.testing.assert_array_equal(twice.confusion, again.confusion)
    restored = jax.tree.map(np.asarray, state)  # what a checkpoint gives back
    np.testing.assert_array_equal(
        update(restored, logits, labels, where).confusion, again.confusion
    )


def test_metrics_before_the_first_update_are_nan():
    summary = longtail.metrics.summary(longtail.metrics.init(3), [3, 2, 1])
    assert all(np.all(np.isnan(value)) for value in summary.values())


def test_thirds_by_rank():
    state = longtail.metrics.update_predictions(
        longtail.metrics.init(10),
        np.arange(10),
        np.full(10, 0.5, np.float32),
        np.where(np.arange(10) < 7, np.arange(10), 0),
    )
    counts = np.array([50, 50, 50, 40, 40, 40, 40, 30, 20, 10])
    got = longtail.metrics.summary(state, counts, split="rank")
    assert [float(got[k]) for k in ("many", "medium")] == [pytest.approx((0.25 + 2) / 3), 1]
    assert np.isnan(got["few"])  # classes 7 to 9 have no test example
    with pytest.raises(Exception, match="split"):
        longtail.metrics.summary(state, counts, split="halves")


# --- sampling ------------------------------------------------------------------------------------


def test_sampling_draws_classes_by_probability_and_examples_uniformly():
    labels = np.repeat([0, 2, 1], [90, 9, 1])
    class_probabilities = jax.jit(longtail.sampling.class_probabilities)
    probabilities = class_probabilities(longtail.class_counts(labels, 4), 0)
    np.testing.assert_allclose(probabilities, [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)
    table = longtail.sampling.table(labels, np.full(4, 0.25, np.float32))  # class 3 is empty
    draw = jax.jit(longtail.sampling.sample_indices, static_argnums=2)
    indices = np.asarray(draw(jax.random.key(0), table, 30_000))
    share = np.bincount(labels[indices], minlength=4) / 30_000
    np.testing.assert_allclose(share, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.012)
    within = np.bincount(indices, minlength=100)[90:99]  # the nine examples of class 2
    np.testing.assert_allclose(within / 10_000, 1 / 9, atol=0.015)
    np.testing.assert_array_equal(indices, draw(jax.random.key(0), table, 30_000))
    assert np.any(indices != draw(jax.random.key(1), table, 30_000))
    empty = longtail.sampling.table(labels, np.array([0, 0, 0, 1], np.float32))
    assert draw(jax.random.key(0), empty, 3).tolist() == [-1] * 3


def test_the_card_runs():
    code = longtail.__doc__.split("Use.\n")[1].split("\n\nSettings")[0]
    exec(compile("\n".join(line[4:] for line in code.splitlines()), "card", "exec"), {})
