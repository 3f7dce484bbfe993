"""What becomes of every integer dtype of labels and counts, of NaN, inf and the largest floats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtricks import longtail
from jaxtricks.longtail import contrib, experts, heads, metrics, mix, posthoc

pytestmark = pytest.mark.usefixtures("ours")

# name -> loss(counts) -> function of (logits [N, C], labels [N]) -> [N]
LOSSES = {
    "cross_entropy": lambda n: longtail.cross_entropy(),
    "weighted": lambda n: longtail.weighted(n),
    "focal": lambda n: longtail.focal(1.0),
    "ldam": lambda n: longtail.ldam(n, s=1.0),
    "balanced_softmax": longtail.balanced_softmax,
    "vs": longtail.vs,
    "cdt": lambda n: longtail.cdt(n, 0.2),
    "smoothing": longtail.label_aware_smoothing,
    "seesaw": longtail.seesaw,
    "lade": longtail.lade,
    "equalization": lambda n: functools.partial(
        longtail.equalization(n, 0.5, 0.1), key=jax.random.key(0)
    ),
    "influence": lambda n: lambda z, y: longtail.influence_balanced()(z, y, features=z[:, :2]),
    "dive": lambda n: lambda z, y: contrib.dive(longtail.balanced_softmax(n))(z, y, teacher=z),
    "bbn": lambda n: lambda z, y: experts.bbn(10)(z, y, y[::-1], step=4),
    "ride": lambda n: lambda z, y: experts.ride(None, n)(jnp.stack([z, z]), y),
    "sade": lambda n: lambda z, y: experts.sade(n)(jnp.stack([z, z, z]), y),
    "equalization_v2": lambda n: lambda z, y: _first(longtail.equalization_v2(len(n)), z, y),
    "online_seesaw": lambda n: lambda z, y: _first(longtail.contrib.online_seesaw(len(n)), z, y),
    "paco": lambda n: (
        lambda z, y: _first(experts.paco(n, 2, queue=4), z, y, features=z[:, :2], keys=z[:, :2])
    ),
}

# name -> function of (logits [N, C], labels [N], counts [C]) -> arrays
OTHERS = {
    "class_counts": lambda z, y, n: longtail.class_counts(y, len(n)),
    "class_mean": lambda z, y, n: _first(longtail.class_mean(len(n), 2), z[:, :2], y),
    "metrics": lambda z, y, n: metrics.update(metrics.init(len(n)), z, y).confusion,
    "centroids": lambda z, y, n: heads.centroids(z[:, :2], y, len(n)).means,
    "fit_tau": posthoc.fit_tau,
    "fit_tau, taus": lambda z, y, n: posthoc.fit_tau(z, y, n, taus=[0.0, 0.5, 1.0, 2.0]),
    "calibrate": posthoc.calibrate,
    "mixup": lambda z, y, n: mix.mixup(jax.random.key(0), z, y, num_classes=len(n)),
    "remix": lambda z, y, n: mix.remix(jax.random.key(0), z, y, n),
    "unimix": lambda z, y, n: mix.unimix(jax.random.key(0), z, y, n),
}


def _first(pair, *args, **kwargs):
    return pair.update(pair.init(), *args, **kwargs)[0]


def _batch(dtype, num_classes):
    """Logits, labels at the edges of what the dtype and the classes have, counts."""
    top = min(jnp.iinfo(dtype).max, num_classes - 1)
    labels = np.array([0, 1, top, top // 2, top - 1, 1], np.int64)
    rng = np.random.default_rng(num_classes)
    counts = np.arange(1, num_classes + 1, dtype=np.float32)
    return rng.normal(size=(6, num_classes)).astype(np.float32), labels, counts


def _every(functions, *args):
    """One program of all of them: the results by name."""
    return jax.jit(lambda *args: {name: f(*args) for name, f in functions.items()})(*args)


def _assert_same(functions, z, labels, dtype):
    want = _every(functions, z, labels.astype(np.int32))
    got = _every(functions, z, jnp.asarray(labels).astype(dtype))
    for name in functions:
        tolerance = 1e-3 if "tau" in name or name == "calibrate" else 1e-6  # searches
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=tolerance, err_msg=name)


MORE = [1, pytest.param(45, marks=pytest.mark.slow)]
_16_BITS = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("int16", "uint16")]


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8", *_16_BITS])
def test_losses_take_every_narrow_integer(dtype, more):
    z, labels, counts = _batch(dtype, jnp.iinfo(dtype).max + more)
    _assert_same({name: make(counts) for name, make in LOSSES.items()}, z, labels, dtype)


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
def test_whatever_takes_labels_takes_every_narrow_integer(dtype, more):
    num_classes = jnp.iinfo(dtype).max + more
    z, labels, counts = _batch(dtype, num_classes)
    functions = {name: functools.partial(_third, f, counts) for name, f in OTHERS.items()}
    _assert_same(functions, z, labels, dtype)
    on_host = longtail.class_counts(np.asarray(jnp.asarray(labels).astype(dtype)), num_classes)
    np.testing.assert_array_equal(on_host, np.bincount(labels, minlength=num_classes))


def _third(function, counts, z, labels):
    return function(z, labels, counts)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_a_label_that_int32_cannot_hold_is_no_class(dtype, x64):
    """2^32 as int32 is 0: the first class."""
    info = jnp.iinfo(dtype)
    labels = np.array([1, info.max, info.min, info.max // 2 + 1, info.max - 1], dtype)
    z = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    counts = np.array([4, 3, 2, 1], np.float32)
    outside = (labels < 0) | (labels >= 4)
    functions = {name: make(counts) for name, make in LOSSES.items()}
    for name, each in _every(functions, z, labels).items():
        if name != "bbn":  # which pairs the labels
            each = np.asarray(each)
            assert np.all(each[outside] == 0) and np.all(each[~outside] > 0), name
    assert longtail.class_counts(jnp.asarray(labels), 4).tolist()[1:] == [1, 0, 0]
    state = metrics.update(metrics.init(4), z, jnp.asarray(labels))
    assert (
        int(state.out_of_range) == outside.sum() and int(state.confusion.sum()) == (~outside).sum()
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_counts_of_every_integer_dtype(dtype):
    """Sums of counts leave the narrow dtypes: 4 x 100 is beyond int8 and uint8."""
    z, y = (
        np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32),
        np.array([0, 1, 2, 3, 0]),
    )
    functions = {name: lambda n, f=f: f(n)(z, y) for name, f in LOSSES.items()}
    functions |= {
        "effective_number": longtail.weights.effective_number,
        "inverse_frequency": longtail.weights.inverse_frequency,
        "class_probabilities": longtail.sampling.class_probabilities,
        "progressive": lambda n: longtail.sampling.progressive(n, 0.5),
        "adjust": lambda n: posthoc.adjust(z, n),
        "shift_prior": lambda n: posthoc.shift_prior(z, n, n[::-1]),
    }
    counts = np.array([100, 90, 100, 110], dtype)
    want, got = (_every(functions, counts.astype(d)) for d in (np.float32, dtype))
    for name in functions:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)


# --- NaN, inf, the largest floats ----------------------------------------------------------------

FLOAT32 = np.finfo(np.float32)
EDGES = [0.0, 1.0, -1.0, 30.0, -90.0, 1e30, -1e30, 1e38, -1e38, 3e38, -3e38]
EDGES += [3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
# Of two classes or more, of gain 1: their float64 references are a line each.
COUNTS = np.array([8.0, 4.0, 2.0, 1.0])


def _cross_entropy(z, y):
    if np.isneginf(z[y]) and np.isfinite(z.max()):
        return np.inf
    return _logsumexp(z - z[y])  # the differences first: 1e30 + log 2 is 1e30


def _logsumexp(z):
    top = z.max()  # NaN where there is one
    return top + np.log(np.exp(z - top).sum())


def _focal(z, y):
    cost = _cross_entropy(z, y)
    return cost * -np.expm1(-cost)  # 1 - p_y


def _smoothing(z, y):
    n = COUNTS
    e = 0.1 + 0.3 * np.sin(np.pi / 2 * (n[y] - n.min()) / (n.max() - n.min()))
    each = np.array([_cross_entropy(z, c) for c in range(len(z))])
    offered = each[~np.isneginf(z)]
    mean = np.mean(offered) if offered.size else np.nan
    # The mean of what float32 cannot hold is beyond it as well.
    mean = np.inf if np.any(offered > FLOAT32.max) else mean
    return (1 - e) * each[y] + e * mean


REFERENCES = {
    "cross_entropy": _cross_entropy,
    "balanced_softmax": lambda z, y: _cross_entropy(z + np.log(COUNTS / COUNTS.sum()), y),
    "focal": _focal,
    "smoothing": _smoothing,
}


def _assert_as_float64(got, want, row, context):
    """Equal but for float32's rounding; inf beyond its range; NaN for a NaN."""
    if np.isnan(want):  # of an inf, too, and where no class is offered
        assert np.isnan(got) if np.any(np.isnan(row)) else not np.isfinite(got), context
    elif want > FLOAT32.max:
        assert got >= 0.999999 * FLOAT32.max, context
    else:
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6, err_msg=str(context))


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(row=st.lists(st.sampled_from(EDGES), min_size=4, max_size=4), label=st.integers(0, 3))
def test_a_loss_of_edges_is_that_of_float64(name, row, label):
    z = np.array([row], np.float32)
    with np.errstate(all="ignore"):
        want = REFERENCES[name](z[0].astype(np.float64), label)
    hard = _JITTED[name](z, np.array([label], np.int32))
    soft = _JITTED[name](z, np.eye(4, dtype=np.float32)[[label]])
    for got in (hard, soft):
        _assert_as_float64(float(got[0]), want, row, (name, row, label))


_JITTED = {name: jax.jit(lambda z, y, name=name: LOSSES[name](COUNTS)(z, y)) for name in REFERENCES}


@pytest.mark.parametrize("num_classes", [4, 5000])
def test_a_number_that_is_none_reaches_the_loss_and_the_gradient(num_classes):
    """Of any column, the label's or another's; of 4096 and more XLA's CPU maximum ignores a NaN."""
    counts = np.arange(1.0, num_classes + 1, dtype=np.float32)
    y = np.array([1, 0, 2], np.int32)
    losses = {n: f(counts) for n, f in LOSSES.items() if num_classes == 4 or n in REFERENCES}
    run = jax.jit(
        lambda z: {n: jax.value_and_grad(lambda z, f=f: f(z, y)[0])(z) for n, f in losses.items()}
    )
    for column in (0, 1, num_classes - 1):
        z = np.zeros((3, num_classes), np.float32)
        z[0, column] = np.nan
        for name, (loss, gradient) in run(z).items():
            assert np.isnan(loss) and np.any(np.isnan(gradient[0])), (name, column)
        z[0, column] = np.inf
        for name, (loss, _) in run(z).items():
            assert name in ("equalization_v2", "paco") or not np.isfinite(loss), (name, column)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "balanced_softmax", "vs", "seesaw"])
def test_large_logits_keep_their_gradients(name):
    """3e38 - 0 is the loss, and 1 and -1 are its derivatives."""
    run = jax.jit(jax.value_and_grad(lambda z: LOSSES[name](COUNTS[:3])(z, np.array([1]))[0]))
    value, gradient = run(np.array([[1e37, 0.0, 0.0]], np.float32))
    assert np.isfinite(value) and value > 1e36
    assert gradient[0, 0] > 0.5 and gradient[0, 1] < -0.5 and np.all(np.isfinite(gradient))


def test_an_ignored_example_is_not_in_the_regulariser_of_lade_inside_jit(x64):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(6, 4)), np.array([0, 255, 2, 3, -1, 1])
    inside = (y >= 0) & (y < 4)
    loss = longtail.lade([8, 4, 2, 1], 0.1, 0.5)
    run = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).sum()))
    value, gradient = run(z, y)
    want, want_gradient = run(z[inside], y[inside])
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient[inside], want_gradient, rtol=1e-12)
    assert not np.any(gradient[~inside])


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3,), (1,), ()])
def test_a_mask_of_another_shape_is_refused_by_name(shape):
    """Broadcast, it would make another loss of them."""
    z, y = np.zeros((2, 3), np.float32), np.array([0, 1])
    where = np.ones(shape, bool)
    for loss in (longtail.cross_entropy(), longtail.seesaw([3, 2, 1]), longtail.lade([3, 2, 1])):
        for call in (loss, jax.jit(loss)):
            with pytest.raises(Exception, match="where"):  # a type check in tests comes first
                call(z, y, where=where)


def test_a_mask_of_integers_counts_what_is_not_zero():
    """As an attention mask is; the type check of tests does not know it, so by the undecorated call."""
    keep = longtail._counts.as_mask(np.array([2, 0, 1]), (3,))
    assert keep.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"`where` has shape \(1,\) where \(3,\)"):
        longtail._counts.as_mask(np.ones(1, bool), (3,))
