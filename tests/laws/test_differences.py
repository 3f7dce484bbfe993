"""What optax does otherwise and the cards say so: each claim fails here on the day that optax mends it.

Every test has two halves: optax 0.2.8 still does it, and ours does not.
"""

import contextlib
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _jaxpr, agc, memopt
from jaxtricks.cyclical import cyclical, lr_range_test, one_cycle, warm_restarts

MEMOPT = "optax fixed this: remove the row from docs/techniques/memopt.md"
AGC = "optax fixed this: remove the row from docs/techniques/agc.md"
CYCLICAL = "optax fixed this: remove the row from docs/techniques/cyclical.md"


@contextlib.contextmanager
def raising(error, message, match=""):
    """pytest.raises that says what it means when nothing is raised."""
    try:
        yield
    except error as found:
        assert re.search(match, str(found)), f"another error than before: {found}"
    else:
        pytest.fail(message)


def first(tx, grad, param):
    """The first update of a tree of one leaf."""
    tree = {"w": jnp.asarray(param)}
    return np.asarray(tx.update({"w": jnp.asarray(grad)}, tx.init(tree), tree)[0]["w"])


def last(tx, sizes, param):
    """The last of many updates; gradient t is sizes[t] everywhere."""
    tree = {"w": param}

    def step(state, size):
        grads = {"w": jnp.full_like(param, size.astype(param.dtype))}
        updates, state = tx.update(grads, state, tree)
        return state, updates["w"]

    _, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(tree), jnp.asarray(sizes)))()
    return np.asarray(updates[-1], np.float64)


def state_shapes(tx, shape):
    """Shapes of the arrays in the state of one leaf, without scalars, and their elements over its own."""
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    shapes = [x.shape for x in jax.tree.leaves(state) if x.shape]
    return sorted(shapes), sum(math.prod(s) for s in shapes) / math.prod(shape)


def roles(*names):
    """An `roles=` argument: the same roles for a leaf and, with "batch" in front, for a stack of it."""
    return lambda path, shape: ("batch",) * (len(shape) - len(names)) + names


# The bare update of both: no clipping, no parameter scale, no rate.
theirs = optax.scale_by_factored_rms
ours = functools.partial(
    memopt.scale_by_adafactor, clipping_threshold=None, multiply_by_parameter_scale=False
)


class TestAdafactor:
    def test_has_no_learning_rate(self):
        # The first step is RMS(p) itself: every parameter is gone.
        np.testing.assert_array_equal(
            first(optax.adafactor(), [1.0], [100.0]), -100, err_msg=MEMOPT
        )
        np.testing.assert_allclose(first(memopt.adafactor(), [1.0], [100.0]), -1, rtol=1e-6)

    def test_factors_the_last_two_of_equal_axes(self):
        g = np.random.default_rng(0).normal(size=(10, 10, 10))
        g2 = np.square(g)
        row, column = (g2.mean(axis, keepdims=True) for axis in (0, 1))
        reference = g / np.sqrt(row * column / row.mean(1, keepdims=True))
        g = g.astype(np.float32)
        error = first(theirs(min_dim_size_to_factor=2), g, g) - reference
        assert np.max(np.abs(error)) > 0.1, MEMOPT
        error = first(ours(min_dim_size_to_factor=2), g, g) - reference
        assert np.max(np.abs(error)) < 1e-5
        same = ours(min_dim_size_to_factor=2, roles=memopt.PRESETS["big_vision"]["roles"])
        np.testing.assert_allclose(
            first(same, g, g), first(theirs(min_dim_size_to_factor=2), g, g), rtol=1e-5
        )

    @pytest.mark.parametrize("size", [0.0, 1e-4])
    def test_is_nan_in_float16_when_a_square_underflows(self, size):
        g, p = np.full(4, size, np.float16), np.ones(4, np.float16)
        assert np.all(np.isnan(first(optax.adafactor(1e-2), g, p))), MEMOPT
        assert np.all(np.isfinite(first(memopt.adafactor(1e-2), g, p)))

    def test_second_moment_freezes_in_bfloat16(self):
        sizes, v = np.repeat(np.float32([1, 2]), [6000, 2000]), 0.0
        for t, size in enumerate(sizes, 1):
            v += t**-0.8 * (float(size) ** 2 - v)
        p = jnp.ones(2, jnp.bfloat16)
        np.testing.assert_array_equal(last(theirs(factored=False), sizes, p), 2, err_msg=MEMOPT)
        np.testing.assert_allclose(last(ours(factored=False), sizes, p), 2 / v**0.5, rtol=1e-2)

    def test_decay_offset_is_nan_on_a_fresh_state(self):  # google-deepmind/optax#1791
        assert np.isnan(first(optax.adafactor(1e-2, decay_offset=5), [1.0], [1.0])), MEMOPT
        u = first(memopt.adafactor(1e-2, decay_offset=5), [1.0], [1.0])
        np.testing.assert_allclose(u, -0.01, rtol=1e-6)

    @pytest.mark.parametrize(
        ("shape", "names", "wrong"),
        [
            # A query kernel: no two axes of 128, and a whole copy of the parameter.
            ((1024, 16, 64), ("in", "out", "out"), (1024, 16, 64)),
            # 128 experts or layers count as an axis of the matrix.
            ((128, 64, 256), ("batch", "in", "out"), (64, 256)),
            # Biases of 256 layers are one matrix.
            ((256, 1024), ("batch", "none"), (1024,)),
        ],
    )
    def test_factors_by_size_not_by_meaning(self, shape, names, wrong):
        assert wrong in state_shapes(optax.adafactor(1e-2), shape)[0], MEMOPT
        tx = memopt.adafactor(roles=lambda *_: names, min_dim_size_to_factor=64)
        stacked = [n for n, name in zip(shape, names, strict=True) if name == "batch"]
        shapes, _ = state_shapes(tx, shape)
        assert wrong not in shapes
        assert all(list(s[: len(stacked)]) == stacked for s in shapes)

    def test_weight_decay_ignores_the_learning_rate(self):
        decay = lambda tx: first(tx, [0.0], [100.0])
        for rate in (1e-2, 1e-3):
            u = decay(optax.adafactor(rate, weight_decay_rate=0.1))
            np.testing.assert_allclose(u, -10, rtol=1e-6, err_msg=MEMOPT)
            u = decay(memopt.adafactor(rate, weight_decay=0.1))
            np.testing.assert_allclose(u, -10 * rate, rtol=1e-6)

    def test_floor_of_the_parameter_scale_is_no_argument(self):
        names = [n for n in inspect.signature(optax.adafactor).parameters if "eps" in n]
        assert names == ["eps"], MEMOPT
        np.testing.assert_allclose(
            first(optax.adafactor(1.0, eps=1e-6), [1.0], [0.0]), -1e-3, rtol=1e-5
        )
        u = first(memopt.adafactor(1.0, eps=(1e-30, 0.5)), [1.0], [0.0])
        np.testing.assert_allclose(u, -0.5, rtol=1e-6)

    def test_beta2_is_float32_under_x64(self, x64):
        beta2 = 1 - 2**-0.8
        expected, p = 2 / np.sqrt(beta2 + (1 - beta2) * 4), jnp.ones(2, jnp.float64)
        sizes = np.float64([1, 2])
        wrong = np.max(np.abs(last(theirs(), sizes, p) - expected))
        assert 1e-10 < wrong < 1e-6, MEMOPT
        np.testing.assert_allclose(last(ours(), sizes, p), expected, rtol=1e-15)

    @pytest.mark.devices
    def test_state_has_placeholders_that_no_sharding_fits(self):
        shapes, _ = state_shapes(optax.adafactor(1e-2), (256,))
        assert shapes == [(1,), (1,), (256,)], MEMOPT
        mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
        tx, params = optax.adafactor(1e-2), {"w": jnp.ones(256)}
        place = lambda _, spec: NamedSharding(mesh, spec)
        shardings = optax.tree.map_params(
            tx, place, jax.eval_shape(tx.init, params), {"w": P("data")},
            transform_non_params=lambda _: NamedSharding(mesh, P()),
        )  # fmt: skip
        with raising(ValueError, MEMOPT, "divisible|divide"):
            jax.jit(tx.init, out_shardings=shardings)(params)
        assert state_shapes(memopt.adafactor(1e-2), (256,))[0] == [(256,)]
        assert state_shapes(memopt.adafactor(1e-2), (256, 512))[0] == [(256,), (512,)]

    @pytest.mark.devices
    def test_state_moves_after_the_first_step(self):
        mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "model"))
        tx, place = optax.adafactor(1e-2), NamedSharding(mesh, P("data", "model"))
        params = {"w": jax.device_put(jnp.ones((256, 256)), place)}
        state = tx.init(params)
        _, after = jax.jit(tx.update)(params, state, params)
        for name in ("v_row", "v_col"):
            x, y = (getattr(s[0], name)["w"] for s in (state, after))
            assert x.sharding.is_fully_replicated and not y.sharding.is_fully_replicated, MEMOPT
        own = memopt.adafactor(1e-2)
        before = own.init(params)
        _, after = jax.jit(own.update)(params, before, params)
        specs = memopt.state_specs(own, params, {"w": P("data", "model")})
        for state in (before, after):
            assert [x.sharding.spec for x in state.v["w"]] == list(specs.v["w"])

    def test_cannot_be_injected_under_jit(self):  # google-deepmind/optax#412
        params = {"w": jnp.ones((4, 4))}
        init = lambda make: jax.jit(optax.inject_hyperparams(make)(learning_rate=0.1).init)(params)
        with raising(jax.errors.TracerBoolConversionError, MEMOPT):
            init(optax.adafactor)
        assert init(memopt.adafactor).hyperparams["learning_rate"] == np.float32(0.1)

    def test_otherwise_the_keywords_translate(self):
        # Every argument of optax.adafactor under its name here: the table of the card.
        theirs = optax.adafactor(
            learning_rate=0.02, min_dim_size_to_factor=8, decay_rate=0.7, decay_offset=-3,
            multiply_by_parameter_scale=True, clipping_threshold=1.5, momentum=0.9,
            dtype_momentum=jnp.float32, weight_decay_rate=0.01, eps=1e-8, factored=True,
            weight_decay_mask={"w": True, "b": False},
        )  # fmt: skip
        ours = memopt.adafactor(
            0.02, min_dim_size_to_factor=8, decay_rate=0.7, decay_offset=-3,
            multiply_by_parameter_scale=True, clipping_threshold=1.5, beta1=0.9,
            momentum_dtype="float32", weight_decay=0.01 / 0.02, eps=(1e-8, 1e-3), factored=True,
            weight_decay_mask={"w": True, "b": False},
        )  # fmt: skip
        assert len(inspect.signature(optax.adafactor).parameters) == 12, MEMOPT
        rng = np.random.default_rng(0)
        draw = lambda: {
            k: rng.normal(size=n).astype("f") for k, n in {"w": (8, 16), "b": 5}.items()
        }
        params = draw()
        states = [tx.init(params) for tx in (theirs, ours)]
        for _ in range(3):
            grads = draw()
            (a, left), (b, right) = (
                tx.update(grads, s, params) for tx, s in zip((theirs, ours), states, strict=True)
            )
            states = left, right
            for key in params:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-7)


def sm3_float64(grads):
    """The last step of SM3-II on a matrix; 1e-30 under the root, as in the reference."""
    row, column = 0.0, 0.0
    for g in grads:
        nu = np.minimum(row, column) + np.square(np.asarray(g, np.float64))
        row, column = nu.max(1, keepdims=True), nu.max(0, keepdims=True)
    return g / np.sqrt(nu + 1e-30)


class TestSm3:
    def test_fails_on_a_scalar(self):
        with raising(IndexError, MEMOPT):
            first(optax.sm3(0.1), 1.0, 1.0)
        np.testing.assert_allclose(first(memopt.sm3(0.1), 1.0, 1.0), -0.1, rtol=1e-6)

    def test_refuses_momentum_none(self):  # which its docstring offers; here that is 0
        with raising(TypeError, MEMOPT):
            first(optax.sm3(0.1, momentum=None), [1.0], [1.0])
        np.testing.assert_allclose(first(memopt.sm3(0.1, momentum=0.0), [1.0], [1.0]), -0.1)

    def test_refuses_a_schedule(self):
        rate = optax.constant_schedule(0.1)
        with raising(TypeError, MEMOPT):
            optax.sm3(rate)
        np.testing.assert_allclose(first(memopt.sm3(rate), [1.0], [1.0]), -0.1)

    def test_allocates_momentum_at_momentum_zero(self):  # google-deepmind/optax#1010
        assert state_shapes(optax.sm3(0.1, momentum=0.0), (512, 512))[1] > 1, MEMOPT
        assert state_shapes(memopt.sm3(0.1), (512, 512))[1] < 0.01

    @pytest.mark.parametrize("size", [1e-6, 1e-4])
    def test_small_gradients_drown_in_eps(self, size):
        grads = size * np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
        expected, small = -sm3_float64(grads), grads[0]
        error = {}
        for name, tx in (("optax", optax.sm3(1.0, momentum=0.0)), ("ours", memopt.sm3(1.0))):
            state = tx.update(small, tx.init(small), small)[1]
            u = tx.update(grads[1], state, small)[0]
            error[name] = np.max(np.abs(u - expected)) / np.max(np.abs(expected))
        assert error["optax"] > 0.05, MEMOPT
        assert error["ours"] < 1e-6

    def test_accumulator_stalls_in_bfloat16(self):
        sizes, p = np.ones(600, np.float32), jnp.ones(2, jnp.bfloat16)
        u = last(optax.sm3(1.0, momentum=0.0), sizes, p)
        np.testing.assert_allclose(u, -(256**-0.5), rtol=1e-2, err_msg=MEMOPT)
        np.testing.assert_allclose(last(memopt.sm3(1.0), sizes, p), -(600**-0.5), rtol=1e-2)


def stacking_error(tx, spikes):
    """Largest |update of a stack - stacked updates| over the largest update, at the second step."""
    rng = np.random.default_rng(0)
    params, small, large = rng.normal(size=(3, 4, 8, 16)).astype(np.float32)
    large = large * np.float32(spikes).reshape(4, 1, 1)

    def second(p, *grads):
        state = tx.init({"w": p})
        for g in grads:
            updates, state = tx.update({"w": g}, state, {"w": p})
        return np.asarray(updates["w"])

    one = np.stack([second(*leaf) for leaf in zip(params, small, large, strict=True)])
    return np.max(np.abs(second(params, small, large) - one)) / np.max(np.abs(one))


MATRIX = roles("in", "out")
STACKED = {
    # The largest layer is clipped, and all are with it.
    "adafactor, clipping": (
        optax.adafactor(1.0, factored=False, multiply_by_parameter_scale=False),
        memopt.adafactor(1.0, factored=False, multiply_by_parameter_scale=False, roles=MATRIX),
        MEMOPT,
    ),
    "adafactor, as it stands": (
        optax.adafactor(1.0, min_dim_size_to_factor=4),
        memopt.adafactor(1.0, min_dim_size_to_factor=4, roles=MATRIX),
        MEMOPT,
    ),
    "sm3": (optax.sm3(1.0, momentum=0.0), memopt.sm3(1.0, roles=MATRIX), MEMOPT),
    "agc": (optax.adaptive_grad_clip(0.01), agc.adaptive_grad_clip(0.01, roles=MATRIX), AGC),
}


@pytest.mark.parametrize("name", STACKED)
def test_layers_of_a_stack_are_mixed(name):
    wrong, right, message = STACKED[name]
    assert stacking_error(wrong, [1, 1, 1, 100]) > 0.05, message
    assert stacking_error(right, [1, 1, 1, 100]) < 1e-6


def is_muons(tx, shape):
    """Whether one leaf of this shape goes to Muon: it has one average, not Adam's two."""
    return len(state_shapes(tx, shape)[0]) == 2  # the coefficients are the other array


class TestMuon:
    @pytest.mark.parametrize(
        ("shape", "names"),
        [
            ((1024, 16, 64), ("in", "out", "out")),  # query
            ((16, 64, 1024), ("in", "in", "out")),  # attention output
            ((12, 256, 1024), ("batch", "in", "out")),  # scanned Dense
            ((3, 3, 64, 128), ("in", "in", "in", "out")),  # convolution
            ((12, 1024), ("batch", "none")),  # biases of scanned layers are one matrix
        ],
    )
    def test_is_for_whatever_has_two_axes(self, shape, names):
        is_matrix = "in" in names
        assert is_muons(optax.contrib.muon(0.02), shape) != is_matrix, MEMOPT
        params = {"w": shape, "matrix": (8, 6)}  # a tree without matrices is refused
        params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in params.items()}
        tx = memopt.muon(0.02, roles={"w": names, "matrix": ("in", "out")})
        state = jax.eval_shape(tx.init, params)
        assert sum(x.shape == shape for x in jax.tree.leaves(state)) == 2 - is_matrix

    def test_fails_on_a_matrix_without_elements(self):
        g = np.zeros((0, 4), np.float32)
        with raising(ZeroDivisionError, MEMOPT):
            first(optax.contrib.muon(0.02), g, g)
        assert first(memopt.muon(0.02, roles=MATRIX), g, g).shape == (0, 4)

    def test_is_nan_in_float16(self):  # where eps is lost or a square underflows
        g = np.zeros((8, 6), np.float16)
        assert np.all(np.isnan(first(optax.contrib.muon(0.02), g, g))), MEMOPT
        assert not np.any(first(memopt.muon(0.02, roles=MATRIX), g, g))

    def test_state_changes_its_dtype_at_the_first_step(self):
        params, grads = ({"w": jnp.ones((8, 6), d)} for d in (jnp.bfloat16, jnp.float32))

        def dtypes(tx):
            state = tx.init(params)
            after = jax.eval_shape(tx.update, grads, state, params)[1]
            return [
                {x.dtype.name for x in jax.tree.leaves(s) if x.ndim > 1} for s in (state, after)
            ]

        assert dtypes(optax.contrib.muon(0.02)) == [{"bfloat16"}, {"float32"}], MEMOPT
        assert dtypes(memopt.muon(0.02, roles=MATRIX)) == [{"float32"}, {"float32"}]

    def test_adaptive_sums_over_a_stack(self):
        g = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
        numbers = {"w": optax.contrib.MuonDimensionNumbers(1, 2)}
        tx = optax.contrib.muon(0.02, adaptive=True, muon_weight_dimension_numbers=numbers)
        one = optax.contrib.muon(0.02, adaptive=True)
        separate = np.stack([first(one, x, x) for x in g])
        ratio = np.max(np.abs(first(tx, g, g) / separate))
        assert ratio > 2, MEMOPT
        with pytest.raises(ValueError, match="`adaptive` is True"):
            first(memopt.muon(0.02, roles=MATRIX, adaptive=True), g, g)

    def test_a_tree_of_dimension_numbers_hides_the_parameters(self):
        params = {"w": jnp.ones((8, 6))}
        numbers = {"w": optax.contrib.MuonDimensionNumbers()}
        owned = lambda tx: optax.tree_utils.tree_map_params(tx, jnp.ndim, tx.init(params))
        with raising(ValueError, MEMOPT, "tree"):
            owned(optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers))
        state = owned(memopt.muon(0.02, roles={"w": ("in", "out")}))
        assert state.inner_states["muon"].inner_state[0].mu == {"w": 2}

    @pytest.mark.devices
    @pytest.mark.parametrize("spec", [P("data"), P("data", "model")])
    def test_fails_on_explicit_axes(self, spec):
        kind = jax.sharding.AxisType.Explicit
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        g = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
        with jax.set_mesh(mesh):
            params = {"w": jax.device_put(g, NamedSharding(mesh, spec))}

            def step(tx):
                return jax.jit(tx.update)(params, tx.init(params), params)[0]["w"]

            with raising(Exception, MEMOPT, "shard"):
                step(optax.contrib.muon(0.02))
            u = step(memopt.muon(0.02, roles=MATRIX))
        assert u.sharding.is_equivalent_to(params["w"].sharding, 2)
        np.testing.assert_allclose(u, first(optax.contrib.muon(0.02), g, g), rtol=1e-3, atol=1e-6)


class TestAdaptiveGradClip:
    @pytest.mark.parametrize(
        ("shape", "names"),
        [
            ((5, 8, 16), ("batch", "in", "out")),  # scanned Dense
            ((5, 3, 3, 8, 16), ("batch", "in", "in", "in", "out")),  # scanned Conv
            ((4, 8, 32), ("in", "in", "out")),  # attention output (H, K, D)
            ((3, 8, 16), ("in", "in", "out")),  # 1-D convolution
            ((5, 16), ("batch", "none")),  # stacked biases
        ],
    )  # the units are by rank: google-deepmind/optax#906, #1340, #1576
    def test_clips_over_wrong_units(self, shape, names):
        unit = tuple(i for i, name in enumerate(names) if name in ("in", "none"))
        g = np.random.default_rng(0).lognormal(sigma=2, size=shape).astype(np.float32)
        norm = np.sqrt(np.sum(np.square(g, dtype=np.float64), axis=unit, keepdims=True))
        bound = 0.5 * np.sqrt(math.prod(shape[i] for i in unit))
        expected = g * np.minimum(1, bound / norm)
        off = lambda tx: np.max(np.abs(first(tx, g, np.ones_like(g)) / expected - 1))
        assert off(optax.adaptive_grad_clip(0.5)) > 0.1, AGC
        assert off(agc.adaptive_grad_clip(0.5, roles=lambda *_: names)) < 1e-5

    def test_zeroes_the_update_when_a_float16_norm_overflows(self):
        g, p = np.full((4096, 1), 100, np.float16), np.ones((4096, 1), np.float16)
        np.testing.assert_array_equal(first(optax.adaptive_grad_clip(0.01), g, p), 0, err_msg=AGC)
        u = first(agc.adaptive_grad_clip(0.01), g, p)
        np.testing.assert_allclose(u.astype(np.float32), 0.01, rtol=1e-3)

    def test_does_not_say_what_it_clipped(self):
        p = {"w": jnp.ones((4, 3))}
        assert not jax.tree.leaves(optax.adaptive_grad_clip(0.01).init(p)), AGC
        tx = agc.adaptive_grad_clip(0.1)
        assert tx.update(p, tx.init(p), p)[1].clipped_fraction == 1


class TestSchedules:
    @pytest.mark.parametrize(
        ("setting", "make", "as_written", "one_less"),
        [
            ("onecycle_cos", optax.cosine_onecycle_schedule, 0.02, 0),
            (
                "onecycle_linear_3phase",
                functools.partial(optax.linear_onecycle_schedule, pct_final=0.6),
                0.05,
                0.03,
            ),
        ],
    )
    def test_one_cycle_is_not_torchs(self, setting, make, as_written, one_less, golden):
        arrays, meta = golden("clr_torch")
        h, expected = meta["settings"][setting]["kwargs"], arrays[f"lr/{setting}"]
        steps = jnp.arange(len(expected))
        off = lambda rate: np.max(np.abs(jax.vmap(rate)(steps) - expected)) / h["max_lr"]
        assert off(make(h["total_steps"], h["max_lr"])) > as_written, CYCLICAL
        # Told one step less, the cosine is right (where pct_start total is whole); the lines are not.
        assert off(make(h["total_steps"] - 1, h["max_lr"])) >= one_less, CYCLICAL
        shape = {"anneal": "linear", "three_phase": True} if "linear" in setting else {}
        assert off(one_cycle(h["max_lr"], h["total_steps"], **shape)) < 1e-6

    def test_warm_restarts_grow_and_end(self):  # google-deepmind/optax#304 asks for them
        cycle = dict(init_value=1.0, peak_value=1.0, warmup_steps=0)
        sgdr = lambda n: optax.sgdr_schedule([cycle | {"decay_steps": 10 * 2**k} for k in range(n)])
        size = lambda f: sum(1 for _ in _jaxpr.walk(_jaxpr.trace(f, jnp.int32(0))[0].jaxpr))
        two, four, eight = (size(sgdr(n)) for n in (2, 4, 8))
        assert eight - four == 2 * (four - two) > 20, CYCLICAL
        end = 10 * (2**4 - 1)
        assert sgdr(4)(end + 1) == sgdr(4)(end + 1000) == 0, CYCLICAL
        ours = warm_restarts(1.0, 10, period_mult=2)
        assert size(ours) < 60 and ours(end) == 1
        np.testing.assert_allclose(ours(end + 1000), sgdr(9)(end + 1000), rtol=1e-5)

    def test_there_are_no_triangles_and_no_range_test(self):
        modules = (optax, optax.schedules, optax.contrib)
        names = {n for module in modules for n in dir(module)} - {"cosine_onecycle_schedule"}
        found = {n for n in names if re.search("cycl|triang|range_test|lr_find", n.lower())}
        assert found == {"linear_onecycle_schedule"}, CYCLICAL
        assert cyclical(0.0, 1.0, 4)(4) == 1 and callable(lr_range_test)
