"""Offload as a third choice of the planner: its price, its options, and the step that it makes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import remat
from jaxtricks.remat import _host_memory, _memory, _program
from jaxtricks.remat._host_memory import HostMemory, host_memory
from jaxtricks.remat._schedule import Run
from jaxtricks.remat._solver import run_of

WIDTH, LAYERS = 32, 6


def loss(weights, x):
    def layer(x, w):
        up, down = w
        return x + jnp.tanh(jax.nn.gelu(x @ up) @ down), None

    x, _ = jax.lax.scan(layer, x, weights)
    return (x**2).mean()


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    normal = jax.random.normal
    up = 0.2 * normal(keys[0], (LAYERS, WIDTH, 4 * WIDTH))
    down = 0.2 * normal(keys[1], (LAYERS, 4 * WIDTH, WIDTH))
    return (up, down), normal(keys[2], (64, WIDTH))


def program(host):
    settings = _program.Settings(loss, 0, False, None, None, host)
    return _program.Program(settings, arguments(), (0,))


def in_loop(host):
    """Index of the stage with the loop, and its offloading options."""
    stages = program(host).frontier.stages
    for i, stage in enumerate(stages):
        options = [o for o in stage.options if o.offload]
        if options:
            return i, options
    return None, []


def test_a_byte_costs_what_the_chip_computes_meanwhile():
    assert host_memory("v5e:2x2", None) == HostMemory(197e12 / 1.5e10)
    assert host_memory("v6e:2x2", 1e11) == HostMemory(918e12 / 1e11)
    # A kind that the table lacks: no price without a bandwidth.
    assert host_memory("v9z:2x2", None) is None
    assert host_memory("v9z:2x2", 1e11).flops_per_byte > 1e3
    assert host_memory("v5e:2x2", 0) is None


@pytest.mark.parametrize("kind", ["TPU v5 lite", "NVIDIA H200", "NVIDIA A100-SXM4-40GB"])
def test_kinds_of_attached_chips(monkeypatch, kind):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(_memory, "platform", lambda topology: "gpu")
    assert host_memory(None, None).flops_per_byte > 1e3


@pytest.mark.stock
def test_a_backend_with_one_memory_has_no_such_choice():
    assert host_memory(None, 1e12) is None


@pytest.mark.parametrize("bandwidth", [-1.0, float("inf"), float("nan")])
def test_bandwidths_are_refused_in_a_sentence(bandwidth):
    with pytest.raises(ValueError, match="host_bandwidth is .* bytes per second"):
        remat.plan(loss, *arguments(), budget_bytes=0.5, host_bandwidth=bandwidth)


def test_offload_is_an_option_of_loops_by_its_price():
    _, cheap = in_loop(HostMemory(1e-3))
    assert cheap
    for option in cheap:
        assert set(option.offload) <= set(option.saved)
        assert option.host_bytes > 0
    _, dear = in_loop(HostMemory(1e9))
    # What takes longer than the loop itself costs more than computing it again.
    assert not dear
    assert not in_loop(None)[1]


@pytest.mark.stock
def test_a_step_that_offloads_has_the_same_gradients():
    planned = program(HostMemory(1e-3))
    i, options = in_loop(HostMemory(1e-3))
    steps = [Run(j) for j in range(len(planned.frontier.stages))]
    for option in options:
        steps[i] = run_of(i, option)
        fn = planned.schedule(tuple(steps)).apply(loss)
        args = arguments()
        result, expected = (jax.jit(jax.grad(f))(*args) for f in (fn, loss))
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))
        text = str(jax.make_jaxpr(jax.grad(fn))(*args))
        assert "host" in text


def test_plans_say_what_is_offloaded_and_are_read_back():
    _, options = in_loop(HostMemory(1e-3))
    run = run_of(0, options[0])
    assert "offload" in str(run)
    plan = remat.plan(loss, *arguments(), budget_bytes="1GB")
    text = plan.to_json().replace('"schedule": null', '"schedule": [[0, [[1], 1, false, [2]]]]')
    # Only what is saved can be offloaded.
    with pytest.raises(ValueError, match="plan again|no plan"):
        jax.make_jaxpr(remat.plan_from_json(text, loss).fn)(*arguments())


def test_sources_of_the_table_are_complete():
    kinds = set(_host_memory._DEVICE_KINDS.values())
    assert kinds <= set(_host_memory._CHIPS)
    assert all(chip.host_bandwidth > 0 for chip in _host_memory._CHIPS.values())
