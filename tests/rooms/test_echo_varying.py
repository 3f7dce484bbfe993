"""Data echoing past the constant spread: laws for every schedule and factor, pool, classes, budget."""

import itertools
import json
import math
from collections import Counter
from fractions import Fraction

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtricks import echo

# --- laws, for random settings -------------------------------------------------------------------

FACTORS = st.fractions(min_value=1, max_value=5, max_denominator=8)
PER_CLASS = st.lists(FACTORS, min_size=1, max_size=4)


@st.composite
def changes(draw):
    """(element, factor) pairs, as a factor that tunes itself leaves behind."""
    starts = draw(st.lists(st.integers(1, 40), max_size=4, unique=True))
    return tuple((i, draw(FACTORS)) for i in (0, *sorted(starts)))


@st.composite
def stages(draw):
    """(the arguments of a stage over range(n), n, copies of each element)."""
    n = draw(st.integers(0, 45))
    schedule = draw(st.sampled_from(["spread", "adjacent", "pool"]))
    kwargs = {"schedule": schedule, "tag": True, "seed": draw(st.integers(0, 3))}
    if schedule != "adjacent":
        kwargs["distance"] = draw(st.integers(1, 12))
    factor = draw(st.one_of(FACTORS, PER_CLASS, changes()))
    if isinstance(factor, list):
        classes = len(factor)
        kwargs["class_of"] = lambda x: x * x % classes
    return {"factor": factor, **kwargs}, n, copies_of(factor, n)


def copies_of(factor, n):
    """Copies of elements 0 to n - 1, from the definition."""
    floor = math.floor
    if isinstance(factor, Fraction):
        return [floor((i + 1) * factor) - floor(i * factor) for i in range(n)]
    if isinstance(factor, list):
        seen, out = Counter(), []
        for i in range(n):
            c = i * i % len(factor)
            out.append(floor((seen[c] + 1) * factor[c]) - floor(seen[c] * factor[c]))
            seen[c] += 1
        return out
    out = []
    for i in range(n):
        since, e = [pair for pair in factor if pair[0] <= i][-1]
        out.append(floor((i - since + 1) * e) - floor((i - since) * e))
    return out


def run(arguments, n):
    iterator = iter(echo.echo(range(n), **arguments))
    return [(x.ordinal, x.copy) for x in iterator], iterator


def least_gap(pairs, default):
    where = {pair: at for at, pair in enumerate(pairs)}
    return min((where[i, k] - where[i, k - 1] for i, k in pairs if k), default=default)


@settings(max_examples=200, deadline=None)
@given(stages())
def test_each_element_goes_out_as_often_as_its_factor_says(stage):
    arguments, n, copies = stage
    pairs, _ = run(arguments, n)
    assert Counter(pairs) == Counter((i, k) for i in range(n) for k in range(copies[i]))
    if arguments["schedule"] != "pool":
        assert least_gap(pairs, 1) >= 1  # in order


@settings(max_examples=200, deadline=None)
@given(stages())
def test_the_distance_is_what_min_distance_says(stage):
    arguments, n, _ = stage
    pairs, iterator = run(arguments, n)
    if arguments["schedule"] == "pool":
        assert iterator.min_distance == 1
        return
    distance = arguments.get("distance", 1)
    least = min(least_gap(pairs, distance), distance)
    constant = isinstance(arguments["factor"], Fraction)
    # Where copies vary, the steps of the drain are counted from the last tick: a lower bound.
    assert iterator.min_distance == least if constant else 0 < iterator.min_distance <= least
    # Before the drain it holds always: up to the last element's first copy.
    last = pairs.index((n - 1, 0)) if n else 0
    assert least_gap(pairs[: last + 1], distance) >= distance


@settings(max_examples=40, deadline=None)  # each looks at every position
@given(stages())
def test_resume_is_exact_at_every_position_and_the_state_keeps_its_shape(stage):
    arguments, n, _ = stage
    want, _ = run(arguments, n)
    iterator, states = iter(echo.echo(range(n), **arguments)), []
    for _ in range(len(want) + 1):
        states.append(json.dumps(iterator.get_state()))
        next(iterator, None)
    shapes = {str(jax.tree.structure(json.loads(state))) for state in states}
    assert len(shapes) == 1
    for at, state in enumerate(states):
        again = iter(echo.echo(range(n), **arguments))
        again.set_state(json.loads(state))
        assert [(x.ordinal, x.copy) for x in again] == want[at:]


@settings(max_examples=100, deadline=None)
@given(stages())
def test_memory_is_bounded_by_held(stage):
    arguments, n, _ = stage
    alive = 0
    most = 0

    class Counted:
        def __init__(self, i):
            nonlocal alive, most
            self.i = i
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    class_of = arguments.pop("class_of", None)
    if class_of is not None:
        arguments["class_of"] = lambda x: class_of(x.i)
    stage = echo.echo(lambda: map(Counted, range(n)), **{**arguments, "tag": False, "guard": False})
    for element in stage:
        del element
    assert most <= stage.held + 2  # and the one that comes in, and the one that goes out
    assert alive == 0


# --- pool ----------------------------------------------------------------------------------------


def test_the_pool_shuffles_and_depends_on_its_seed():
    draws = [
        [
            x.ordinal
            for x in echo.echo(range(300), 3, schedule="pool", distance=64, tag=True, seed=s)
        ]
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] != sorted(draws[0])
    # While it fills, everything that is read goes out at once: no copies, no waiting.
    assert draws[0][:32] == list(range(32))


def test_the_pool_draws_every_copy_alike():
    """A copy stays for as many draws as the pool holds, on average; a few stay for long."""
    size, since, stays = 256, {}, []
    stage = echo.echo(range(20_000), 4, schedule="pool", distance=size, tag=True)
    for read, x in enumerate(stage):
        since.setdefault(x.ordinal, read)
        stays.append(read - since[x.ordinal])
    later = np.array(stays)[np.array(stays) > 0]
    assert 0.8 * size < later.mean() < 1.3 * size
    assert np.mean(later > 4 * size) < 0.05


def test_the_pool_bounds_how_long_a_copy_stays():
    size, latest = 16, 0
    newest = 0
    for x in echo.echo(range(20_000), 1.25, schedule="pool", distance=size, tag=True):
        newest = max(newest, x.ordinal)
        latest = max(latest, newest - x.ordinal)
    assert 2 * size < latest <= 4 * size + 2


def test_the_pool_reads_steadily():
    read = 0

    def source():
        nonlocal read
        for i in range(2000):
            read += 1
            yield i

    after = []
    for _ in itertools.islice(echo.echo(source, 4, schedule="pool", distance=100), 3000):
        after.append(read)
    assert max(np.diff(after)) <= 1
    assert abs((after[2500] - after[500]) - 2000 / 4) <= 2


# --- a factor per class --------------------------------------------------------------------------


def test_a_factor_per_class_balances_a_long_tail():
    labels = np.repeat([0, 1, 2], [400, 100, 40])[np.random.default_rng(0).permutation(540)]
    factors = 400 / np.bincount(labels)
    for given_factors in (factors, list(factors), jnp.asarray(factors)):
        stage = echo.echo(
            [{"label": int(y)} for y in labels],
            given_factors,
            class_of=lambda x: x["label"],
            batch_size=16,
        )
        assert Counter(x["label"] for x in stage) == {0: 400, 1: 400, 2: 400}


def test_a_class_that_is_not_there_is_named():
    stage = echo.echo([0, 1, 2], [1, 2], class_of=int)
    with pytest.raises(ValueError, match=r"class_of.*gives 2.*2 classes"):
        list(stage)


def test_an_endless_stream_keeps_the_distance_whatever_the_factors():
    stage = echo.echo(itertools.count, [1, 5], class_of=lambda i: i % 7 == 0, distance=24, tag=True)
    pairs = [(x.ordinal, x.copy) for x in itertools.islice(stage, 5000)]
    assert least_gap(pairs, 24) >= 24


# --- a factor that changed -----------------------------------------------------------------------


def test_changes_replay_the_stream_they_come_from():
    pairs = ((0, 1), (20, Fraction(9, 4)), (50, 4), (80, Fraction(3, 2)))
    iterator = iter(echo.echo(range(120), pairs, distance=8, tag=True))
    want = list(iterator)
    assert iterator.changes == pairs
    assert list(echo.echo(range(120), iterator.changes, distance=8, tag=True)) == want
    assert iter(echo.echo([1], 2.5)).changes == ((0, Fraction(5, 2)),)


# --- a budget ------------------------------------------------------------------------------------


def elements(n):
    return [np.zeros(100, np.uint8) for _ in range(n)]


def test_a_budget_makes_the_distance_what_it_allows():
    stage = echo.echo(elements(200), 3, max_bytes=6_000)
    iterator = iter(stage)
    assert iterator.distance == 0
    next(iterator)
    assert iterator.distance == 1 + 60 // 2
    # and it is resumed with the one it had
    for _ in range(100):
        next(iterator)
    again = iter(echo.echo(elements(200), 3, max_bytes=6_000))
    again.set_state(json.loads(json.dumps(iterator.get_state())))
    assert len(list(again)) == len(list(iterator)) and again.distance == 31
    # one that is large enough changes nothing
    rich = iter(echo.echo(elements(20), 3, max_bytes=10**9, batch_size=8))
    next(rich)
    assert rich.distance == 32
    pool = iter(echo.echo(elements(200), 3, schedule="pool", max_bytes=6_000))
    next(pool)
    assert pool.distance == 60


@pytest.mark.parametrize("factor", [Fraction(5, 4), Fraction(3, 2), 2, Fraction(7, 2), 5])
def test_what_a_budget_holds_fits(factor):
    for budget in (300, 1_000, 2_500, 5_000):
        iterator = iter(echo.echo(elements(300), factor, max_bytes=budget))
        next(iterator)
        held = echo.echo([], factor, distance=iterator.distance).held
        more = echo.echo([], factor, distance=iterator.distance + 1).held
        assert 100 * held <= budget
        assert 100 * more > budget - 100 * math.ceil(factor) or iterator.distance == 512


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(ValueError, match=r"max_bytes.*distance of 32.*give 6200"):
        next(iter(echo.echo(elements(10), 3, max_bytes=3_000, batch_size=32)))
    with pytest.raises(ValueError, match="max_bytes"):
        next(iter(echo.echo(elements(10), 3, max_bytes=3_000, distance=200)))
    for kwargs in ({"max_bytes": 0}, {"max_bytes": 10, "schedule": "adjacent"}):
        with pytest.raises(ValueError, match="max_bytes"):
            echo.echo([1], 2, **kwargs)


# --- copies that stay equal ----------------------------------------------------------------------


def test_filling_the_dict_of_one_copy_does_not_reach_the_next():
    source = lambda: [{"x": np.full(2, i), "more": {"y": i, "z": [i]}} for i in range(4)]

    def augment(element):  # what many map functions do
        element["x"] = element["x"] + 100
        element["more"]["y"] += 100
        element["more"]["z"].append(0)
        return element

    for schedule in ("spread", "adjacent", "pool"):
        for out in map(augment, echo.echo(source, 3, schedule=schedule)):
            assert out["x"][0] < 104 and out["more"]["y"] < 104 and len(out["more"]["z"]) == 2
    dataset = grain.MapDataset.source(source()).to_iter_dataset()
    for out in echo.echo(dataset, 3).map(augment):
        assert out["more"]["y"] < 104


def test_a_source_that_reuses_its_buffer_is_found_out():
    def source():
        buffer = np.zeros(3)
        for i in range(50):
            buffer[:] = i
            yield buffer

    for schedule in ("spread", "pool"):
        with pytest.raises(ValueError, match=r"source.*reuses a buffer.*copy"):
            list(echo.echo(source, 2, schedule=schedule, distance=8))
    # copies in a row go out before it is overwritten
    assert [x[0] for x in echo.echo(source, 2, schedule="adjacent")][:6] == [0, 0, 1, 1, 2, 2]
    assert len(list(echo.echo(lambda: (x.copy() for x in source()), 2, distance=8))) == 100


def test_a_donated_batch_is_found_out():
    stage = echo.echo(lambda: (jnp.full(4, i) for i in range(5)), 2, batch_size=1)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with pytest.raises(ValueError, match=r"element 0 were deleted.*donate"):
        for batch in stage:
            step(batch)
    assert sum(int(jnp.sum(x)) for x in stage) == 2 * 4 * 10


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor, kwargs, match",
    [
        ([1, 2], {}, "class_of"),
        (np.array([1.0, 2.0]), {}, "class_of"),
        (2, {"class_of": int}, "class_of"),
        ("auto", {"class_of": int}, "class_of"),
        ([1, 0.5], {"class_of": int}, "factor"),
        ([], {"class_of": int}, "factor"),
        (((1, 2), (3, 4)), {}, "element 0"),
        (((0, 2), (5, 3), (5, 4)), {}, "go up"),
        (((0, 2), (5, 0.5)), {}, "factor"),
        ("auto", {"max_factor": 0}, "max_factor"),
    ],
)
def test_mistakes_name_the_argument(factor, kwargs, match):
    with pytest.raises(ValueError, match=match):
        echo.echo([1, 2], factor, **kwargs)


def test_an_empty_source_is_an_empty_stream():
    for schedule in ("spread", "adjacent", "pool"):
        for factor in (2, 2.5, "auto", ((0, 3),)):
            iterator = iter(echo.echo([], factor, schedule=schedule))
            state = iterator.get_state()
            assert list(iterator) == []
            iterator.set_state(state)
            assert list(iterator) == []


def test_an_error_of_the_source_loses_nothing():
    broken = True

    class Source:
        def __init__(self):
            self.at = 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.at == 7 and broken:
                raise OSError("the network is down")
            if self.at == 20:
                raise StopIteration
            self.at += 1
            return self.at - 1

    for factor in (2.5, "auto"):
        want = list(echo.echo(range(20), factor, distance=4))
        broken, out = True, []
        iterator = iter(echo.echo(Source(), factor, distance=4))
        with pytest.raises(OSError, match="network"):
            for x in iterator:
                out.append(x)
        broken = False
        assert out + list(iterator) == want
