"""Every pair of the ten tricks, and all ten, train together; neutral settings change nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from benchmarks import readme
from flax import nnx
from jaxtricks import KEYS

from tests import composition

ALL = frozenset(KEYS)
PAIRS = [pytest.param(pair, id=" ".join(sorted(pair))) for pair in composition.pairs()]
# Each trick with one other; `make test-all` trains the 40 other pairs.
MATCHED = {frozenset(KEYS[i : i + 2]) for i in range(0, len(KEYS), 2)}
FEW = [
    pytest.param(*p.values, id=p.id, marks=() if p.values[0] in MATCHED else pytest.mark.slow)
    for p in PAIRS
]
# What the slow tests run every pair under: more tricks, or other arguments of `train`.
FORMS = {
    "remat": ({"remat"}, {}),
    "bf16": ({"amp"}, {}),
    "four devices": (set(), {"devices": 4}),
    "linen": (set(), {"form": "linen"}),
}


def check(run, on):
    assert np.isfinite(run.losses).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((run.params, run.state)))
    assert run.ratio < 0.6, run.losses
    if "amp" in on:
        assert run.metrics["amp/skipped_steps"] == 0
    if "agc" in on:
        assert 0 <= run.metrics["agc/clipped_fraction"] <= 1


@functools.cache
def trained(on, **kwargs):
    return composition.train(on, **kwargs)


@pytest.mark.parametrize("on", FEW)
def test_every_pair_trains(on):
    check(trained(on), on)


@pytest.mark.slow  # tests/lab/test_lab.py has all ten at once, too
@pytest.mark.parametrize("form", ["nnx", "linen"])
def test_all_ten_train(form):
    check(trained(ALL, form=form), ALL)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on", PAIRS)
def test_every_pair_trains_in_other_forms(on, form):
    more, kwargs = FORMS[form]
    check(composition.train(on | more, **kwargs), on | more)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", KEYS)
def test_each_alone_and_all_but_one_in_other_forms(key, form):
    more, kwargs = FORMS[form]
    for on in (frozenset({key}), ALL - {key}):
        check(composition.train(on | more, **kwargs), on | more)


def same(a, b, rtol):
    np.testing.assert_allclose(a.losses, b.losses, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nnx", "linen"])
def test_remat_is_the_same_function(form):
    rest = ALL - {"amp", "echo", "cyclical"}
    same(composition.train(rest, form=form), composition.train(rest - {"remat"}, form=form), 1e-4)


@pytest.mark.slow
def test_four_devices_are_the_same_run():
    rest = ALL - {"amp", "echo", "cyclical"}
    same(composition.train(rest, devices=4), trained(rest), 1e-3)


def test_echo_of_factor_one_is_no_echo():
    echoed, plain = composition.batches({"echo"}, factor=1), composition.batches(set())
    for a, b in zip(echoed, plain, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)


def neutral(key):
    """(arguments of `train` with the trick in a setting that does nothing, without it)."""
    roles = composition.nnx_model(frozenset()).roles
    rate, adam = composition.RATE, optax.adam(composition.RATE)
    even = jt.longtail.logit_adjusted(np.full(composition.CLASSES, 7))
    constant = jt.cyclical.cyclical(rate, rate, 4)
    whole = functools.partial(jt.memopt.adafactor, rate, roles=roles)
    return {
        "agc": ({"tx": optax.chain(jt.agc.adaptive_grad_clip(1e9, roles=roles), adam)}, {}),
        "cyclical": ({"tx": optax.adam(constant)}, {}),
        "longtail": ({"loss": even}, {}),
        "amp": ({"policy": "full", "tx": jt.amp.skip_nonfinite(adam)}, {}),
        "memopt": (
            {"tx": whole(min_dim_size_to_factor=10**6)},
            {"tx": whole(factored=False)},
        ),
    }[key]


@pytest.mark.parametrize("key", ["agc", "cyclical", "longtail", "amp", "memopt"])
def test_a_neutral_setting_is_as_if_absent(key):
    with_it, without = neutral(key)
    same(composition.train((), **with_it), composition.train((), **without), 1e-4)


def test_extended_normalization_of_one_channel_is_batch_normalization():
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 1))
    rngs = nnx.Rngs(0)
    ours = jt.nnx.ExtendedBatchNorm(1, epsilon=1e-5, rngs=rngs)
    np.testing.assert_allclose(ours(x), nnx.BatchNorm(1, rngs=rngs)(x), atol=1e-5)


def test_standardizing_twice_is_standardizing_once():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
    once = jt.weightstd.standardize(kernel, preset="nfnet")
    np.testing.assert_allclose(jt.weightstd.standardize(once, preset="nfnet"), once, atol=1e-3)


@pytest.mark.parametrize("more", [(), ("weightstd",), ("ebn",), ("weightstd", "ebn")])
def test_fused_is_the_branches(more):
    on = frozenset({"reparam", *more})
    run = composition.train(on)
    net = jt.nnx.with_variables(composition.Net(on, nnx.Rngs(0)), run.params, run.state)
    net.eval()
    x = jnp.asarray(composition.images(8, seed=1)["image"])
    plain, report = jt.nnx.fuse(net, example=x)
    np.testing.assert_allclose(plain(x), net(x), rtol=1e-4, atol=1e-4)
    assert report.model.max_error <= report.model.bound
    assert type(plain.first) is nnx.Conv


def test_the_matrix_of_the_readme_is_whole():
    block = readme.part("composition")
    assert re.findall(r"^\| (\w+) \|", block, re.MULTILINE) == list(KEYS)
    figures = [float(x) for x in re.findall(r"\d+\.\d\d", block)]
    assert len(figures) == 45 + 10 + 2 and max(figures) < 0.6
