"""The laws every public transform obeys, run over everything in tests/registry.py.

test_spmd.py has those on meshes.
"""

import contextlib
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtricks import _compat, agc, amp, memopt
from jaxtricks.memopt import _block_codes

from tests import registry

TRANSFORMS = sorted(registry.GRADIENT_TRANSFORMS)
LOSSES = sorted(registry.LOSSES)
SCHEDULES = sorted(registry.SCHEDULES)

every_transform = pytest.mark.parametrize("name", TRANSFORMS)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)

# What shapes, strings and functions decide; optax would make arrays or schedules of them.
STATIC = ("roles", "path_filter", "weight_decay_mask", "min_dim_size_to_factor", "min_bytes")
STATIC += ("bits", "block", "min_size", "keep", "mask", "nesterov")


def make(name, **kwargs):
    return registry.GRADIENT_TRANSFORMS[name](**kwargs)


def tree(seed, dtype=np.float32):
    """A matrix, a rank-3 kernel, a vector, a scalar, nothing, and an array without elements."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (8, 6), "head": (5, 3, 4), "bias": (6,), "scalar": (), "empty": (0, 4)}
    leaves = {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}
    return {"layer": [{n: leaves.pop(n) for n in ("kernel", "bias")}, None], **leaves}


def close(a, b, rtol=1e-6):
    """Trees that agree to rtol of the largest entry of each leaf."""
    chex.assert_trees_all_equal_shapes(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.max(np.abs(y), initial=1e-30))


def two_steps(tx, params, update=None, state=None):
    """Updates of two steps with different gradients, and the last state."""
    state = tx.init(params) if state is None else state
    first, state = (update or tx.update)(tree(1), state, params)
    second, state = (update or tx.update)(tree(2), state, params)
    return (first, second), state


@every_transform
def test_jit_equals_eager_without_retracing_and_keeps_structure(name, ours):
    tx, params = make(name), tree(0)
    traces = []

    @jax.jit
    def update(*args):
        traces.append(args)
        return tx.update(*args)

    updates, state = two_steps(tx, params, update, jax.jit(tx.init)(params))
    assert len(traces) == 1
    close((updates, state), two_steps(tx, params), 1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates[0], params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


@every_transform
def test_composes_with_optax(name):
    tx, params, masked = make(name), tree(0), optax.MaskedNode()
    update = jax.jit(tx.update)
    (first, _), _ = two_steps(tx, params, update)

    (chained, _), _ = two_steps(
        chain := optax.chain(tx, optax.scale(2.0)), params, jax.jit(chain.update)
    )
    close(chained, jax.tree.map(lambda u: 2 * u, first))

    mask = jax.tree.map(lambda x: x.ndim != 3, params)
    (hidden, _), state = two_steps(part := optax.masked(tx, mask), params, jax.jit(part.update))
    rest = {**params, "head": masked}
    alone, _ = tx.update({**tree(1), "head": masked}, tx.init(rest), rest)
    np.testing.assert_array_equal(hidden["head"], tree(1)["head"])
    close({**hidden, "head": masked}, alone, 1e-5)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(tx.init(rest))

    labels = jax.tree.map(lambda x: "a" if x.ndim == 3 else "b", params)
    multi = optax.multi_transform({"a": tx, "b": make(name)}, labels)
    (split, _), _ = two_steps(multi, params, jax.jit(multi.update))
    close(split, first, 1e-5)


@every_transform
def test_multi_steps(name):
    tx, params = make(name), tree(0)
    expected, _ = jax.jit(tx.update)(tree(1), tx.init(params), params)
    steps = optax.MultiSteps(tx, 2)
    update, state = jax.jit(steps.update), steps.init(params)
    waiting, state = update(tree(1), state, params)
    assert all(not np.any(x) for x in jax.tree.leaves(waiting))
    updates, _ = update(tree(1), state, params)
    close(updates, expected, 1e-5)


@every_transform
def test_inject_hyperparams_under_jit(name):
    factory, params = registry.GRADIENT_TRANSFORMS[name], tree(0)
    static = [n for n in STATIC if n in inspect.signature(factory).parameters]
    tx = optax.inject_hyperparams(factory, static_args=static)()
    state = jax.jit(tx.init)(params)
    (injected, _), _ = two_steps(tx, params, jax.jit(tx.update), state)
    (expected, _), _ = two_steps(make(name), params, jax.jit(make(name).update))
    close(injected, expected, 1e-5)


@every_transform
def test_nnx_optimizer(name):
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    grads = jax.tree.map(lambda x: jnp.cos(x * 3), params)
    tx = make(name)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradient = nnx.state(model, nnx.Param)
    gradient["kernel"], gradient["bias"] = (
        gradient["kernel"].replace(grads["kernel"]),
        gradient["bias"].replace(grads["bias"]),
    )
    nnx.jit(lambda o, m, g: o.update(m, g))(optimizer, model, gradient)
    close({"kernel": model.kernel[...], "bias": model.bias[...]}, expected, 1e-5)


@every_transform
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_state_is_float32_or_better(name, dtype, x64, ours):
    tx, params = make(name), tree(0, dtype)
    state = jax.eval_shape(tx.init, params)
    # Codes are narrow by design; what they stand for is float32.
    nodes = jax.tree.leaves(state, is_leaf=_block_codes.is_codes)
    arrays = [x for x in nodes if not _block_codes.is_codes(x)]
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    # optax's Muon keeps its three coefficients in the state, in float64 where that exists.
    large = {x.dtype for x in floats if x.ndim and x.shape != (3,)}
    assert large <= {np.dtype("float64" if dtype == "float64" else "float32")}
    assert all(x.dtype.itemsize >= 4 for x in floats)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes(updates, params)
    # The parameter's dtype, or wider: rounding to 16 bits is left to optax.apply_updates.
    wide = np.dtype("float64" if dtype == "float64" else "float32")
    assert {x.dtype for x in jax.tree.leaves(updates)} <= {np.dtype(dtype), wide}
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@every_transform
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_of_stacked_is_stacked_update(name, dtype, x64, ours):
    if "roles" not in inspect.signature(registry.GRADIENT_TRANSFORMS[name]).parameters:
        pytest.skip("has no `roles`")
    roles = {"m": ("in", "out"), "h": ("in", "out", "out"), "v": ("none",), "s": ()}
    shapes = {"m": (12, 9), "h": (8, 2, 5), "v": (7,), "s": ()}

    def layer(seed):
        rng = np.random.default_rng(seed)
        # Scales differ by layer: what mixes layers shows.
        return {
            n: jnp.asarray(rng.normal(size=s) * 10.0 ** (seed % 3), dtype)
            for n, s in shapes.items()
        }

    def runner(axes):
        tx = make(name, roles=axes)
        init, update = jax.jit(tx.init), jax.jit(tx.update)

        def run(params, *grads):
            state = init(params)
            for g in grads:
                updates, state = update(g, state, params)
            return updates

        return run

    def stack(*trees):
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    layers = [[layer(10 * i + j) for j in range(3)] for i in range(3)]
    one = runner(roles)
    separate = [one(*[layers[i][j] for i in range(3)]) for j in range(3)]
    batched = {n: ("batch", *r) for n, r in roles.items()}
    together = runner(batched)(*[stack(*layers[i]) for i in range(3)])
    tolerance = 1e-6 if dtype == "float32" else 1e-13
    if name == "memopt.muon":  # Newton-Schulz multiplies the rounding errors of its products
        tolerance *= 10
    close(together, stack(*separate), tolerance)


@every_transform
def test_vmap_over_an_ensemble(name, ours):
    tx = make(name)
    many = [jax.tree.map(lambda *xs: jnp.stack(xs), tree(s), tree(s + 10)) for s in (0, 1)]
    updates, _ = jax.jit(jax.vmap(lambda p, g: tx.update(g, tx.init(p), p)))(*many)
    for i in range(2):
        p, g = (jax.tree.map(lambda x: x[i], t) for t in many)  # noqa: B023
        close(jax.tree.map(lambda x: x[i], updates), tx.update(g, tx.init(p), p)[0], 1e-5)  # noqa: B023


@every_transform
def test_zero_gradients_stay_finite(name, ours):
    tx = make(name)
    params = jax.tree.map(jnp.zeros_like, tree(0))
    update, state = jax.jit(tx.update), tx.init(params)
    for grads in (params, tree(1), params):
        updates, state = update(grads, state, params)
        chex.assert_tree_all_finite((updates, state))


@every_transform
def test_missing_params_raise_or_are_not_needed(name, ours):
    tx, params = make(name), tree(0)
    state = tx.init(params)
    expected, _ = tx.update(tree(1), state, params)
    try:
        updates, _ = tx.update(tree(1), state)
    except ValueError as error:
        assert "params" in str(error)
    else:
        close(updates, expected)


# States

# name -> learning rate -> optimizer
OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "lion": optax.lion,
    "rmsprop": lambda learning_rate: optax.rmsprop(learning_rate, momentum=0.9),
    "MultiSteps": lambda learning_rate: optax.MultiSteps(
        optax.adam(learning_rate), 2
    ).gradient_transformation(),
    "adafactor": lambda learning_rate: memopt.adafactor(
        learning_rate, beta1=0.9, min_dim_size_to_factor=4
    ),
    "adafactor, int8": lambda learning_rate: memopt.adafactor(
        learning_rate, beta1=0.9, momentum_dtype="int8"
    ),
    "low_bit": lambda learning_rate: memopt.low_bit(
        optax.adam(learning_rate), block=4, min_size=32
    ),
    "sm3": memopt.sm3,
    "sm3, int8": lambda learning_rate: memopt.sm3(
        learning_rate, momentum=0.9, momentum_dtype="int8"
    ),
}
# name -> makes a transformation of one of the optimizers
AROUND = {
    "alone": lambda make: make(1e-2),
    "agc": lambda make: optax.chain(agc.adaptive_grad_clip(0.1), make(1e-2)),
    "stochastic_round": lambda make: optax.chain(make(1e-2), memopt.stochastic_round(0)),
    "dynamic_loss_scale": lambda make: amp.dynamic_loss_scale(make(1e-2)),
    "skip_nonfinite": lambda make: amp.skip_nonfinite(make(1e-2)),
    "masked": lambda make: optax.masked(make(1e-2), matrices),
    "multi_transform": lambda make: optax.multi_transform(
        {True: make(1e-2), False: memopt.scale_by_sm3()}, matrices
    ),
    "MultiSteps": lambda make: optax.MultiSteps(make(1e-2), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(lambda rate: make(rate))(rate=1e-2),
    "all": lambda make: amp.dynamic_loss_scale(
        optax.chain(
            agc.adaptive_grad_clip(0.1),
            optax.MultiSteps(make(1e-2), 2).gradient_transformation(),
            memopt.stochastic_round(0),
        )
    ),
}
REAL = ["float32", "bfloat16", "float16", "float64"]
STATES = [(*case, dtype) for case in itertools.product(AROUND, OPTIMIZERS) for dtype in REAL]
STATES += itertools.product(
    ("alone", "dynamic_loss_scale", "skip_nonfinite", "MultiSteps"),
    ("adam", "adamw", "sgd", "rmsprop", "MultiSteps"),
    ("complex64",),
)


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def types(state):
    """Structure, shapes, dtypes and weak types: where they stay, a jitted step compiles once."""

    def of(x):
        kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        return kind.shape, kind.dtype, kind.weak_type

    return jax.tree.structure(state), list(map(of, jax.tree.leaves(state)))


@pytest.mark.parametrize(("around", "inner", "dtype"), STATES)
def test_a_state_keeps_its_types_and_is_mapped_by_optax(around, inner, dtype):
    with _compat.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        tx, params = AROUND[around](OPTIMIZERS[inner]), tree(0, dtype)
        state = tx.init(params)

        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        three = jax.tree.map(lambda x: jnp.stack([x] * 3), params)
        once, _ = jax.eval_shape(step, (params, state), params)
        assert types(once[1]) == types(state)
        scanned, _ = jax.eval_shape(lambda *args: jax.lax.scan(step, *args), (params, state), three)
        assert types(scanned) == types((params, state))
        if dtype == "float32":  # what compiles for one compiles for all
            steps = jax.jit(lambda *args: jax.lax.scan(step, *args)[0])
            steps(steps((params, state), three), three)
            assert steps._cache_size() == 1

        owned = optax.tree_utils.tree_map_params(
            tx, lambda _: True, state, transform_non_params=lambda _: False
        )
        assert jax.tree.structure(owned) == jax.tree.structure(state)
        for x, own in zip(jax.tree.leaves(state), jax.tree.leaves(owned), strict=True):
            assert own or x.ndim == 0


# Schedules


@every_schedule
def test_schedules(name, ours):
    schedule = registry.SCHEDULES[name]()
    steps = [0, 1, 7, 100, 12_345, 50_000_000]
    eager = [schedule(step) for step in steps]
    assert all(x.dtype == jnp.float32 and x.shape == () for x in eager)
    assert len(set(map(float, eager))) > 1
    jitted = jax.jit(schedule)
    for step, expected in zip(steps, eager, strict=True):
        for form in (step, jnp.int32(step), np.int64(step)):
            np.testing.assert_allclose(jitted(form), expected, rtol=1e-6, atol=1e-12)
    mapped = jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(mapped, eager, rtol=1e-6, atol=1e-12)


@every_schedule
def test_schedules_drive_an_optimizer(name):
    schedule = registry.SCHEDULES[name]()
    tx = optax.sgd(schedule)
    params, state = jnp.zeros([]), tx.init(jnp.zeros([]))
    for step in range(3):
        updates, state = tx.update(jnp.ones([]), state, params)
        np.testing.assert_allclose(updates, -schedule(step), rtol=1e-6)


# Losses

COUNTS = np.asarray([1000, 100, 50, 10, 1])


def example(shape=(4, 3)):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*shape, len(COUNTS))) * 3
    return jnp.asarray(logits, jnp.float32), jnp.asarray(rng.integers(0, 5, shape))


@every_loss
def test_losses_are_per_example_float32_and_the_same_under_jit(name, ours):
    loss = registry.LOSSES[name](COUNTS)
    logits, labels = example()
    eager = loss(logits, labels)
    assert eager.shape == labels.shape
    assert eager.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(loss)(logits, labels), eager, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(logits, labels), eager, rtol=1e-5, atol=1e-6)
    low = jax.jit(loss)(logits.astype(jnp.bfloat16), labels)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, eager, rtol=0.1, atol=0.3)


@every_loss
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_loss_gradients_are_finite(name, size, ours):
    loss = registry.LOSSES[name](COUNTS)
    logits, labels = example()
    value, grads = jax.jit(jax.value_and_grad(lambda z: jnp.sum(loss(z, labels))))(logits * size)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grads))
    assert np.any(np.asarray(grads) != 0)


@every_loss
def test_masked_examples_cost_nothing_and_teach_nothing(name, ours):
    loss = registry.LOSSES[name](COUNTS)
    if "where" not in inspect.signature(loss).parameters:
        pytest.skip("has no `where`")
    logits, labels = example()
    keep = jnp.asarray(np.random.default_rng(1).integers(0, 2, labels.shape), bool)
    broken = jnp.where(keep[..., None], logits, jnp.nan)

    def total(z):
        per_example = loss(z, labels, where=keep)
        return jnp.sum(per_example), per_example

    (_, per_example), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(broken)
    expected = jnp.where(keep, loss(logits, labels), 0)
    np.testing.assert_allclose(per_example, expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(np.asarray(grads)[~np.asarray(keep)], 0)


@every_loss
def test_losses_do_not_depend_on_the_order_of_classes(name, ours):
    logits, labels = example()
    order = np.random.default_rng(2).permutation(len(COUNTS))
    expected = registry.LOSSES[name](COUNTS)(logits, labels)
    permuted = registry.LOSSES[name](COUNTS[order])(
        logits[..., order], jnp.asarray(np.argsort(order))[labels]
    )
    np.testing.assert_allclose(permuted, expected, rtol=1e-5, atol=1e-5)
