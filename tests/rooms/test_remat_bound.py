"""The planner's dynamic programme and its bound, beside an integer programme of the same chains.

The integer programme covers every schedule of this language. The forward pass runs each stage once,
and each backward pass of a stage may first run any earlier stages again, in any order of phases. A
carry may be kept, dropped and computed anew. What an option saves is computed in any phase and waits
for the backward pass, and while it waits the input and the output of its stage are in memory. An
option that saves nothing leaves nothing to wait, so its input may be dropped and come back. Bytes and
operations are the model's own. Left out are stages that run by halves and two options for one stage.

Without `defers` such an input waits too. That is the language of the dynamic programme: every stage
of a group runs again before its own backward pass.
"""

import jax
import numpy as np
import pytest
from benchmarks import remat_models
from jaxtricks.remat import _bound
from jaxtricks.remat._program import Program, Settings
from jaxtricks.remat._solver import Frontier
from jaxtricks.remat._stages import Option, Stage

from tests.reference import remat_ilp

MB = 1e6
CLOSE = 0.03  # of both passes
SAVED = None, (0, 1), (0,), ()


def chain(seed, n):
    """A frontier of n stages with two to four options."""
    rng = np.random.default_rng(seed)
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    stages = []
    for i in range(n):
        forward, count = rng.uniform(10, 100), rng.integers(2, 5)
        residuals = np.sort(rng.uniform(5, 100, count))[::-1] * MB
        extra = np.sort(rng.uniform(0, forward, count))
        residuals[-1] = extra[0] = 0.0
        options = tuple(
            Option(saved, 0, residual_bytes=r, extra=e, backward_bytes=rng.uniform(10, 50) * MB)
            for saved, r, e in zip([None, *SAVED[5 - count :]], residuals, extra, strict=True)
        )
        inside = rng.uniform(5, 30) * MB
        stages.append(Stage(empty, str(i), 0, False, options, forward, inside))
    carries = rng.uniform(5, 30, n) * MB
    carries[-1] = 4.0
    return Frontier(stages, np.triu(np.tile(carries, (n, 1))))


def real(model):
    """The frontier of a network."""
    settings = Settings(model.loss(), 0, False, None, None, None)
    with jax.numpy_rank_promotion("allow"):
        return Program(settings, model.shapes(), (0,)).frontier


def between(frontier, fraction):
    """(memory between the least and the most, operations that the schedule for it runs twice)."""
    least, most = frontier.memory[[0, -1]]
    memory = least + fraction * (most - least)
    i = np.searchsorted(frontier.memory, memory, "right") - 1
    return memory, frontier.extra[i]


def without_rounding(frontier, memory):
    """Bytes whose schedules fit into the memory after each number is rounded up to a slot."""
    roundings = 2 * len(frontier.stages) + 1
    return memory - roundings * frontier._slot_bytes


def check(frontier, fraction, close, seconds=60.0):
    memory, extra = between(frontier, fraction)
    smaller = without_rounding(frontier, memory)
    optimum = remat_ilp.least_extra(frontier.stages, frontier.carries, memory, seconds)
    same = remat_ilp.least_extra(frontier.stages, frontier.carries, smaller, seconds, defers=False)
    tolerance = 1e-6 * frontier.step
    assert np.isfinite(optimum) and not np.isnan(same)
    assert extra <= same + close * frontier.step
    assert optimum <= extra + tolerance
    assert _bound.least_extra(frontier, memory) <= optimum + tolerance


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("n", [4, 5, 6])
def test_a_chain_is_solved_as_by_an_integer_programme(n, seed):
    frontier = chain(seed, n)
    for fraction in (0.05, 0.3, 0.6):
        check(frontier, fraction, CLOSE)


@pytest.mark.parametrize("n", [8, 10])
def test_a_longer_chain_is_solved_as_by_an_integer_programme(n):
    frontier = chain(n, n)
    for fraction in (0.05, 0.4):
        check(frontier, fraction, CLOSE)


def test_a_network_is_solved_as_by_an_integer_programme():
    frontier = real(remat_models.mixer(3))
    assert len(frontier.stages) >= 6
    for fraction in (0.1, 0.4):
        check(frontier, fraction, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.1, 0.4])
@pytest.mark.parametrize("layers", [6, 12])
def test_a_deep_network_is_solved_as_by_an_integer_programme(layers, fraction):
    # Of 21 equal layers in tight memory none of the optima is proven in a minute.
    check(real(remat_models.mlp(layers)), fraction, CLOSE)


def test_the_integer_programme_knows_what_two_stages_need():
    empty = jax.make_jaxpr(lambda: ())().jaxpr
    keep = Option(None, 0, residual_bytes=10.0, backward_bytes=1.0)
    again = Option((), 0, extra=5.0, backward_bytes=6.0)
    stages = [Stage(empty, "", 0, False, (keep, again), 5.0, 1.0) for _ in range(2)]
    carries = np.triu(np.full((2, 2), 2.0))
    # Both saved: 10 + 2 + 10 and the transient of the last.
    for memory, extra in ((23.0, 0.0), (22.0, 5.0), (13.0, 5.0), (12.0, 10.0), (5.0, np.inf)):
        assert remat_ilp.least_extra(stages, carries, memory) == pytest.approx(extra)


def test_values_that_pass_through_stages_count_once():
    # One of 3 bytes from stage 0 to stage 2, one of 2 from stage 1 to stage 2.
    carries = np.array([[3.0, 5.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert remat_ilp.values(carries) == {(0, 2): 3.0, (1, 2): 2.0}
