"""The factor that tunes itself: on a simulated clock, in threads, across processes; and the report."""

import gc
import itertools
import json
import pathlib
import random
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction

import grain
import pytest
from jaxtricks import echo
from jaxtricks.echo._auto_factor import Tuner
from jaxtricks.echo._iterables import IterableSource
from jaxtricks.echo._schedules import CHANGES, Changing
from jaxtricks.echo._streams import ReadAhead

# --- the rule, on a simulated clock --------------------------------------------------------------


class World:
    """A source and a consumer that work side by side, in seconds per element and per output."""

    def __init__(self, *, lag=40, buffered=False, noise=0.0, most=6):
        self.copies = Changing(((0, Fraction(1)),), most)
        self.now = self.work = 0.0
        self.tuner = Tuner(self.copies, lambda: self.work, batch_size=4, clock=lambda: self.now)
        self.lag, self.buffered, self.noise = lag, buffered, noise
        self.read, self.outputs, self.random = 0, 0.0, random.Random(0)
        self.factors = []  # at each read

    def go(self, ratio, reads=4000):
        """Read so many elements, each `ratio` times as long as a step of one output takes."""
        for _ in range(reads):
            # The copies that a change adds come later.
            gain = float(self.factors[-self.lag] if len(self.factors) > self.lag else 1)
            takes = ratio * (1 + self.random.uniform(-self.noise, self.noise))
            self.now += max(takes, gain)
            waits = takes < gain
            self.work += takes * (0.02 if waits and self.buffered else 1)
            self.read += 1
            self.outputs += gain
            self.tuner(self.read, int(self.outputs))
            self.factors.append(self.copies.factor)
        return [float(f) for f in self.factors[-reads // 2 :]]


@pytest.mark.parametrize("lag", [1, 40, 150])
@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.0, 1.1, 1.6, 2.5, 3.2, 4.9, 5.8, 10])
def test_it_settles_just_above_the_ratio(ratio, lag):
    settled = World(lag=lag).go(ratio)
    assert len(set(settled)) == 1
    want = min(max(ratio, 1), 6)
    assert want * 0.97 <= settled[0] <= want + 0.5
    if ratio < 0.95:
        assert settled[0] == 1


def test_it_follows_a_ratio_that_changes():
    world = World()
    for ratio in (3.2, 1.6, 5.0, 0.5, 2.2, 10, 0.7):
        settled = world.go(ratio, 8000)[-2000:]
        want = min(max(ratio, 1), 6)
        assert 0.97 * want <= min(settled) and max(settled) <= want + 0.5


@pytest.mark.parametrize("ratio", [1.6, 3.2, 4.6])
def test_noise_does_not_make_it_hunt(ratio):
    world = World(noise=0.2)
    settled = world.go(ratio, 8000)
    assert sum(a != b for a, b in itertools.pairwise(settled)) <= 8
    assert sum(settled) / len(settled) <= ratio + 0.6
    assert sum(f >= 0.97 * ratio for f in settled) >= 0.9 * len(settled)


@pytest.mark.parametrize("ratio", [0.8, 1.6, 3.2, 4.6])
def test_a_source_with_a_buffer_of_its_own_is_found_by_trying(ratio):
    """It looks idle wherever it isn't the bottleneck, so that its ratio cannot be measured there."""
    settled = World(buffered=True).go(ratio, 30_000)
    assert sum(f >= min(ratio, 6) for f in settled) >= 0.85 * len(settled)
    assert sum(settled) / len(settled) <= max(ratio, 1) + 0.5


def test_moves_are_quarters_and_within_the_limits():
    world = World(most=4)
    for ratio in (10, 0.2, 3, 10):
        world.go(ratio)
    factors = {f for _, f in world.copies.changes}
    assert all((4 * f).denominator == 1 and 1 <= f <= 4 for f in factors)
    assert 4 in factors and 1 in factors


def test_a_long_log_is_kept_to_its_newest_part():
    copies = Changing(((0, Fraction(1)),), 6)
    for i in range(1, 200):
        copies.change(10 * i, Fraction(4 + i % 9, 4))
    state = json.loads(json.dumps(copies.state()))
    assert len(state) == CHANGES == len(Changing(((0, Fraction(2)),), 6).state())
    again = Changing(((0, Fraction(1)),), 6)
    again.restore(state)
    assert [again.take(i) for i in range(1900, 2000)] == [copies.take(i) for i in range(1900, 2000)]


# --- the thread that reads -----------------------------------------------------------------------


def test_reading_ahead_gives_the_same_and_knows_how_busy_the_source_was():
    def source():
        for i in range(20):
            time.sleep(0.005)
            yield i

    ahead = ReadAhead(IterableSource(source))
    first = [ahead.read() for _ in range(8)]
    assert first == [(i, i) for i in range(8)]
    time.sleep(0.1)  # it stops at its depth, which isn't work
    assert 8 * 0.005 <= ahead.busy < 8 * 0.005 + 0.08
    ahead.rewind(3)
    assert [ahead.read()[1] for _ in range(17)] == list(range(3, 20))
    for _ in range(2):
        with pytest.raises(StopIteration):
            ahead.read()


def test_its_thread_ends_with_it():
    def threads():
        return [t for t in threading.enumerate() if t.name == "jaxtricks-echo"]

    before = len(threads())
    iterator = iter(echo.echo(range(10**9), "auto"))
    next(iterator)
    assert len(threads()) == before + 1
    del iterator
    gc.collect()
    deadline = time.time() + 20
    while len(threads()) > before and time.time() < deadline:
        time.sleep(0.05)
    assert len(threads()) == before


@pytest.mark.parametrize("make", [lambda n: range(n), lambda n: grain.MapDataset.range(n)])
@pytest.mark.parametrize("schedule", ["spread", "adjacent", "pool"])
def test_a_stream_that_tuned_itself_is_resumed_and_replayed(schedule, make):
    def slow(n):
        dataset = make(n)
        for i in range(len(dataset)):
            time.sleep(0.006)  # well above what a busy machine takes between two reads
            yield dataset[i]

    kwargs = {"schedule": schedule, "tag": True, "batch_size": 1}
    if schedule != "adjacent":
        kwargs["distance"] = 6
    iterator = iter(echo.echo(lambda: slow(200), "auto", **kwargs))
    out, states = [], []
    for x in iterator:
        out.append(x)
        states.append(iterator.get_state())
    assert len(iterator.changes) > 1, "reading took all the time, and the factor stayed"
    # The whole stream again, from the log of changes alone.
    assert list(echo.echo(lambda: make(200), iterator.changes, **kwargs)) == out
    # And from any position: what was read by then goes out as it would have.
    for at, state in list(enumerate(states))[::190]:
        again = iter(echo.echo(lambda: slow(200), "auto", **kwargs))
        again.set_state(json.loads(json.dumps(state)))
        read = state["read"] if schedule == "pool" else state["tick"] + 1
        rest, want = ([x for x in xs if x.ordinal < read] for xs in (again, out[at + 1 :]))
        assert rest == want if schedule == "adjacent" else sorted(rest) == sorted(want)
        assert set(again.changes[:1]) <= set(iterator.changes)


def test_what_is_read_again_after_a_resume_is_not_decided_again():
    """However long the replay is, and however slow the source is in it."""

    def source():
        for i in range(400):
            time.sleep(0.001)
            yield i

    make = lambda: iter(echo.echo(source, "auto", batch_size=1, distance=40, tag=True))
    iterator = make()
    for _ in range(300):
        next(iterator)
    state = iterator.get_state()
    again = make()
    again.set_state(state)
    assert again.changes == iterator.changes  # it has read everything again by now
    assert state["tick"] - state["first"] > 100


def test_a_slow_source_is_echoed_and_a_fast_one_is_not():
    def source(seconds):
        def make():
            i = 0
            while True:
                time.sleep(seconds)
                yield (i := i + 1)

        return make

    for reading, low, high in ((0.012, 2, 6), (0.0005, 1, 1)):
        iterator = iter(echo.echo(source(reading), "auto", batch_size=1, distance=2))
        for _ in range(200):
            next(iterator)
            time.sleep(0.003)
        assert low <= iterator.changes[-1][1] <= high


def test_it_works_in_a_grain_pipeline():
    def slow(i):
        time.sleep(0.002)
        return i

    dataset = grain.MapDataset.range(200).map(slow)
    quick = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stage = echo.echo(dataset.to_iter_dataset(quick), "auto", batch_size=4)
    batches = grain.experimental.ThreadPrefetchIterDataset(stage.batch(4), prefetch_buffer_size=2)
    iterator = iter(batches)
    head = [next(iterator) for _ in range(10)]
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    again = iter(batches)
    again.set_state(state)
    rest = [x for batch in again for x in batch.tolist()]
    again.close()
    assert set(rest) | {x for batch in head for x in batch.tolist()} >= set(range(190))


# --- several processes ---------------------------------------------------------------------------

WORKER = """
import json, sys, time
import jax
port, me, count = sys.argv[1], int(sys.argv[2]), 2
jax.distributed.initialize(f"127.0.0.1:{port}", count, me)
from jaxtricks import echo

def source():
    for i in range(400):
        time.sleep(0.001 if me else 0.004)  # one host reads much more slowly
        yield i

out = []
for _ in range(2):  # a second stream does not see what the first one exchanged
    iterator = iter(echo.echo(source, "auto", batch_size=1, distance=4))
    steps = 0
    for _ in iterator:
        steps += 1
        time.sleep(0.001)
    out.append((steps, [(i, str(f)) for i, f in iterator.changes]))
print(json.dumps(out), flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = str(pathlib.Path(__file__).parents[2])
    run = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(i)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "PATH": ""},
        )
        for i in range(2)
    ]
    outs = [p.communicate(timeout=240)[0] for p in run]
    assert [p.returncode for p in run] == [0, 0]
    first, second = (json.loads(out.strip().splitlines()[-1]) for out in outs)
    assert first == second
    for steps, changes in first:
        assert len(changes) > 1 and steps > 400


# --- the report ----------------------------------------------------------------------------------


def sleeper(seconds):
    def make():
        while True:
            time.sleep(seconds)
            yield 0

    return make


def test_the_report_says_where_and_how_often():
    slow = echo.report(sleeper(0.03), lambda batch: time.sleep(0.01), steps=12)
    assert slow.placement == "before augmentation" and 2.5 <= slow.factor <= 4
    assert slow.ratio == pytest.approx(3, rel=0.3)
    assert slow.expected == pytest.approx(min(slow.factor, slow.ratio), rel=0.01)
    assert slow.measured > 1.5
    for line in ("R = upstream / step", "before augmentation", "measured speed-up"):
        assert line in str(slow)
    fast = echo.report(sleeper(0.001), lambda batch: time.sleep(0.01), steps=5)
    assert fast.placement == "none" and fast.factor == 1 and fast.measured is None
    assert fast.expected == 1


def test_the_report_moves_the_stage_behind_slow_host_work():
    def augment(x):
        time.sleep(0.01)
        return x

    slow = echo.report(
        sleeper(0.005), lambda batch: time.sleep(0.02), after=augment, batch_size=4, steps=6
    )
    assert slow.placement == "after augmentation" and slow.factor > 2
    assert slow.after > 2 * slow.upstream / 2


def test_the_report_refuses_what_it_cannot_time():
    with pytest.raises(ValueError, match="empty"):
        echo.report([], lambda batch: batch)
    for kwargs in ({"steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            echo.report([1], lambda batch: batch, **kwargs)
