"""Arguments of a wrong type end in one sentence with the argument's name, in every room."""

import array
import collections
import functools
import inspect
import json
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtricks import agc, amp, cyclical, ebn, longtail, memopt, remat, weightstd
from jaxtricks._arguments import ArgumentTypeError, checked

N = np.array([40, 20, 10, 5])
Z = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 0, 1], np.int32)
PARAMS = {"head": {"kernel": np.ones((3, 4), np.float32)}}


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_wrong_types_are_named(every):
    """In a process of its own, where nothing but the library checks types; what is left are shapes."""
    script = pathlib.Path(__file__).parents[1] / "arguments.py"
    done = subprocess.run(
        [sys.executable, script, str(every)], capture_output=True, text=True, check=True
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["tried"] > 8000 / every and counts["failed"] > 0.8 * counts["tried"]
    assert len(counts["unnamed"]) <= 0.03 * counts["failed"], counts["unnamed"]


def test_what_is_right_stays_right():
    """Numbers of every make, keys of both kinds, shapes, lists, tracers, partial functions."""
    for rate in (
        1,
        1.0,
        np.float32(1),
        np.float64(1),
        np.int8(1),
        jnp.ones(()),
        np.ones(()),
        optax.constant_schedule(1),
    ):
        memopt.sm3(rate)
    for step_size in (4, 4.5, np.int64(4), np.float32(4.5)):
        cyclical.cyclical(0.0, 1.0, step_size)
    for counts in ([9, 1], (9, 1), np.array([9, 1]), jnp.array([9.0, 1.0]), [np.float32(9), 1]):
        longtail.balanced_softmax(counts)
    loss = longtail.cross_entropy()
    for labels in (np.array([0, 1], np.uint8), jnp.eye(2)):
        loss(np.zeros((2, 2), np.float32), labels)
    for counts in (range(1, 3), array.array("i", [1, 2]), collections.deque([1, 2])):
        longtail.balanced_softmax(counts)
    # A list of what is traced.
    jax.vmap(lambda n: longtail.balanced_softmax([n, 10, 3, 1])(Z, Y))(jnp.arange(1.0, 4.0))
    agc.unitwise_norm(jnp.ones((2, 3)), ("in", "out"))
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        weightstd.stochastic_depth(key, jnp.ones((2, 3)), 0.5)
    amp.dynamic_loss_scale(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    memopt.state_bytes(optax.MultiSteps(optax.sgd(0.1), 2), PARAMS)
    remat.recompute_grad(functools.partial(loss))
    jax.jit(longtail.seesaw(N))(Z, Y)
    jax.vmap(lambda tau: longtail.logit_adjusted(N, tau)(Z, Y))(jnp.arange(3.0))
    jax.eval_shape(weightstd.standardize, jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.bfloat16))


def test_the_error_names_function_argument_and_types_and_nothing_else():
    with pytest.raises(ArgumentTypeError) as caught:
        longtail.balanced_softmax(counts={"secret": 1})
    assert str(caught.value) == (
        "longtail.balanced_softmax: `counts` is a dict: give an array [C] of real numbers"
    )
    with pytest.raises(ValueError, match=r"`clipping` is a str: give a number or a function"):
        agc.adaptive_grad_clip("0.1")
    with pytest.raises(TypeError, match=r"`x` is an array of complex64 \[2, 3\]: give an array"):
        ebn.extended_moments(jnp.full((2, 3), 7j, jnp.complex64))
    with pytest.raises(
        TypeError, match="is a list of float and int: give a sequence of whole numbers"
    ):
        weightstd.residual_scales([1.0, 2])
    with pytest.raises(TypeError, match="is an empty list: give an array"):
        longtail.balanced_softmax([])
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        agc.adaptive_grad_clip(axis=1)


def test_a_checked_function_is_still_itself():
    function = longtail.balanced_softmax
    assert function.__name__ == "balanced_softmax" and "Ren et al." in function.__doc__
    assert list(inspect.signature(function).parameters) == ["counts"]
    assert pickle.loads(pickle.dumps(function)) is function


def test_what_an_annotation_leaves_open_is_not_checked():
    @checked
    def open_(a, b: Any, *rest: int, c: Callable[..., Any] | None = None):
        return a, b, rest, c

    assert open_("x", object, 1, 2, c=len)[2] == (1, 2)
    with pytest.raises(ArgumentTypeError, match="`rest` is a str: give a whole number"):
        open_(1, 2, "x")
    with pytest.raises(ArgumentTypeError, match="`c` is an int: give a function or None"):
        open_(1, 2, c=3)
