"""Data echoing with Grain's worker processes and with Orbax."""

import json
import multiprocessing
import os
import signal
import time

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from jaxtricks import echo

PLACES = ("after the workers", "inside them")


@pytest.fixture(autouse=True)
def parsed_flags():
    """What Grain asks of a script that has no absl flags of its own."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def pipeline(place, workers=2, factor=2.5, slow=False):
    def read(i):
        time.sleep(0.01 * slow)
        return np.int64(i)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.range(120).map(read).to_iter_dataset(options)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    if place == "after the workers":
        return echo.echo(dataset.mp_prefetch(processes), factor, distance=8).batch(4)
    return echo.echo(dataset, factor, distance=8).mp_prefetch(processes).batch(4)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_pipeline_with_workers_resumes(place):
    iterator = iter(pipeline(place))
    for _ in range(17):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    want = [batch.tolist() for batch in iterator]
    iterator.close()
    again = iter(pipeline(place))
    again.set_state(state)
    assert [batch.tolist() for batch in again] == want
    again.close()
    assert len(want) == 120 * 5 // 2 // 4 - 17


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_worker_that_is_killed_ends_in_an_error(place):
    iterator = iter(pipeline(place, slow=True))
    got = [next(iterator).tolist() for _ in range(3)]
    states = [iterator.get_state()]
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        for batch in iterator:
            got.append(batch.tolist())
            states.append(iterator.get_state())
    iterator.close()
    assert len(got) < 40  # what the workers had ready, not the 75 batches there are
    # What it gave out before is right, and from its last state all the rest follows.
    again = iter(pipeline(place))
    again.set_state(json.loads(json.dumps(states[-1])))
    rest = [batch.tolist() for batch in again]
    again.close()
    whole = iter(pipeline(place))
    assert got + rest == [batch.tolist() for batch in whole]
    whole.close()


@pytest.mark.slow
def test_another_number_of_workers_is_refused():
    iterator = iter(pipeline("after the workers", workers=2))
    state = iterator.get_state()
    iterator.close()
    for workers in (1, 3):
        other = iter(pipeline("after the workers", workers=workers))
        with pytest.raises(ValueError, match=f"2 workers, this pipeline has {workers} worker"):
            other.set_state(state)
        other.close()


def test_a_state_of_another_share_of_the_data_is_refused():
    """What a stage inside workers sees when their number changes; also of data that has changed."""
    stages = [echo.echo(grain.MapDataset.range(n), 2, distance=4) for n in (60, 40)]
    state = iter(stages[0]).get_state()
    with pytest.raises(ValueError, match=r"60 elements, this source has 40.*workers"):
        iter(stages[1]).set_state(state)


def test_orbax_saves_and_restores_a_stage(tmp_path):
    stage = echo.echo(grain.MapDataset.range(100), 2.5, batch_size=4).batch(4)
    iterator = iter(stage)
    for _ in range(21):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(21, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        again = iter(stage)
        manager.restore(21, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert [b.tolist() for b in again] == [b.tolist() for b in iterator]
