"""Every dtype that JAX has, in every room: served, or refused with its name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtricks import agc, amp, cyclical, ebn, longtail, memopt, remat, reparam, weightstd

INTEGERS = ["int4", "int8", "int16", "int32", "int64"]
INTEGERS += ["uint4", "uint8", "uint16", "uint32", "uint64"]
TINY = ["float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]
# What newer releases have besides.
INTEGERS += [name for name in ("int2", "uint2") if hasattr(jnp, name)]
TINY += [name for name in ("float4_e2m1fn",) if hasattr(jnp, name)]
NEW = [name for name in ("float8_e3m4", "float8_e4m3") if hasattr(jnp, name)]
SCALES = [name for name in ("float8_e8m0fnu",) if hasattr(jnp, name)]
FLOATS = ["bfloat16", "float16", "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
OTHERS = ["bool_", "key"]
ALL = [*INTEGERS, *TINY, *NEW, *SCALES, *FLOATS, *COMPLEX, *OTHERS]


def array(dtype, shape=(4, 3)):
    if dtype == "key":
        return jax.random.split(jax.random.key(0), shape)
    return jnp.ones(shape, getattr(jnp, dtype))


def step(make, dtype):
    """One step; whatever it returns, the state is of the dtypes that init gave it."""
    tx, params = make(), {"w": array(dtype)}
    state = tx.init(params)
    updates, new = tx.update(params, state, params)
    specs = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new)]
    assert specs[0] == specs[1]
    return updates["w"]


def conv(dtype):
    branches = reparam.Sum(reparam.Conv(array(dtype, (3, 3, 4, 4))), reparam.Identity(4))
    return reparam.fuse(branches).kernel


def gradient(wrapper, dtype):
    """Of a number by which an array of the dtype is kept or dropped."""
    x = array(dtype)
    return jax.grad(wrapper(lambda w, x: w * w * x.size))(jnp.float32(3), x)


# name -> (function of a dtype's name, the dtypes that it serves)
TABLE = {
    "memopt.adafactor": (
        functools.partial(step, lambda: memopt.adafactor(1e-2, min_dim_size_to_factor=2)),
        [*TINY, *NEW, *FLOATS],
    ),
    "memopt.sm3": (
        functools.partial(step, lambda: memopt.sm3(0.1, momentum=0.9)),
        [*TINY, *NEW, *FLOATS],
    ),
    "agc.adaptive_grad_clip": (
        functools.partial(step, agc.adaptive_grad_clip),
        [*TINY, *NEW, *FLOATS],
    ),
    "amp.dynamic_loss_scale": (
        functools.partial(step, lambda: amp.dynamic_loss_scale(optax.sgd(0.5), init=4.0)),
        [*TINY, *NEW, *FLOATS, *COMPLEX],
    ),
    "amp.skip_nonfinite": (
        functools.partial(step, lambda: amp.skip_nonfinite(optax.scale(-0.5))),
        [*TINY, *NEW, *FLOATS, *COMPLEX],
    ),
    "amp.autocast": (lambda d: amp.autocast(lambda x: x)(array(d)), ALL),
    "weightstd.standardize": (
        lambda d: weightstd.standardize(array(d, (3, 3, 4, 4))),
        [*TINY, *NEW, *FLOATS],
    ),
    "weightstd.l2": (lambda d: weightstd.l2({"kernel": array(d)}), [*TINY, *NEW, *FLOATS]),
    "ebn.extended_moments": (lambda d: ebn.extended_moments(array(d)), [*TINY, *NEW, *FLOATS]),
    "cyclical": (lambda d: cyclical.cyclical(0.0, 1.0, 4)(array(d, ())), INTEGERS),
    "longtail, logits": (
        lambda d: longtail.cross_entropy()(array(d), np.zeros(4, np.int32)),
        [*TINY, *NEW, *FLOATS],
    ),
    "longtail, labels": (
        lambda d: longtail.cross_entropy()(np.zeros((4, 3), np.float32), array(d, (4,))),
        INTEGERS,
    ),
    "longtail.posthoc.adjust": (
        lambda d: longtail.posthoc.adjust(array(d), [1, 2, 3]),
        [*TINY, *NEW, *FLOATS],
    ),
    "longtail.metrics": (
        lambda d: longtail.metrics.update(longtail.metrics.init(3), array(d), np.zeros(4, int)),
        [*TINY, *NEW, *FLOATS],
    ),
    "reparam.fuse": (conv, [*TINY, *NEW, *FLOATS]),
    "remat.recompute_grad": (functools.partial(gradient, remat.recompute_grad), ALL),
    "remat.checkpoint": (functools.partial(gradient, remat.checkpoint), ALL),
}
# What it is given is not looked into: optax says what it says.
UNCHECKED = {("amp.dynamic_loss_scale", d) for d in [*INTEGERS, *OTHERS, *SCALES]}
UNCHECKED |= {("amp.skip_nonfinite", d) for d in [*INTEGERS, *OTHERS, *SCALES]}
# The annotations of these are checked in tests, and jaxtyping does not know the newest dtypes.
ANNOTATED = [
    "weightstd.standardize",
    "ebn.extended_moments",
    "longtail, logits",
    "longtail, labels",
]
ANNOTATED += ["longtail.posthoc.adjust", "longtail.metrics"]
UNCHECKED |= {(name, d) for name in ANNOTATED for d in [*NEW, *SCALES]}
# Probabilities, which are of another rank.
UNCHECKED |= {("longtail, labels", d) for d in [*TINY, *FLOATS]}


@pytest.mark.parametrize("name", TABLE)
def test_every_dtype_is_served_or_refused_by_name(name, x64):
    function, served = TABLE[name]
    for dtype in ALL:
        if (name, dtype) in UNCHECKED:
            continue
        if dtype in served:
            jax.block_until_ready(function(dtype))
            continue
        with pytest.raises(ValueError) as caught:
            function(dtype)
        said = {"key": "key<", "bool_": "bool"}.get(dtype, dtype)
        assert said in str(caught.value), (dtype, caught.value)


@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex_parameters_get_the_update_of_the_optimizer_alone(dtype, x64):
    """The gradients carry the scale, imaginary parts too; a NaN in either part skips the step."""
    params = {"z": jnp.asarray([1 + 1j, 2 - 1j], dtype), "w": jnp.ones(2)}

    def loss(params):
        return jnp.sum(jnp.abs(params["z"]) ** 2) + jnp.sum(params["w"])

    plain = optax.sgd(0.1)
    want, _ = plain.update(jax.grad(loss)(params), plain.init(params))
    tx = amp.dynamic_loss_scale(optax.sgd(0.1))
    state = tx.init(params)
    _, grads = amp.value_and_grad(loss, scale=amp.loss_scale(state))(params)
    for update in (tx.update, jax.jit(tx.update)):
        got, _ = update(grads, state, params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)
    for bad in (complex(np.nan, 1), complex(1, np.nan), complex(np.inf, 1), complex(1, -np.inf)):
        spoiled = {**grads, "z": grads["z"].at[0].set(bad)}
        assert not amp.all_finite(spoiled)
        for guard in (tx, amp.skip_nonfinite(optax.sgd(0.1))):
            updates, after = jax.jit(guard.update)(spoiled, guard.init(params), params)
            assert int(after.skipped) == 1 and not any(map(np.any, jax.tree.leaves(updates)))


@pytest.mark.parametrize(
    "tx",
    ["adam", "momentum"],
)
def test_complex_moments_keep_their_dtype(tx):
    make = {"adam": lambda: optax.adam(0.1), "momentum": lambda: optax.sgd(0.1, momentum=0.9)}[tx]
    guarded, params = amp.dynamic_loss_scale(make(), init=4.0), {"z": jnp.ones(3, jnp.complex64)}

    @jax.jit
    def steps(params):
        def body(carry, _):
            params, state = carry
            updates, state = guarded.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, guarded.init(params)), length=3)[0][0]

    assert steps(params)["z"].dtype == jnp.complex64


def test_the_nan_of_a_python_float_is_seen():
    params = {"w": 1.0, "z": 1j}
    for bad in ({"w": float("nan"), "z": 1j}, {"w": 1.0, "z": complex(0, np.inf)}):
        assert not amp.all_finite(bad)
        for tx in (amp.skip_nonfinite(optax.sgd(0.1)), amp.dynamic_loss_scale(optax.sgd(0.1))):
            updates, state = tx.update(bad, tx.init(params), params)
            assert int(state.skipped) == 1 and not any(map(np.any, jax.tree.leaves(updates)))


@pytest.mark.parametrize(
    "of", [float, np.float64, jnp.float32, np.asarray], ids=lambda f: f.__name__
)
def test_a_number_out_of_range_is_refused_however_it_is_made(of):
    """A plain number, a scalar of NumPy, an array [] on the host or a device."""
    sgd = optax.sgd(0.1)
    settings = [{"init": 0.0}, {"init": -1.0}, {"init": np.inf}, {"init": np.nan}, {"growth": 0.5}]
    settings += [{"growth": np.inf}, {"growth_interval": 1.5}, {"growth_interval": 0.0}]
    settings += [{"backoff": 0.0}, {"backoff": 1.0}, {"backoff": 2.0}, {"backoff": np.nan}]
    settings += [
        {"min_scale": 0.0},
        {"min_scale": -1.0},
        {"min_scale": 1e9},
        {"max_consecutive": 0.0},
    ]
    for wrong in settings:
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"`{name}` is "):
            amp.dynamic_loss_scale(sgd, **{name: of(value)})
    with pytest.raises(ValueError, match="`max_consecutive`"):
        amp.skip_nonfinite(sgd, of(0.0))
    with pytest.raises(ValueError, match="`value`"):
        amp.DynamicLossScale(of(-1.0))
    with pytest.raises(ValueError, match="`clipping`"):
        agc.adaptive_grad_clip(of(-1.0))
    with pytest.raises(ValueError, match="`learning_rate`"):
        memopt.adafactor(of(-1.0))
