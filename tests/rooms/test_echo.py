"""Data echoing: the schedule by brute force, resume at every position for every kind of source."""

import functools
import json
import math
from collections import defaultdict
from fractions import Fraction

import grain
import numpy as np
import pytest
from jaxtricks import echo
from jaxtricks.echo._schedules import Constant, rational

FACTORS = (1, Fraction(3, 2), 2, 2.5, Fraction(7, 3), 4, 1.1, 2.9)


def origins(n, factor, **kwargs):
    """[(ordinal, copy)] of the outputs of a source of n elements, and the exhausted iterator."""
    iterator = iter(echo.echo(range(n), factor, tag=True, **kwargs))
    out = list(iterator)
    assert all(x.element == x.ordinal for x in out)
    return [(x.ordinal, x.copy) for x in out], iterator


def waiting(iterator):
    """Ordinals of the elements that a stream keeps."""
    stream = iterator._stream
    return sorted({i for outputs in (*stream._due.values(), stream._ready) for i, _, _ in outputs})


def gaps(out):
    where = {pair: position for position, pair in enumerate(out)}
    return [where[i, k] - where[i, k - 1] for i, k in out if k]


def copies(i, factor):
    e = Fraction(factor).limit_denominator(1000)
    return math.floor((i + 1) * e) - math.floor(i * e)


# --- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
def test_every_element_goes_out_as_often_as_the_rationals_say(factor):
    for kwargs in ({"schedule": "adjacent"}, {"distance": 7}, {"distance": 1}):
        for n in (0, 1, 2, 23, 100):
            out, _ = origins(n, factor, **kwargs)
            want = {(i, k) for i in range(n) for k in range(copies(i, factor))}
            assert len(out) == len(want) and set(out) == want
            # copies of one element come in order
            assert all(gap > 0 for gap in gaps(out))


@pytest.mark.parametrize("factor", FACTORS)
def test_the_distance_holds_from_the_first_output_to_the_last(factor):
    e = Fraction(factor).limit_denominator(1000)
    part = e - math.floor(e)
    for distance in (1, 2, 3, 5, 16):
        # how many elements are enough for it, as the card says
        times = 1 if not part else 1 / part if e < 2 else 2 - part
        enough = math.ceil(distance * times)
        for n in (enough, enough + 1, enough + 2, 2 * enough + 3, 5 * enough):
            out, iterator = origins(n, factor, distance=distance)
            assert min(gaps(out), default=distance) >= distance
            assert iterator.min_distance == distance


@functools.cache
def best_of_any_schedule(n, factor):
    """No schedule that reads at most once per output can beat this: after reading element i, which
    is output i or later, there are floor(n e) - 1 - i outputs left for its other copies."""
    e = Fraction(factor).limit_denominator(1000)
    left = [(math.floor(n * e) - 1 - i) // (copies(i, e) - 1) for i in range(n) if copies(i, e) > 1]
    # and n elements cannot keep any of them from repeating within n outputs
    return min([*left, n], default=None)


@pytest.mark.parametrize("factor", [Fraction(3, 2), 1.1, Fraction(19, 10), 2, 3, 4])
def test_a_source_that_is_too_short_gets_the_best_distance_there_is(factor):
    for distance in (2, 5, 16):
        for n in range(1, 60):
            out, iterator = origins(n, factor, distance=distance)
            best = best_of_any_schedule(n, factor)
            least = min(gaps(out), default=None)
            if least is not None:
                assert least >= min(distance, best)
                assert iterator.min_distance == min(least, distance)


@pytest.mark.parametrize("factor", [2.5, Fraction(7, 3), 2.9, 3.5])
def test_min_distance_says_what_a_short_source_gets(factor):
    for distance in (2, 5, 16):
        for n in range(1, 50):
            stage = echo.echo(range(n), factor, distance=distance, tag=True)
            iterator = iter(stage)
            assert iterator.min_distance == distance  # the promise, until the end is seen
            least = min(gaps([(x.ordinal, x.copy) for x in iterator]), default=distance)
            assert iterator.min_distance == stage.min_distance == min(least, distance)
            best = best_of_any_schedule(n, factor)
            assert best is None or least >= min(distance, best) // 2


@pytest.mark.parametrize("factor", [Fraction(3, 2), 2, 2.5, 4])
def test_no_batch_holds_two_copies(factor):
    out, _ = origins(700, factor, batch_size=32)
    for start in range(0, len(out), 32):
        batch = [i for i, _ in out[start : start + 32]]
        assert len(set(batch)) == len(batch)
    assert min(gaps(out)) >= 128  # 4 batches


@pytest.mark.parametrize("factor", FACTORS)
def test_reads_are_at_most_one_per_output_and_one_per_factor_in_the_long_run(factor):
    read, after = 0, []

    def source():
        nonlocal read
        for i in range(400):
            read += 1
            yield i

    for _ in echo.echo(source, factor, distance=8):
        after.append(read)
    assert after[0] == 1
    steps = np.diff(after)
    assert steps.min() >= 0 and steps.max() <= 1
    # steady: in the middle any stretch of outputs has its share of reads, up to a few
    for start in range(300, int(400 * float(factor)) - 300, 37):
        reads = after[start + 100] - after[start]
        assert abs(reads - 100 / float(factor)) <= 3


@pytest.mark.parametrize("factor", FACTORS)
def test_held_is_the_most_elements_kept(factor):
    stage = echo.echo(range(300), factor, distance=9)
    iterator = iter(stage)
    most = 0
    for _ in iterator:
        most = max(most, len(waiting(iterator)))
    # the one that is going out counts until its last copy is out
    assert stage.held - 1 <= most <= stage.held + 1
    assert not waiting(iterator)


def test_adjacent_is_flat_map_of_repeat():
    for factor in FACTORS:
        want = [(i, k) for i in range(50) for k in range(copies(i, factor))]
        assert origins(50, factor, schedule="adjacent")[0] == want
    iterator = iter(echo.echo([7, 8], 3, schedule="adjacent"))
    assert list(iterator) == [7, 7, 7, 8, 8, 8]
    assert iterator.min_distance == 1


def test_the_distance_by_default_is_512_or_four_batches():
    assert echo.echo([], 2).distance == 512
    assert echo.echo([], 2, batch_size=16).distance == 64
    assert echo.echo([], 2, batch_size=16, distance=16).distance == 16


def test_num_steps_and_len():
    for factor in FACTORS:
        for n in (0, 1, 99, 100):
            total = len(origins(n, factor, distance=3)[0])
            assert echo.num_steps(n, 8, factor) == total // 8
            assert len(echo.echo(range(n), factor)) == total


def test_a_float_factor_is_its_fraction():
    assert rational(0.1 + 1) == Fraction(11, 10)
    assert rational(np.float32(2.5)) == Fraction(5, 2)
    assert rational(np.int64(3)) == 3
    # no drift: exact at an index where floats have lost it
    i = 3 * 10**15
    assert Constant(Fraction(4, 3)).take(i + 2) == 2


# --- resume --------------------------------------------------------------------------------------


class Stateful:
    """An iterable whose iterators know their position."""

    methods = ("get_state", "set_state")

    def __init__(self, n):
        self.n = n
        self.opened = 0

    def __iter__(self):
        self.opened += 1
        return type("Iterator", (_Counter,), dict(zip(self.methods, (_get, _set), strict=True)))(
            self.n
        )


class _Counter:
    def __init__(self, n):
        self.n, self.at = n, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= self.n:
            raise StopIteration
        self.at += 1
        return self.at - 1


def _get(self):
    return {"at": self.at}


def _set(self, state):
    self.at = state["at"]


class TorchLike(Stateful):
    methods = ("state_dict", "load_state_dict")


class Loader:
    """A loader that has the state itself, as HF datasets and torch's StatefulDataLoader do."""

    def __init__(self, n):
        self.n, self.state = n, {"at": 0}
        self.resumed = 0

    def __iter__(self):
        for i in range(self.resumed, self.n):
            self.state["at"] = i + 1  # updated in place: a snapshot must be a copy
            yield i
        self.resumed = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)
        self.resumed = state["at"]


class Bytes(Stateful):
    """grain.DataLoader's iterators have bytes for a state."""

    def __iter__(self):
        iterator = _Counter(self.n)
        iterator.get_state = lambda: json.dumps(iterator.at).encode()
        iterator.set_state = lambda state: setattr(iterator, "at", json.loads(state.decode()))
        return iterator


def generator(n):
    def make():
        yield from range(n)

    return make


SOURCES = {
    "list": lambda n: list(range(n)),
    "generator function": generator,
    "get_state": Stateful,
    "state_dict": TorchLike,
    "loader": Loader,
    "bytes": Bytes,
    "grain": lambda n: grain.MapDataset.range(n).to_iter_dataset(),
}
KINDS = ({"schedule": "adjacent"}, {"distance": 4})


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("factor", [1, Fraction(3, 2), 2.5, 4])
def test_resume_is_exact_at_every_position(source, factor):
    for kwargs in KINDS:
        make = lambda: echo.echo(SOURCES[source](11), factor, tag=True, **kwargs)  # noqa: B023
        want = list(make())
        iterator = iter(make())
        states = []
        for _ in range(len(want) + 1):
            states.append(json.dumps(iterator.get_state()))
            next(iterator, None)
        shape = [(k, type(v)) for k, v in json.loads(states[0]).items()]
        for at, state in enumerate(states):
            state = json.loads(state)
            assert [(k, type(v)) for k, v in state.items()] == shape
            again = iter(make())
            again.set_state(state)
            assert again.get_state() == state
            assert list(again) == want[at:]
            # and on an iterator that has been used already
            used = iter(make())
            next(used), next(used)
            used.set_state(state)
            if at < len(want):
                assert next(used) == want[at]
                assert used.get_state()["position"] == iter_state_after(states, at)["position"]
            assert list(used) == want[at + 1 :]


def iter_state_after(states, at):
    return json.loads(states[at + 1])


def test_resume_of_a_resume():
    stage = echo.echo(range(40), 2.5, distance=6)
    want = list(stage)
    iterator, out = iter(stage), []
    while len(out) < len(want):
        again = iter(stage)
        again.set_state(json.loads(json.dumps(iterator.get_state())))
        iterator = again
        out += [next(iterator) for _ in range(min(7, len(want) - len(out)))]
    assert out == want


def test_a_resume_releases_what_is_not_needed():
    stage = echo.echo(range(200), 2.5, distance=9)
    for position in (0, 5, 30, 111, 250, 480, 499):
        iterator = iter(stage)
        for _ in range(position):
            next(iterator)
        again = iter(stage)
        again.set_state(iterator.get_state())
        next(again), next(iterator)
        assert waiting(again) == waiting(iterator)


def test_only_sources_without_a_state_are_fast_forwarded():
    for name, make in SOURCES.items():
        if name != "grain":
            iterator = iter(echo.echo(make(5), 2))
            assert iterator.fast_forwards == (name in ("list", "generator function"))


def test_a_one_shot_iterator_resumes_in_a_new_process_only():
    stage = echo.echo(iter(range(20)), 2, distance=3)
    iterator = iter(stage)
    head = [next(iterator) for _ in range(9)]
    state = iterator.get_state()
    want = head + list(iterator)
    with pytest.raises(ValueError, match="source"):
        iterator.set_state(state)
    again = iter(echo.echo(iter(range(20)), 2, distance=3))  # what a new process has
    again.set_state(state)
    assert list(again) == want[9:]


def test_a_state_of_another_schedule_or_a_shorter_source_is_refused():
    iterator = iter(echo.echo(range(50), 2.5, distance=6))
    for _ in range(60):
        next(iterator)
    state = iterator.get_state()
    for other in ({"distance": 7}, {"schedule": "adjacent"}):
        with pytest.raises(ValueError, match="factor 5/2, distance 6"):
            iter(echo.echo(range(50), 2.5, **other)).set_state(state)
    with pytest.raises(ValueError, match="saved over 50 elements, this source has 3"):
        iter(echo.echo(range(3), 2.5, distance=6)).set_state(state)
    with pytest.raises(ValueError, match="same elements"):
        iter(echo.echo(generator(3), 2.5, distance=6)).set_state(state)


def test_each_iteration_starts_again():
    stage = echo.echo([1, 2, 3], 2, distance=2)
    assert list(stage) == list(stage) != []


# --- Grain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 1.5, 2.5, 4])
def test_grain_checkpoints(factor):
    fresh = grain.MapDataset.range(14).map(lambda i: {"x": np.full(2, i)}).to_iter_dataset()
    batches = fresh.batch(3)
    for kwargs in (*KINDS, {"schedule": "pool", "distance": 5}):
        check = grain.experimental.assert_equal_output_after_checkpoint
        check(echo.echo(fresh, factor, **kwargs))
        check(echo.echo(batches, factor, **kwargs))  # batch echoing


def test_grain_checkpoints_inside_a_pipeline():
    fresh = grain.MapDataset.range(20).seed(1).shuffle().to_iter_dataset()
    stage = echo.echo(fresh, 2.5, distance=6, tag=True)
    assert isinstance(stage, grain.IterDataset)
    pipeline = stage.map(lambda e: {"x": e.element, "copy": e.copy}).batch(4)
    pipeline = grain.experimental.ThreadPrefetchIterDataset(pipeline, prefetch_buffer_size=2)
    grain.experimental.assert_equal_output_after_checkpoint(pipeline)
    batches = list(pipeline)
    assert all(len(set(batch["x"].tolist())) == len(batch["x"]) for batch in batches)
    below = grain.experimental.ThreadPrefetchIterDataset(fresh, prefetch_buffer_size=2)
    grain.experimental.assert_equal_output_after_checkpoint(echo.echo(below, 1.5, distance=3))


def test_grain_and_plain_sources_agree():
    for kwargs in KINDS:
        dataset = grain.MapDataset.range(33)
        want = list(echo.echo(range(33), 2.5, tag=True, **kwargs))
        assert list(echo.echo(dataset.to_iter_dataset(), 2.5, tag=True, **kwargs)) == want
        assert list(echo.echo(dataset, 2.5, tag=True, **kwargs)) == want  # a MapDataset too


def test_the_state_of_a_grain_parent_is_asked_once_per_element():
    asked = 0

    class Iterator(grain.DatasetIterator):
        def __next__(self):
            return next(self._parent)

        def get_state(self):
            nonlocal asked
            asked += 1
            return self._parent.get_state()

        def set_state(self, state):
            self._parent.set_state(state)

    class Dataset(grain.IterDataset):
        def __iter__(self):
            return Iterator(iter(self._parent))

    iterator = iter(echo.echo(Dataset(grain.MapDataset.range(50).to_iter_dataset()), 4, distance=5))
    for _ in iterator:
        iterator.get_state()
    assert asked <= 52
    assert iterator.min_distance == 5


# --- elements ------------------------------------------------------------------------------------


def test_tagged_outputs_count_ordinals_and_copies():
    counts = defaultdict(int)
    for element, ordinal, copy in echo.echo("abcdefgh", 2.5, distance=3, tag=True):
        assert element == "abcdefgh"[ordinal] and copy == counts[ordinal]
        counts[ordinal] += 1
    assert sum(counts.values()) == 20


def test_the_guard_makes_an_augmentation_in_place_raise():
    def source():
        for i in range(3):
            yield {"x": np.full(2, i), "name": "image", "rest": (np.ones(1), None)}

    with pytest.raises(ValueError, match="read-only"):
        for element in echo.echo(source, 2, schedule="adjacent"):
            element["x"] += 100
    with pytest.raises(ValueError, match="read-only"):
        next(iter(echo.echo(source, 2)))["rest"][0][0] = 5
    element = next(iter(echo.echo(source, 2)))
    assert element["name"] == "image" and element["rest"][1] is None
    # the caller's own array stays writeable
    mine = [np.zeros(2)]
    list(echo.echo(mine, 2))
    mine[0] += 1
    # what the guard is for
    seen = []
    for element in echo.echo(source, 2, schedule="adjacent", guard=False):
        element["x"] += 100
        seen.append(int(element["x"][0]))
    assert seen == [100, 200, 101, 201, 102, 202]


# --- errors --------------------------------------------------------------------------------------


def test_mistakes_raise_and_name_the_argument():
    for factor in (0.5, 0, -1, float("nan"), float("inf"), "two", None, True):
        with pytest.raises(ValueError, match="factor"):
            echo.echo([1], factor)
    with pytest.raises(ValueError, match=r"distance.*batch_size"):
        echo.echo([1], 2, distance=31, batch_size=32)
    with pytest.raises(ValueError, match="distance"):
        echo.echo([1], 2, distance=0)
    with pytest.raises(ValueError, match="batch_size"):
        echo.echo([1], 2, batch_size=0)
    with pytest.raises(ValueError, match="distance"):
        echo.echo([1], 2, schedule="adjacent", distance=4)
    with pytest.raises(Exception, match="schedule"):
        echo.echo([1], 2, schedule="random")
    with pytest.raises(ValueError, match="source"):
        echo.echo(5, 2)
    with pytest.raises(ValueError, match="batch"):
        echo.num_steps(10, 0, 2)


def test_the_card_runs():
    code = echo.__doc__.split("Use.\n")[1].split("\n\nSettings")[0]
    exec(compile("\n".join(line[4:] for line in code.splitlines()), "card", "exec"), {})


@pytest.mark.parametrize("schedule", ["spread", "adjacent"])
def test_a_position_before_the_first_output_of_its_tick(schedule):
    """get_state never gives it: the element would come again."""
    distance = {"distance": 4} if schedule == "spread" else {}
    stream = iter(echo.echo(list(range(20)), 2, schedule=schedule, **distance))
    assert stream.get_state()["position"] == 0
    for _ in range(40):
        next(stream)
        state = stream.get_state()
        with pytest.raises(ValueError, match="damaged, its `position` is 0"):
            iter(echo.echo(list(range(20)), 2, schedule=schedule, **distance)).set_state(
                state | {"position": 0}
            )
