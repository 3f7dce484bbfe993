"""Data echoing where something goes wrong: read errors at every position, threads, damaged states."""

import collections
import copy
import itertools
import json
import pickle
import sys
import threading
from fractions import Fraction

import grain
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtricks import echo
from jaxtricks.echo._checks import MOST_COPIES

N = 7
STAGES = {
    "spread": {"factor": 2, "distance": 4},
    "spread, a fraction": {"factor": Fraction(3, 2), "distance": 3},
    "spread, more": {"factor": 2.5, "distance": 2},
    "adjacent": {"factor": 3, "schedule": "adjacent"},
    "pool": {"factor": 2, "schedule": "pool", "distance": 5},
    "pool, a fraction": {"factor": Fraction(4, 3), "schedule": "pool", "distance": 3, "seed": 1},
    "classes": {"factor": [1, 3], "class_of": lambda i: i % 2, "distance": 3},
    "changes": {"factor": ((0, 1), (3, 3), (6, Fraction(3, 2))), "distance": 3},
    "budget": {"factor": 2, "max_bytes": 4 * sys.getsizeof(1)},
}


@pytest.fixture
def unchecked():
    """Call as users do, without the type checker of the tests in front."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- sources that raise once at each of some elements, and go on -----------------------------------


class Numbers:
    """An iterator over 0 to N - 1 that can be asked again after an error."""

    def __init__(self, bad):
        self.at, self.bad = 0, bad

    def __iter__(self):
        return self

    def __next__(self):
        if self.at in self.bad:
            self.bad.remove(self.at)
            raise OSError("a hiccup")
        if self.at == N:
            raise StopIteration
        self.at += 1
        return self.at - 1


class Stateful(Numbers):
    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


class Loader:
    """A loader with a state, whose iterators are generators: these end when they raise."""

    def __init__(self, bad):
        self.at, self.bad = 0, bad

    def __iter__(self):
        numbers = Numbers(self.bad)
        numbers.at = self.at
        for i in numbers:
            self.at = i + 1
            yield i
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


SOURCES = {
    "get_state": lambda bad: lambda: Stateful(bad),
    "function": lambda bad: lambda: Numbers(bad),
    "generator": lambda bad: lambda: (i for i in Numbers(bad)),
    "loader": Loader,
}


def collect(iterator, retries):
    """All that comes out, asking again after so many errors."""
    out = []
    while True:
        try:
            out.append(next(iterator))
        except StopIteration:
            return out
        except OSError:
            retries -= 1
            assert retries >= 0


def states_of(stage):
    """The state before each output, and the outputs."""
    iterator, states, out = iter(stage), [], []
    while True:
        states.append(json.loads(json.dumps(iterator.get_state())))
        try:
            out.append(next(iterator))
        except StopIteration:
            return states, out


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_read_error_and_a_retry_change_nothing_at_any_position(stage, source, unchecked):
    def make(bad):
        return echo.echo(SOURCES[source](bad), tag=True, **STAGES[stage])

    states, want = states_of(make([]))
    for fault in range(N + 1):
        assert collect(iter(make([fault])), 1) == want
        for at, state in enumerate(states):
            for bad in ([fault], [fault, fault], [0, fault]):
                iterator = iter(make(list(bad)))
                try:
                    iterator.set_state(state)
                except OSError:  # on its way: the next output tries again
                    assert iterator.get_state() == state
                assert collect(iterator, len(bad)) == want[at:]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("schedule", ["spread", "pool"])
def test_the_same_where_a_thread_reads(schedule, source, unchecked):
    def make(bad):
        return echo.echo(SOURCES[source](bad), "auto", schedule=schedule, distance=4, tag=True)

    states, want = states_of(make([]))
    for at in range(0, len(states), 2):
        for fault in (0, at - 1, at, N):
            iterator = iter(make([fault]))
            try:
                iterator.set_state(states[at])
            except OSError:
                assert iterator.get_state() == states[at]
            assert collect(iterator, 1) == want[at:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_that_is_taken_after_an_error_goes_on_exactly(stage):
    _, want = states_of(echo.echo(range(N), tag=True, **STAGES[stage]))
    for fault in range(N):
        iterator, out = iter(echo.echo(lambda: Stateful([fault]), tag=True, **STAGES[stage])), []  # noqa: B023
        with pytest.raises(OSError, match="hiccup"):
            out.extend(iterator)
        out = want[: len(want) - len(list(copy.deepcopy(iterator)))]
        again = iter(echo.echo(lambda: Stateful([]), tag=True, **STAGES[stage]))
        again.set_state(iterator.get_state())
        assert out + list(again) == want


def test_an_element_whose_class_could_not_be_told_is_asked_again():
    bad = [0, 3, 3, 8]

    def class_of(i):
        if i in bad:
            bad.remove(i)
            raise OSError("no answer")
        return i % 2

    want = list(echo.echo(range(N), [1, 3], class_of=lambda i: i % 2, distance=3))
    assert collect(iter(echo.echo(range(N), [1, 3], class_of=class_of, distance=3)), 4) == want


def test_a_generator_that_ended_in_an_error_does_not_end_the_stream_in_silence():
    iterator = iter(echo.echo((i for i in Numbers([4])), 2, distance=3))
    with pytest.raises(OSError, match="hiccup"):
        list(iterator)
    for _ in range(2):
        with pytest.raises(ValueError, match="pass the function that makes it"):
            next(iterator)


# --- states over the wrong data ----------------------------------------------------------------------


def test_an_iterator_that_was_read_before_takes_no_state():
    def numbers():
        yield from range(20)

    for make in (numbers, lambda: iter(range(20)), lambda: map(int, range(20))):
        source = make()
        stage = echo.echo(source, 2, distance=3)
        iterator = iter(stage)
        head = [next(iterator) for _ in range(7)]
        state = iterator.get_state()
        # another iterator of the stage, and where it can be known, another stage
        others = [stage, echo.echo(source, 2, distance=3)] if make is numbers else [stage]
        for other in map(iter, others):
            with pytest.raises(ValueError, match=r"read already.*pass the\s+function"):
                other.set_state(state)
        # a refusal moves nothing
        want = list(echo.echo(range(20), 2, distance=3))
        with pytest.raises(ValueError, match="read already"):
            iterator.set_state(state)
        assert head + list(iterator) == want


def test_a_state_of_a_longer_list_is_refused():
    states, _ = states_of(echo.echo(list(range(20)), 2, distance=4))
    for state in states:
        with pytest.raises(ValueError, match="saved over 20 elements, this source has 10"):
            iter(echo.echo(list(range(10)), 2, distance=4)).set_state(state)
    # one from before lengths were noted still goes on
    again = iter(echo.echo(list(range(20)), 2, distance=4))
    again.set_state({**states[7], "elements": -1})
    assert list(again) == list(echo.echo(range(20), 2, distance=4))[7:]


# --- damaged states ----------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(10**30), 10**300]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-2, 20), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.builds(np.zeros, st.integers(0, 3)),
)


@st.composite
def damaged(draw, state):
    """A state with one or two values changed, taken away, or with all of them gone."""
    if draw(st.integers(0, 19)) == 0:
        return draw(JUNK)
    state = copy.deepcopy(state)
    for name in draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=2)):
        if draw(st.integers(0, 4)) == 0:
            state.pop(name, None)
        elif isinstance(state.get(name), list) and state[name] and draw(st.booleans()):
            state[name][draw(st.integers(0, len(state[name]) - 1))] = draw(JUNK)
        elif isinstance(state.get(name), int) and draw(st.booleans()):
            state[name] += draw(st.integers(-2, 2))
        else:
            state[name] = draw(JUNK)
    return state


@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_state_is_one_sentence_or_a_state_of_this_stage(unchecked, data):
    stage = echo.echo(range(N), tag=True, **STAGES[data.draw(st.sampled_from(list(STAGES)))])
    states, want = states_of(stage)
    at = data.draw(st.integers(0, len(want)))
    state = data.draw(damaged(states[at]))
    iterator = iter(stage)
    try:
        iterator.set_state(state)
        out = list(iterator)
    except ValueError as error:
        text = str(error)
        assert text.startswith("echo: ") and "\n" not in text and len(text) < 300
    else:
        # What can't be told from a true state still gives outputs of this source, at most once each.
        assert set(out) <= set(want) and len(set(out)) == len(out)


def test_a_damaged_state_of_an_endless_source_does_not_read_for_ever():
    for name, arguments in STAGES.items():
        iterator = iter(echo.echo(itertools.count, **arguments))
        for _ in range(30):
            next(iterator)
        state = iterator.get_state()
        if "tick" in state:
            with pytest.raises(ValueError, match="`tick` is 1000000000000"):
                iter(echo.echo(itertools.count, **arguments)).set_state({**state, "tick": 10**12})
        else:
            assert "pool" in name


@pytest.mark.parametrize("bad", [{"at": "x"}, {}, None, 5, {"base64": "?"}, {"base64": 3}])
def test_a_state_that_the_source_cannot_take_is_named(bad):
    class Picky(Stateful):
        def set_state(self, state):
            self.at = int(state["at"] + 0)

    stage = echo.echo(lambda: Picky([]), 2, distance=3)
    iterator = iter(stage)
    state = iterator.get_state()
    with pytest.raises(ValueError, match=r"^echo: .*state"):
        iterator.set_state({**state, "source": bad})


def test_a_stream_can_be_copied_and_pickled():
    iterator = iter(echo.echo(range(20), 2.5, distance=4))
    head = [next(iterator) for _ in range(11)]
    for other in (copy.deepcopy(iterator), pickle.loads(pickle.dumps(iterator))):
        assert head + list(other) == list(echo.echo(range(20), 2.5, distance=4))


# --- threads -----------------------------------------------------------------------------------------


@pytest.fixture
def switching():
    """Let threads switch as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def from_threads(stage, workers, also=None):
    """What all of them take from one iterator, as a multiset."""
    iterator, parts, errors = iter(stage), [[] for _ in range(workers)], []

    def work(part):
        try:
            for x in iterator:
                part.append((x.ordinal, x.copy))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,), daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    while also is not None and any(thread.is_alive() for thread in threads):
        also(iterator)
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    return collections.Counter(itertools.chain(*parts))


@pytest.mark.parametrize("stage", [*STAGES, "auto", "grain"])
def test_threads_on_one_iterator_lose_nothing(stage, switching, unchecked):
    source, arguments = (
        range(800),
        {**STAGES.get(stage, {"factor": 2, "distance": 8}), "tag": True},
    )
    if stage == "auto":
        arguments["factor"] = "auto"
    if stage == "grain":
        source = grain.MapDataset.range(800)
    want = collections.Counter((x.ordinal, x.copy) for x in echo.echo(source, **arguments))
    for workers in (2, 4):
        assert from_threads(echo.echo(source, **arguments), workers) == want


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_that_is_taken_between_threads_is_a_true_one(stage, switching, unchecked):
    arguments = {**STAGES[stage], "tag": True}
    want = [(x.ordinal, x.copy) for x in echo.echo(range(500), **arguments)]
    states = []
    from_threads(
        echo.echo(range(500), **arguments), 2, lambda iterator: states.append(iterator.get_state())
    )
    for state in states[:: max(len(states) // 20, 1)]:
        again = iter(echo.echo(range(500), **arguments))
        again.set_state(state)
        rest = [(x.ordinal, x.copy) for x in again]
        assert rest == want[len(want) - len(rest) :]


# --- arguments ---------------------------------------------------------------------------------------

NOT_WHOLE = (2.5, 4.0, float("nan"), float("inf"), "4", True, [4], 1e300, -1, np.float32(3))
CALLS = {  # name: (call, what else it does not take)
    "distance": (lambda x: echo.echo([1], 2, distance=x), [0]),
    "pool": (lambda x: echo.echo([1], 2, schedule="pool", distance=x), [0]),
    "batch_size": (lambda x: echo.echo([1], 2, batch_size=x), [0]),
    "max_bytes": (lambda x: echo.echo([1], 2, max_bytes=x), [0]),
    "max_factor": (lambda x: echo.echo([1], "auto", max_factor=x), [0, None]),
    "seed": (lambda x: echo.echo([1], 2, schedule="pool", seed=x), [None]),
    "batch": (lambda x: echo.num_steps(10, x, 2), [0, None]),
    "fresh": (lambda x: echo.num_steps(x, 10, 2), [None]),
    "steps": (lambda x: echo.report(range(4), repr, steps=x), [0, None]),
    "a batch_size to time": (lambda x: echo.report(range(4), repr, batch_size=x), [0]),
    "factor of a step": (lambda x: echo.echo_step(lambda c, b: (c, b), x), [0, None]),
    "element": (lambda x: echo.echo([1], ((x, 2), (9, 3))), [None]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_that_is_not_whole_is_refused(name, unchecked):
    call, more = CALLS[name]
    for value in (*NOT_WHOLE, *more):
        with pytest.raises(ValueError, match=r"^echo\.\w+: .* is "):
            call(value)


def test_whole_numbers_of_every_kind_are_taken(unchecked):
    for four in (4, np.int64(4), np.uint8(4), jnp.int32(4)):
        stage = echo.echo(range(9), 2, distance=four, batch_size=four)
        assert list(stage) == list(echo.echo(range(9), 2, distance=4, batch_size=4))
        json.dumps(iter(stage).get_state())


@pytest.mark.parametrize("factor", [1001, 1e9, 1e300, 10**400, Fraction(10**9, 7)], ids=str)
def test_a_factor_that_would_fill_the_memory_is_refused(factor, unchecked):
    for call in (
        lambda: echo.echo([1], factor),
        lambda: echo.echo([1], [2, factor], class_of=int),
        lambda: echo.echo([1], ((0, 2), (5, factor))),
        lambda: echo.num_steps(10, 1, factor),
    ):
        with pytest.raises(ValueError, match=f"`factor` <= {MOST_COPIES}"):
            call()
    with pytest.raises(ValueError, match="max_factor"):
        echo.echo([1], "auto", max_factor=factor)
    assert len(list(echo.echo([1], MOST_COPIES))) == MOST_COPIES


def test_a_large_distance_costs_nothing_before_it_is_used():
    stage = echo.echo(grain.MapDataset.range(3), 2.5, distance=10**9)
    assert stage.min_distance == 10**9 and len(list(stage)) == 7


def test_keys_asks_for_one_typed_key(unchecked):
    legacy = jax.random.PRNGKey(0)
    many = jax.random.split(jax.random.key(0), 3)
    for key, match in ((legacy, "wrap_key_data"), (many, r"\(3,\)"), (0, "key"), (None, "key")):
        with pytest.raises(ValueError, match=rf"^echo\.augmentation_keys: `key` .*{match}"):
            echo.augmentation_keys(key, jnp.arange(2), jnp.zeros(2, int))
    typed = echo.augmentation_keys(jax.random.wrap_key_data(legacy), 3, 1)
    assert typed == echo.augmentation_keys(jax.random.key(0), 3, 1)
