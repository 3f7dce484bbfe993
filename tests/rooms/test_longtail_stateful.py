"""Losses and means that remember: golden steps, references, masks, devices and checkpoints."""

import io
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxtricks import longtail
from jaxtricks.longtail import heads

from tests.reference import longtail_experts as reference

pytestmark = pytest.mark.usefixtures("ours")

RNG = np.random.default_rng(5)
STEPS = [(RNG.normal(size=(16, 4)) * 2, RNG.integers(0, 4, 16)) for _ in range(4)]
PAIRS = {
    "equalization_v2": lambda **kw: longtail.equalization_v2(4, **kw),
    "online_seesaw": lambda **kw: longtail.contrib.online_seesaw(4, **kw),
    "class_mean": lambda **kw: longtail.class_mean(4, 4, **kw),
}
every = pytest.mark.parametrize("name", PAIRS)


def close(a, b, rtol):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-30))


def same(a, b, rtol=2e-6):
    jax.tree.map(lambda x, y: close(x, y, rtol), a, b)


def floats(steps=STEPS):
    return [(z.astype(np.float32), y.astype(np.int32)) for z, y in steps]


def run(pair, steps, update=None):
    """The result of the last step, and the state after it."""
    state, result = pair.init(), None
    for z, y in steps:
        result, state = (update or pair.update)(state, z, y)
    return result, state


@pytest.mark.parametrize("bits", ["", "64"])
def test_golden_equalization_v2(bits, golden, request):
    if bits:
        request.getfixturevalue("x64")
    arrays, _ = golden("longtail_experts")
    pair = longtail.equalization_v2(6, background=True)
    state, rtol = pair.init(), 1e-12 if bits else 2e-6

    @jax.jit
    def step(state, z, y):
        def mean(z):
            each, new = pair.update(state, z, y)
            return each.mean(), new

        return jax.value_and_grad(mean, has_aux=True)(z)

    for t in range(4):
        of = f"eqlv2/a__step{t}__"
        z = arrays[f"{of}logits"].astype(np.float64 if bits else np.float32)
        (loss, state), grad = step(state, z, arrays[f"{of}labels"].astype(np.int32))
        close(loss, arrays[f"{of}loss{bits}"], rtol)
        close(grad, arrays[f"{of}grad{bits}"], rtol)
        close(state.positive / (state.negative + 1e-10), arrays[f"{of}pos_neg{bits}"], rtol)
    # The sums of the other steps were stored by reference: all of them are those of the last step.
    close(state.positive, arrays[f"{of}pos_grad{bits}"], rtol)
    close(state.negative, arrays[f"{of}neg_grad{bits}"], rtol)


def test_golden_online_seesaw(golden):
    arrays, _ = golden("longtail_experts")
    pair = longtail.contrib.online_seesaw(10)
    state = pair.init()
    for t in range(3):
        of = f"seesaw/a__stateful_step{t}__"
        z, y = arrays[f"{of}logits"], arrays[f"{of}labels"].astype(np.int32)

        def mean(z, state=state, y=y):
            each, new = pair.update(state, z, y)
            return each.mean(), new

        (loss, state), grad = jax.value_and_grad(mean, has_aux=True)(z)
        close(loss, arrays[f"{of}loss"], 2e-6)
        close(grad, arrays[f"{of}grad"], 5e-6)
        np.testing.assert_array_equal(state.counts, arrays[f"{of}cum_samples"])


@pytest.mark.parametrize("background", [False, True])
def test_equalization_v2_is_its_equation(background, x64):
    steps = [(z, y - (not background)) for z, y in STEPS]
    steps = [(z[y >= 0], y[y >= 0]) for z, y in steps]
    settings = dict(gamma=5.0, mu=0.3, alpha=2.0, background=background)
    num_classes = 4 - background
    pair = longtail.equalization_v2(num_classes, **settings)
    state = pair.init()
    want = reference.equalization_v2(steps, num_classes, **settings)
    for (z, y), (losses, positive, negative) in zip(steps, want, strict=True):
        each, state = pair.update(state, z, y)
        close(each, losses, 1e-13)
        close(state.positive, positive, 1e-13)
        close(state.negative, negative, 1e-13)


def test_online_seesaw_is_its_equation(x64):
    pair = longtail.contrib.online_seesaw(4, p=0.6, q=1.5)
    state = pair.init()
    for (z, y), (losses, counts) in zip(
        STEPS, reference.online_seesaw(STEPS, 4, 0.6, 1.5), strict=True
    ):
        each, state = pair.update(state, z, y)
        close(each, losses, 1e-13)
        np.testing.assert_array_equal(state.counts, counts)


def test_class_mean_is_its_equation_and_gives_tde_its_direction(x64):
    steps = [(x, np.minimum(y, t)) for t, (x, y) in enumerate(STEPS)]  # a new class each step
    pair = longtail.class_mean(4, 4, momentum=0.7)
    state, w = pair.init(), RNG.normal(size=(4, 3))
    assert not np.any(state.means) and not np.any(state.mean) and not np.any(state.present)
    for t, ((x, y), (means, total)) in enumerate(
        zip(steps, reference.class_means(steps, 4, 0.7), strict=True)
    ):
        got, state = pair.update(state, x, y)
        close(got, means, 1e-13)
        close(state.means, means, 1e-13)
        assert np.asarray(state.present).tolist() == [c <= t for c in range(4)]
        close(heads.tde(x, w, state.mean), heads.tde(x, w, total), 1e-12)


def test_a_class_that_is_never_a_positive_is_spared():
    pair = longtail.equalization_v2(2)
    z, y = np.zeros((8, 2), np.float32), np.zeros(8, np.int32)
    each, state = pair.update(pair.init(), z, y)
    np.testing.assert_allclose(each, 2 * np.log(2), rtol=1e-6)
    push = jax.grad(lambda z: pair.update(state, z, y)[0].sum())(z)
    assert np.all(np.abs(np.asarray(push)[:, 1]) < 1e-4)
    assert np.all(np.asarray(push)[:, 0] < -0.4)


# --- what holds for each of them -----------------------------------------------------------------


@every
def test_jit_scan_and_vmap_give_what_eager_steps_give(name):
    pair, steps = PAIRS[name](), floats()
    result, state = run(pair, steps)
    same((result, state), run(pair, steps, jax.jit(pair.update)))
    z, y = (np.stack(x) for x in zip(*steps, strict=True))
    final, results = jax.lax.scan(lambda s, b: pair.update(s, *b)[::-1], pair.init(), (z, y))
    same((results[-1], final), (result, state))
    two = jax.vmap(pair.update)(jax.tree.map(lambda x: jnp.stack([x, x]), state), z[:2], y[:2])
    same(jax.tree.map(lambda x: x[1], two), pair.update(state, z[1], y[1]))


@every
def test_soft_labels_shapes_and_the_order_of_classes(name, x64):
    pair = PAIRS[name]()
    want, state = run(pair, STEPS)
    same(run(pair, [(z, np.eye(4)[y]) for z, y in STEPS]), (want, state), 1e-13)
    shaped, shaped_state = run(pair, [(z.reshape(2, 8, 4), y.reshape(2, 8)) for z, y in STEPS])
    same((np.reshape(shaped, np.shape(want)), shaped_state), (want, state), 1e-13)
    order = np.array([2, 0, 3, 1])
    columns = slice(None) if name == "class_mean" else order
    moved, moved_state = run(pair, [(z[:, columns], np.argsort(order)[y]) for z, y in STEPS])
    if name == "class_mean":
        same((moved, moved_state.sums), (want[order], state.sums[order]), 1e-13)
    else:
        same(moved, want, 1e-13)
        same(jax.tree.leaves(moved_state), [x[order] for x in jax.tree.leaves(state)], 1e-13)


@every
def test_masked_and_broken_examples_leave_no_trace(name):
    pair, (first, (z, y), *_) = PAIRS[name](), floats()
    _, state = run(pair, [first])
    keep = np.arange(16) % 3 > 0
    bad_z, bad_y = np.where(keep[:, None], z, np.float32(np.nan)), np.where(keep, y, 77)
    update = jax.jit(pair.update)
    result, new = update(state, bad_z, bad_y.astype(np.int32), where=keep)
    want, want_state = pair.update(state, z[keep], y[keep])
    same(new, want_state)
    if name == "class_mean":
        same(result, want)
        _, unmasked = update(state, np.where(keep[:, None], z, np.float32(np.nan)), y)
    else:
        np.testing.assert_array_equal(np.asarray(result)[~keep], 0)
        close(np.asarray(result)[keep], want, 2e-6)
        each, unmasked = update(state, z, bad_y.astype(np.int32))  # labels outside, not masked
        np.testing.assert_array_equal(np.asarray(each) == 0, ~keep)
        grad = jax.grad(lambda z: pair.update(state, z, y, where=keep)[0].sum())(bad_z)
        assert np.all(np.isfinite(grad)) and np.all(np.asarray(grad)[~keep] == 0)
    same(unmasked, want_state)
    empty = jax.jit(pair.update)(state, z, y, where=np.zeros(16, bool))
    same(empty[1], state)


def test_a_nan_among_the_logits_does_not_stay():
    pair, ((z, y), *_) = longtail.equalization_v2(4), floats()
    bad = z.copy()
    bad[3, 1] = np.nan
    each, state = pair.update(pair.init(), bad, y)
    assert np.isnan(np.asarray(each)).tolist() == [i == 3 for i in range(16)]
    same(state, pair.update(pair.init(), np.delete(z, 3, 0), np.delete(y, 3))[1])


@every
def test_the_state_carries_no_gradient(name):
    pair, ((a, y), (b, _), *_) = PAIRS[name](), floats()

    def later(a):
        result, state = pair.update(pair.update(pair.init(), a, y)[1], b, y)
        return result.sum() + sum(x.sum() for x in jax.tree.leaves(state))

    assert not np.any(jax.grad(later)(a))


@pytest.mark.devices
@every
def test_devices_hold_one_state(name):
    pair, steps = PAIRS[name](axis_name="data"), floats()
    want, want_state = run(PAIRS[name](), steps)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    result = whole if name == "class_mean" else split
    sharded = jax.jit(
        jax.shard_map(
            pair.update, mesh=mesh, in_specs=(whole, split, split), out_specs=(result, whole)
        )
    )
    same(run(pair, steps, sharded), (want, want_state))


@every
def test_the_state_is_arrays_that_a_checkpoint_holds(name):
    pair, steps = PAIRS[name](), floats()
    _, state = run(pair, steps[:2])
    leaves, treedef = jax.tree.flatten(state)
    assert all(x.dtype == jnp.float32 for x in leaves)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        restored = jax.tree.unflatten(treedef, [saved[k] for k in saved.files])
    update = jax.jit(pair.update)
    for a, b in zip(
        jax.tree.leaves(update(restored, *steps[2])),
        jax.tree.leaves(update(state, *steps[2])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@every
def test_hyperparameters_are_traced_and_half_precision_is_widened(name):
    key = {"equalization_v2": "mu", "online_seesaw": "p", "class_mean": "momentum"}[name]
    traces, steps = [], floats()

    @jax.jit
    def last(value):
        traces.append(None)
        return run(PAIRS[name](**{key: value}), steps)[0]

    a, b = last(np.float32(0.2)), last(np.float32(0.9))
    assert len(traces) == 1 and not np.allclose(a, b)
    low = [(jnp.asarray(z, jnp.bfloat16), y) for z, y in steps]
    result, state = run(PAIRS[name](**{key: 0.2}), low)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((result, state)))
    np.testing.assert_allclose(result, a, rtol=0.1, atol=0.05)


def test_gradient_of_equalization_v2(x64):
    from jax.test_util import check_grads

    pair = longtail.equalization_v2(4)
    _, state = run(pair, STEPS[:2])
    z, y = STEPS[2]
    check_grads(lambda z: pair.update(state, z, y)[0], (z,), 1, modes=["rev"])
    targets = np.eye(4)[y] + np.eye(4)[(y + 1) % 4]  # two classes at once
    check_grads(lambda z: pair.update(state, z, targets)[0], (z,), 1, modes=["rev"])


def test_extreme_logits_are_finite():
    for name in ("equalization_v2", "online_seesaw"):
        pair, y = PAIRS[name](), np.array([0, 1, 2, 3], np.int32)
        state = pair.init()
        for z in (1e6 * np.eye(4), -1e6 * np.eye(4), np.where(np.eye(4) > 0, 0, -np.inf)):

            def total(z, state=state, pair=pair, y=y):
                each, new = pair.update(state, z, y)
                return each.sum(), new

            (value, state), grad = jax.value_and_grad(total, has_aux=True)(z.astype(np.float32))
            leaves = jax.tree.leaves((value, state, grad))
            assert all(np.all(np.isfinite(x)) for x in leaves)


def test_errors():
    (z, y), *_ = floats()
    for name in ("equalization_v2", "contrib.online_seesaw"):
        with pytest.raises(ValueError, match=r"longtail\..* needs `num_classes` >= 1"):
            operator.attrgetter(name)(longtail)(0)
        pair = operator.attrgetter(name)(longtail)(3)
        with pytest.raises(ValueError, match="`logits` have 4 classes"):
            pair.update(pair.init(), z, y)
    with pytest.raises(ValueError, match="class_mean needs `num_features` >= 1"):
        longtail.class_mean(2, 0)
    pair = longtail.class_mean(4, 3)
    with pytest.raises(ValueError, match="`features` are 4 wide"):
        pair.update(pair.init(), z, y)
    with pytest.raises(ValueError, match="do not fit"):
        longtail.class_mean(3, 4).update(
            longtail.class_mean(3, 4).init(), z, np.eye(4, dtype="f4")[y]
        )
