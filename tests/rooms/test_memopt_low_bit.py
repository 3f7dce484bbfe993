"""State in 8 and 4 bits: codes against float64, every optimizer of optax, chains, meshes, checkpoints."""

import functools
import math
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _random_bits, memopt
from jaxtricks.memopt import _block_codes

# (bits, signed) -> the levels of codes, not scaled; with 4 bits of a block that is finite
FORMATS = {
    (8, True): np.arange(127.0) ** 2,
    (8, False): np.arange(254.0) ** 4,
    (4, True): np.arange(1.0, 9.0) ** 2 - 1,
    (4, False): np.arange(1.0, 17.0) ** 2 - 1,
}
every_format = pytest.mark.parametrize(("bits", "signed"), FORMATS)


def values(bits, signed):
    """All finite magnitudes of a block of largest entry 1, in float64."""
    return FORMATS[bits, signed] / FORMATS[bits, signed][-1]


def spacing(magnitudes, grid):
    """Distance of the two values around each magnitude, float64."""
    upper = np.clip(np.searchsorted(grid, magnitudes), 1, len(grid) - 1)
    return grid[upper] - grid[upper - 1]


def sample(shape, signed, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))
    return (x if signed else x * x).astype(np.float32)


def coded(x, bits, signed, *, axis=-1, block=64, step=None):
    x = jnp.asarray(x)
    layout = _block_codes.layout(x, "w", bits=bits, signed=signed, axis=axis)
    nearest = _block_codes.encode(x, layout, block)
    if step is None:
        return nearest
    at_step = _random_bits.of_step(jax.random.key(0), step)
    return _block_codes.encode_like(x, nearest, at_step)


def decoded(*args, **kwargs):
    return np.asarray(_block_codes.decode(coded(*args, **kwargs)))


# Codes


@every_format
@pytest.mark.parametrize("scale", [1.2e-38 * 2**20, 1e-30, 1.0, 1e30, 3.3e38])
def test_codes_are_the_nearest_neighbours_in_float64(bits, signed, scale, ours):
    x = sample((4, 128), signed).astype(np.float64)
    x = (x / np.abs(x).max(-1, keepdims=True) * scale).astype(np.float32)
    codes = coded(x, bits, signed, block=128)
    largest = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
    wide = np.asarray(codes.scale, np.float64)
    # Rounded up to bfloat16, whose largest number is 0.4 % below float32's.
    assert np.all(wide >= np.minimum(largest, 3.3895e38)) and np.all(wide <= largest * (1 + 2**-7))
    grid = values(bits, signed) * wide[:, None]
    a, y = np.abs(x.astype(np.float64)), np.abs(np.asarray(_block_codes.decode(codes), np.float64))
    upper = np.stack([np.searchsorted(g[0], row) for g, row in zip(grid, a, strict=True)])
    upper = np.clip(upper, 1, grid.shape[-1] - 1)
    high = np.take_along_axis(grid[:, 0], upper, 1)
    low = np.take_along_axis(grid[:, 0], upper - 1, 1)
    if not signed:  # what is above zero stays there
        low = np.where((low == 0) & (a > np.finfo(np.float32).tiny), high, low)
    slack = 1e-5 * high + 1.2e-38
    assert np.all(np.minimum(np.abs(y - low), np.abs(y - high)) <= slack)
    nearest = np.maximum(np.minimum(np.abs(a - low), np.abs(a - high)), 0)
    assert np.all(np.abs(y - a) <= nearest + slack)
    np.testing.assert_array_equal(
        np.signbit(x) & (y > 0), np.asarray(_block_codes.decode(codes)) < 0
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 200),
    st.sampled_from([2, 3, 32, 64]),
    st.floats(-38, 38),
    st.integers(0, 2**20),
)
def test_the_error_is_bounded_at_every_magnitude(kind, length, block, exponent, seed):
    """At most a spacing of codes, where the entry lies in its block."""
    x = sample(length, kind[1], seed, spread=4.0).astype(np.float64)
    x = np.clip(x / np.abs(x).max() * 10.0**exponent, -3e38, 3e38).astype(np.float32)
    y = decoded(x, *kind, block=block, step=seed).astype(np.float64)
    size = math.ceil(length / math.ceil(length / block))
    padded = np.pad(np.abs(x.astype(np.float64)), (0, -length % size))
    largest = np.repeat(padded.reshape(-1, size).max(-1), size)[:length]
    # Up to 1/128 more for the scale, which is rounded up; in a wider grid an entry may lie one cell lower.
    share = np.abs(x.astype(np.float64)) / np.maximum(largest, 1e-300)
    cells = np.maximum(spacing(share, values(*kind)), spacing(share / (1 + 2**-7), values(*kind)))
    bound = 1.02 * cells * largest * (1 + 2**-7) + 1.2e-38
    assert np.all(np.abs(y - x) <= bound)
    assert np.all(np.sign(y) * np.sign(x) >= 0)


@every_format
def test_rounding_is_unbiased_and_of_step_and_path(bits, signed, ours):
    x = jnp.asarray(sample((128, 3), signed, spread=0.5))
    layouts = [
        _block_codes.layout(x, path, bits=bits, signed=signed, axis=-2, part=part)
        for path, part in (("w", 0), ("w", 1), ("v", 0))
    ]
    n = 4000

    def mean_and_last(layout):
        like = _block_codes.encode(x, layout, 64)

        def once(step):
            at_step = _random_bits.of_step(jax.random.key(0), step)
            return _block_codes.decode(_block_codes.encode_like(x, like, at_step))

        samples = jax.jit(jax.vmap(once))(jnp.arange(n))
        return np.asarray(samples, np.float64)

    first, part, path = map(mean_and_last, layouts)
    grid = values(bits, signed) * float(jnp.abs(x).max()) * 1.01
    cells = spacing(np.abs(x), grid)
    for samples in (first, part, path):
        error = np.abs(samples.mean(0) - x)
        # Five standard deviations, of at most half a spacing; second moments have a floor.
        floor = 0 if signed else grid[1]
        assert np.all(error <= 5 * 0.5 * 1.02 * cells / np.sqrt(n) + floor)
    assert len({(s != first).mean() > 0.05 for s in (part, path)}) == 1
    assert (first[0] != first[1]).any() and (part != first).any() and (path != first).any()
    # Neighbours are rounded independently of each other.
    ups = (first > np.asarray(x)).reshape(n, -1)
    ups = ups[:, ups.std(0) > 0.2]
    correlation = np.corrcoef(ups.T) - np.eye(ups.shape[1])
    blocks_apart = np.abs(correlation) < 0.12
    assert blocks_apart.mean() > 0.98


@every_format
def test_what_is_not_finite_comes_back_and_harms_no_neighbour(bits, signed, ours):
    x = sample((2, 64), signed)
    x[0, 3], x[0, 5] = np.inf, np.nan
    if signed:
        x[1, 7] = -np.inf
    y = decoded(x, bits, signed, step=1)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(np.where(np.isinf(y), y, 0), np.where(np.isinf(x), x, 0))
    # With 4 bits their block has a code less for numbers, or two.
    calm, y = np.where(np.isfinite(x), x, 0), np.where(np.isfinite(x), y, 0)
    levels = FORMATS[bits, signed]
    grid = levels if bits == 8 else levels[: -1 if signed else -2]
    grid = grid / grid[-1] * np.abs(calm).max(-1, keepdims=True) * (1 + 2**-7)
    for row, decoded_row, own in zip(calm, y, grid, strict=True):
        assert np.all(np.abs(decoded_row - row) <= 1.02 * spacing(np.abs(row), own).max())


def test_zeros_stay_and_negative_second_moments_are_loud(ours):
    for bits, signed in FORMATS:
        np.testing.assert_array_equal(
            decoded(np.zeros((3, 5), np.float32), bits, signed, step=0), 0
        )
    assert np.isnan(decoded(np.float32([1, -1]), 8, False)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("shape", "apart", "axis", "scales"),
    [
        ((4096,), (), -1, (64,)),
        ((256, 300), (), -2, (4, 300)),
        ((100, 300), (), -2, (2, 300)),  # two blocks of 50
        ((3, 3, 64, 8), (), -2, (3, 3, 1, 8)),
        ((512, 8, 64), (), -3, (8, 8, 64)),  # few heads: along the features
        ((3, 3, 1, 256), (), -1, (3, 3, 1, 4)),
        ((64, 256), (0,), -1, (64, 4)),  # stacked biases
        ((48, 128, 32), (0,), -2, (48, 2, 32)),
    ],
)
def test_blocks_lie_along_one_axis(shape, apart, axis, scales, ours):
    assert _block_codes.block_axis(shape, 64, apart) == axis
    x = sample(shape, True)
    codes = coded(x, 8, True, axis=axis)
    assert (codes.codes.shape, codes.scale.shape) == (shape, scales)
    assert decoded(x, 4, True, axis=axis).shape == shape


# Optimizers

OPTIMIZERS = {
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamw": optax.adamw,
    "adan": optax.adan,
    "ademamix": optax.contrib.ademamix,
    "adopt": optax.contrib.adopt,
    "amsgrad": optax.amsgrad,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lion": optax.lion,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "muon": optax.contrib.muon,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "novograd": optax.novograd,
    "radam": optax.radam,
    "rmsprop, momentum": functools.partial(optax.rmsprop, momentum=0.9),
    "sophia-like yogi": optax.yogi,
    "sm3": lambda rate: memopt.sm3(rate, momentum=0.9),
    "adafactor": lambda rate: memopt.adafactor(rate, beta1=0.9, factored=False),
    "optax.adafactor": lambda rate: optax.adafactor(rate, factored=False, momentum=0.9),
    "optax.sm3": optax.sm3,
}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if make is not None}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_every_optimizer_shrinks(name):
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    make = OPTIMIZERS[name]
    whole = memopt.state_bytes(make(1e-3), params)
    # SM3's accumulators and Novograd's norms are small, and not stored in codes.
    for bits, share in ((8, 0.27), (4, 0.15)):
        assert memopt.state_bytes(memopt.low_bit(make(1e-3), bits=bits), params) <= share * whole


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_as_in_float32(name):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32), "b": jnp.ones(8)}
    grads = [
        {n: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), jnp.float32) for n, p in params.items()}
        for _ in range(8)
    ]

    def run(tx):
        update, state, p = jax.jit(tx.update), tx.init(params), params
        for g in grads:
            u, state = update(g, state, p)
            p = optax.apply_updates(p, u)
        return p, state

    (exact, _), (p, state) = (
        run(OPTIMIZERS[name](1e-2)),
        run(memopt.low_bit(OPTIMIZERS[name](1e-2))),
    )
    assert any(map(_block_codes.is_codes, jax.tree.leaves(state, is_leaf=_block_codes.is_codes)))
    np.testing.assert_array_equal(p["b"], exact["b"]) if name not in ("lars", "lamb") else None
    moved = np.linalg.norm(exact["w"] - params["w"])
    assert np.linalg.norm(p["w"] - exact["w"]) < 0.12 * moved


def test_signs_are_those_of_the_fields(ours):
    params = {"w": jnp.ones((64, 64))}

    def signed(tx):
        codes = jax.tree.leaves(tx.init(params), is_leaf=_block_codes.is_codes)
        return [x.layout.signed for x in codes if _block_codes.is_codes(x)]

    assert signed(memopt.low_bit(optax.adam(1e-3))) == [True, False]
    assert signed(memopt.low_bit(optax.adam(1e-3), second_moments=())) == [True, True]
    assert signed(memopt.low_bit(optax.adan(1e-3)))[:3] == [True, True, False]  # m, v, n
    only = memopt.low_bit(optax.adam(1e-3), second_moments=("ScaleByAdamState.mu",))
    assert signed(only) == [False, True]


def test_names_of_parameters_say_nothing_about_signs():
    class Layer(NamedTuple):
        nu: Any
        mu: Any

    params = Layer(jnp.asarray(sample((64, 64), True)), jnp.ones((64, 64)))
    tx = memopt.low_bit(optax.adam(1e-3))
    state = tx.init({"a": params}).inner[0]
    assert state.mu["a"].nu.layout.signed and not state.nu["a"].mu.layout.signed


def test_what_stays_as_it_is(ours):
    params = {"w": jnp.ones((64, 64)), "small": jnp.ones((8, 8)), "b": jnp.ones(70)}

    def coded_paths(tx):
        leaves = jax.tree_util.tree_leaves_with_path(tx.init(params), is_leaf=_block_codes.is_codes)
        return [jax.tree_util.keystr(p) for p, x in leaves if _block_codes.is_codes(x)]

    assert len(coded_paths(memopt.low_bit(optax.adam(1e-3)))) == 2
    assert len(coded_paths(memopt.low_bit(optax.adam(1e-3), min_size=64))) == 6
    assert coded_paths(memopt.low_bit(optax.adam(1e-3), keep=["mu/"])) == [".inner[0].nu['w']"]
    assert coded_paths(memopt.low_bit(optax.adam(1e-3), keep=["w$"])) == []
    # optax locates the parameters in a state with an empty tree, where no pattern finds anything.
    tx = memopt.low_bit(optax.adam(1e-3), keep=["mu/"])
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: x, tx.init(params))
    assert jax.tree.structure(mapped) == jax.tree.structure(tx.init(params))
    # Copies of the parameters are weights, not averages.
    free = optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2, b1=0.9)
    assert coded_paths(memopt.low_bit(free)) == []


def test_stacked_layers_do_not_share_scales(ours):
    params = {"w": jnp.ones((64, 128))}
    tx = memopt.low_bit(optax.sgd(1e-2, momentum=0.9), roles={"w": ("batch", "out")})
    assert tx.init(params).inner[0].trace["w"].scale.shape == (64, 2)
    # At random in each layer, but with the same expectation: compare the stored arrays at their nearest.
    stack = sample((4, 64, 8), True)
    whole = decoded(stack, 8, True, axis=-2)
    for layer, expected in zip(whole, stack, strict=True):
        np.testing.assert_array_equal(layer, decoded(expected, 8, True, axis=-2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_parameters_have_float32_arithmetic(dtype):
    params = {"w": jnp.ones((64, 64), dtype)}
    tx = memopt.low_bit(optax.adam(1e-3))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(lambda p: 1e-4 * p, params), state, params)
    # In float16, (1e-4)^2 is zero and the step infinite.
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=0.1)
    assert updates["w"].dtype == jnp.float32
    assert state.inner[0].nu["w"].layout.dtype == jnp.float32


def test_a_gradient_that_is_not_finite_stays_where_it_is():
    params = {"w": jnp.ones((128, 64)), "v": jnp.ones((64, 64))}
    tx = memopt.low_bit(optax.adam(1e-3))
    grads = {"w": jnp.ones((128, 64)).at[3, 4].set(jnp.nan), "v": jnp.ones((64, 64))}
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
    assert int(jnp.isnan(updates["w"]).sum()) == 1 and bool(jnp.isnan(updates["w"][3, 4]))
    assert bool(jnp.isfinite(updates["v"]).all())


def test_steps_repeat_and_resume_exactly(tmp_path):
    params = {"w": jnp.asarray(sample((128, 64), True))}
    tx = memopt.low_bit(optax.adamw(1e-2), bits=4)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tx.init(params))
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for x, y in zip(update(params, restored, params), update(params, state, params), strict=True):
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# Meshes


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_state_lies_as_the_parameters_do(kind, bits):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"w": P("data", "model"), "stack": P(None, "data", "model"), "b": P("model")}
    host = {
        "w": sample((256, 64), True),
        "stack": sample((2, 256, 32), True),
        "b": sample(4096, True),
    }
    tx = memopt.low_bit(optax.adam(1e-3), bits=bits)
    expected, alone = jax.jit(tx.update)(host, tx.init(host), host)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        params = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in host.items()}
        update = jax.jit(tx.update)
        state = tx.init(params)
        for make in (
            lambda: state,
            lambda: jax.jit(tx.init)(params),
            lambda: update(params, state, params)[1],
        ):
            for moment in (make().inner[0].mu, make().inner[0].nu):
                for n, codes in moment.items():
                    for x in (codes.codes, codes.scale):
                        place = NamedSharding(mesh, specs[n])
                        assert x.sharding.is_equivalent_to(place, x.ndim), (n, x.shape, x.sharding)
        updates, new = update(params, state, params)
    for n in host:
        np.testing.assert_allclose(updates[n], expected[n], rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(
            np.asarray(new.inner[0].nu[n].codes, np.int32),
            np.asarray(alone.inner[0].nu[n].codes, np.int32),
        )


# Models


@pytest.mark.parametrize("bits", [8, 4])
def test_an_nnx_optimizer(bits):
    model = nnx.Linear(128, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, memopt.low_bit(optax.adam(1e-2), bits=bits), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(jnp.eye(128)) - 1)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_linen_train_state_and_metrics():
    model = flax.linen.Dense(64)
    variables = model.init(jax.random.key(0), jnp.ones((1, 128)))
    tx = memopt.low_bit(optax.chain(jt.agc.adaptive_grad_clip(0.1), optax.adam(1e-2)))
    params, state = variables["params"], tx.init(variables["params"])
    updates, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert "agc/clipped_fraction" in jt.metrics(state)


def test_an_ensemble_under_vmap():
    tx = memopt.low_bit(optax.adam(1e-2))
    params = jnp.asarray(sample((3, 64, 64), True))
    state = jax.vmap(tx.init)(params)
    updates, state = jax.jit(jax.vmap(tx.update))(params, state, params)
    one, _ = tx.update(params[1], tx.init(params[1]), params[1])
    np.testing.assert_allclose(updates[1], one, rtol=1e-5)


# Mistakes


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"bits": 2}, "memopt.low_bit: `bits` is 2: give 8 or 4"),
        ({"block": 1}, "memopt.low_bit: `block` is 1: give 2 entries or more"),
        ({"bits": "8"}, "memopt.low_bit: `bits` is a str: give a whole number"),
        ({"min_size": -1}, "memopt.low_bit: `min_size` is -1: give a number of entries"),
        ({"keep": "embedding"}, "memopt.low_bit: `keep` is a str: give a sequence of strings"),
        ({"keep": ["("]}, "memopt.low_bit: `keep` has '(' is not a regular expression: missing"),
    ],
)
def test_mistakes_are_one_sentence(kwargs, words):
    with pytest.raises((ValueError, TypeError)) as error:
        memopt.low_bit(optax.adam(1e-3), **kwargs)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_pattern_that_finds_nothing():
    tx = memopt.low_bit(optax.adam(1e-3), keep=["embeding"])
    with pytest.raises(ValueError, match="`keep` has 'embeding', which finds no array"):
        tx.init({"embedding": jnp.ones((64, 64))})
    with pytest.raises(TypeError, match=r"memopt.low_bit: `inner` is .*: give a transformation"):
        memopt.low_bit(optax.adam)
