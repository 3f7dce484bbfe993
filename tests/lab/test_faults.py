"""What goes wrong while a run is under way: said, survived, and never left half done.

fault                                   tested in
kill -9, at any moment                  here; test_resume (a zip of JPEGs)
checkpoint truncated, bit-flipped       test_checkpoint (every file of one); test_resume (a run goes on)
file of a run torn or damaged           test_fuzz_runs
NaN batch, diverged run                 here; test_memopt (an optimizer's state)
loss overflow bursts under float16      here; test_amp_training (the loss that is reached)
image damaged in mid-run                here; test_lab_data (every kind of pipeline), test_lab_folders
two processes in one run directory      here; test_rundir
worker process killed                   test_echo_workers
disk full while saving, while logging   here; test_checkpoint (its writer alone)
run directory that can't be written     here; test_resume (one that can't be made)
SIGTERM in start-up, evaluation, saving here; test_resume (in a step; Ctrl-C)
host lost                               test_multihost
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtricks import amp
from jaxtricks.lab import cli, data, report, rundir, trainer
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.checkpoint import SUMS, Checkpoints
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import Train, Tricks, UserError
from jaxtricks.lab.data import images as images_lib
from PIL import Image

from tests.lab.run_dirs import log_of, steps_of

# Logs, checkpoints and evaluations at steps of their own; an iterator, statistics and averages with state.
RUN = Train(
    tricks=Tricks.of("echo"),
    widths=(4,),
    steps=24,
    batch=16,
    ema=0.9,
    log_every=4,
    eval_every=8,
    save_every=5,
    keep=2,
)


SLOW = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every program of these runs is compiled once, for this process and for those that it starts."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def set_all(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    set_all(settings)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
        yield
    set_all(before)


def logged_steps(out):
    return [json.loads(line)["step"] for line in log_of(out).splitlines()]


def result_of(out):
    """What a run found; how far its threads had read ahead depends on when it was stopped."""
    result = json.loads((pathlib.Path(out) / rundir.RESULT).read_text())
    return {**result, "bytes_read": None, "temp_bytes": None}


def assert_goes_on_to(whole, cfg):
    """The run of `cfg`, resumed, ends as the uninterrupted one did, bit for bit."""
    assert train.run(dataclasses.replace(cfg, resume=True)) is not None
    assert log_of(cfg.out) == log_of(whole)
    assert result_of(cfg.out) == result_of(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.run(dataclasses.replace(RUN, out=str(out)))
    return out


@pytest.fixture
def cfg(tmp_path):
    """The same run, yet to begin."""
    return dataclasses.replace(RUN, out=str(tmp_path / "run"))


def followed(patch, owner, name, action):
    """The action comes after that function has done its work."""
    original = getattr(owner, name)

    def calling(*args, **kwargs):
        result = original(*args, **kwargs)
        action()
        return result

    patch.setattr(owner, name, calling)


def before_step(monkeypatch, step, action):
    """Calls `action` when that step is about to run."""
    original = trainer.fit

    def fit(compiled, state, batches, steps, *, after, start=0, **kwargs):
        def acting(done, *args):
            stop = after(done, *args)
            if done + 1 == step:
                action()
            return stop

        return original(compiled, state, batches, steps, start=start, after=acting, **kwargs)

    monkeypatch.setattr(trainer, "fit", fit)


# kill -9, from outside. A checkpoint every third step of a few ms: most of the time goes into saving.

KILLED = {"steps": 120, "save_every": 3, "log_every": 5, "eval_every": 50}
PHASES = "steps", "start-up", "steps"


def command(out, *more):
    options = {"widths": 4, "batch": 16, "keep": 2, "ema": 0.9, "out": out, **KILLED}
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in options.items()]
    return [sys.executable, "-m", "jaxtricks", "train", "--echo", *sum(pairs, ()), *more]


def begin(out, *more):
    """The running process; it prints to OUT.txt."""
    with open(out.with_suffix(".txt"), "w") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command(out, *more), stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def wait_until(true, process):
    while not true() and process.poll() is None:
        time.sleep(0.005)


def end(out, process):
    """What a process printed that is to end well."""
    code, printed = process.wait(timeout=600), out.with_suffix(".txt").read_text()
    assert code == 0, printed
    return printed


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """The run directory of an uninterrupted run of the command."""
    out = tmp_path_factory.mktemp("unkilled") / "run"
    train.run(cli.parse(command(out)[3:]))
    return out


def named(out):
    """Steps of the checkpoints that have their names, newest first."""
    names = [p.name for p in (out / "checkpoints").glob("*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest(out):
    """The newest checkpoint, 0 if there is none; the two to keep are to be whole."""
    steps = named(out)
    assert len(steps) <= 3  # the oldest may be on its way out
    for step in steps[:2]:
        path = out / "checkpoints" / str(step)
        files = [p for p in path.glob("*/**/*") if p.is_file()]
        sums = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        sums = {p.relative_to(path).as_posix(): digest for p, digest in sums.items()}
        assert sums == json.loads((path / SUMS).read_text()), step
    return max(steps, default=0)


def kill(out, phase, choose, begun):
    """Begin the run or go on with it, and kill it in that phase; seconds until its first checkpoint."""
    before, start = newest(out), time.monotonic()
    process = begin(out, "--resume")
    if phase == "steps":
        wait_until(lambda: max(named(out), default=0) > before, process)
        begun = time.monotonic() - start
    time.sleep(choose.uniform(0, 0.25 if phase == "steps" else begun))
    process.kill()
    printed = out.with_suffix(".txt").read_text()
    assert process.wait() == -signal.SIGKILL, "it had ended before: " + printed
    assert going_on(printed) in (None, before)
    return begun


def going_on(printed):
    """The step after which a run said that it goes on."""
    said = re.search(r"going on after step (\d+) of", printed)
    return int(said[1]) if said else None


@pytest.mark.parametrize(
    ("seed", "phases"),
    [
        pytest.param(0, PHASES, marks=SLOW),
        *(pytest.param(i, (*PHASES, "start-up"), marks=SLOW) for i in range(1, 6)),
    ],
)
def test_killed_at_any_moment_nothing_before_the_newest_checkpoint_is_lost(
    tmp_path, unkilled, seed, phases
):
    out, choose, begun = tmp_path / "run", random.Random(seed), 0.0
    for phase in phases:
        begun = kill(out, phase, choose, begun)
    last = newest(out)
    assert last > 0
    assert going_on(end(out, begin(out, "--resume"))) == last
    assert log_of(out) == log_of(unkilled)
    assert result_of(out) == result_of(unkilled)
    assert not (out / "checkpoints-unreadable").exists()
    assert not list(out.rglob("*tmp*")) and not list(out.rglob("*partial*"))


def test_killed_while_it_wrote_its_first_file_a_run_begins_anew(tmp_path):
    (tmp_path / f".{rundir.CONFIG}.partial").write_text('{"con')
    assert not rundir.RunDir(str(tmp_path), {"config": {}}, resume=True).resumed
    assert {p.name for p in tmp_path.iterdir()} == {rundir.CONFIG, rundir.LOCK}


# NaN.


def poison(monkeypatch, bad, seed=0):
    """Makes NaN of every image of the steps (counted from 0) that `bad`, which is traced, names."""
    original = step_lib.examples_of

    def examples_of(data):
        def examples(batch, key):
            images, labels = original(data)(batch, key)
            if key is not None:
                keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
                    jnp.arange(99)
                )
                same = (jax.random.key_data(keys) == jax.random.key_data(key)[None]).all(-1)
                images = jnp.where(bad(jnp.argmax(same)), jnp.nan, images)
            return images, labels

        return examples

    monkeypatch.setattr(step_lib, "examples_of", examples_of)


@pytest.mark.parametrize("tricks", [("amp",), pytest.param(("amp", "ebn"), marks=SLOW)], ids=str)
def test_with_amp_a_nan_batch_changes_only_counters(monkeypatch, tricks):
    poison(monkeypatch, lambda step: step == 1)
    cfg = dataclasses.replace(RUN, tricks=Tricks.of(*tricks))
    digits = data.load("digits", seed=0)
    program = step_lib.TrainStep(cfg, digits)
    step = jax.jit(program.step)
    batches = trainer.Feed(cfg, digits, program.placement)
    state, seen = program.start(0, digits.counts), []
    for _ in range(3):
        state, metrics = step(state, next(batches))
        seen.append(jax.device_get((state.params, state.model_state, state.opt_state)))
    (*before, tx_before), (*after, tx_after), (*last, tx_last) = seen
    same = lambda a, b: [
        bool(np.all(x == y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    ]
    assert all(same([before, tx_before.inner_state], [after, tx_after.inner_state]))
    assert not any(same(after, last)) and amp.all_finite(last) and np.isfinite(metrics["loss"])
    assert (tx_after.skipped, tx_after.consecutive, tx_last.consecutive) == (1, 1, 0)
    assert tx_after.scale == tx_before.scale / 2


def test_with_amp_a_run_passes_over_nan_batches(monkeypatch, cfg):
    poison(monkeypatch, lambda step: (step == 5) | (step == 6) | (step == 13))
    result = train.run(dataclasses.replace(cfg, tricks=Tricks.of("amp")))
    assert np.isfinite(result["test"]["loss"])
    rows = [json.loads(line) for line in log_of(cfg.out).splitlines()]
    assert [row["amp/skipped_steps"] for row in rows] == [0, 1.25, 2, 2.75, 3, 3]


def test_with_amp_a_run_that_skips_every_step_stops(monkeypatch, cfg):
    poison(monkeypatch, lambda step: step >= 10)
    cfg = dataclasses.replace(cfg, tricks=Tricks.of("amp"), steps=99, save_every=50, eval_every=99)
    words = (
        "gradients were not finite for 54 steps in a row, until step 64: lower --learning-rate or"
    )
    with pytest.raises(UserError, match=words):
        train.run(cfg)
    assert steps_of(cfg.out) == [50]  # of parameters that are as they were at step 10
    assert logged_steps(cfg.out)[-1] == 60


@pytest.mark.parametrize(
    ("bad", "words", "logged"),
    [
        (
            7,
            "at step 8 or shortly before: lower --learning-rate or add --agc",
            [4],
        ),  # seen by the log
        (
            9,
            "at step 10 or shortly before: lower",
            [4, 8],
        ),  # seen by the checkpoint, which isn't written
    ],
)
def test_a_run_that_diverges_stops_before_it_saves(monkeypatch, capsys, cfg, bad, words, logged):
    with monkeypatch.context() as patch:
        poison(patch, lambda step: step >= bad)
        with pytest.raises(UserError, match=words) as error:
            train.run(cfg)
    assert "its checkpoint of step 5 is from before" in str(error.value)
    assert steps_of(cfg.out) == [5] and logged_steps(cfg.out) == logged
    assert not (pathlib.Path(cfg.out) / rundir.RESULT).exists()


def test_parameters_that_are_not_finite_are_never_saved(monkeypatch, cfg):
    """The loss of a step is that of the parameters before it."""
    rate = lambda cfg: lambda step: jnp.where(step == 9, jnp.inf, 1e-3)
    monkeypatch.setattr(step_lib, "build_schedule", rate)
    with pytest.raises(UserError, match="the loss or a parameter is not finite at step 10 or"):
        train.run(cfg)
    assert steps_of(cfg.out) == [5]


def test_a_diverged_run_exits_with_2_and_one_sentence(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command(tmp_path / "run")[3:], "--learning-rate", "1e38"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert "not finite" in said and "(nothing is saved)" in said
    assert not steps_of(tmp_path / "run")


def test_the_device_is_read_only_where_something_is_written(monkeypatch, cfg):
    array = type(jnp.zeros(1))
    read, step, reads = array._value.fget, [0], set()

    def value(self):
        reads.add(step[0])
        return read(self)

    def counted(self, metrics):
        step[0] += 1
        return add(self, metrics)

    add = trainer.Meter.add
    monkeypatch.setattr(trainer.Meter, "add", counted)
    monkeypatch.setattr(array, "_value", property(value))
    train.run(dataclasses.replace(cfg, tricks=Tricks.of("amp"), steps=11))
    assert reads - {0} == {4, 5, 8, 10, 11}


# float16.


def test_bursts_of_overflow_under_float16_are_skipped_and_survived():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(64, 8)))
    y = jnp.tanh(x @ jnp.float32(rng.normal(size=(8, 1))))
    params = {
        "a": jnp.float32(rng.normal(size=(8, 16)) / 3),
        "b": jnp.float32(rng.normal(size=(16, 1)) / 4),
    }
    tx = amp.dynamic_loss_scale(
        optax.adam(1e-2), init=2.0**10, growth_interval=5, max_consecutive=3
    )

    def loss_fn(params, x):
        return ((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2).mean()

    def loud_loss_fn(params, x):
        # Linear, so that what is too large stays too large.
        return ((x @ params["a"] @ params["b"] - y) ** 2).mean()

    def make(loss_fn):
        @jax.jit
        def step(params, state, x):
            scale = amp.loss_scale(state)
            grad_fn = amp.value_and_grad(loss_fn, "p=f32,c=f16,o=f32", scale=scale)
            loss, grads = grad_fn(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return step

    quiet, loud = make(loss_fn), make(loud_loss_fn)
    bursts = {20: 1, 40: 2, 60: 3, 61: 2, 62: 1}  # step -> what is left of its burst
    bursts[41] = 1
    state, losses, scales, row = tx.init(params), [], [], 0
    for i in range(100):
        step, inputs = (loud, x * 1e6) if i in bursts else (quiet, x)
        new, after, loss = step(params, state, inputs)
        row = row + 1 if i in bursts else 0
        assert bool(amp.step_applied(state, after)) == (i not in bursts)
        assert int(after.consecutive) == row and amp.all_finite((new, after.inner_state))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), params, new)
        assert jax.tree.all(same) == (i in bursts)
        params, state = new, after
        amp.check_skipped(state)
        scales.append(float(state.scale))
        losses.append(float(loss))
    assert int(state.skipped) == 6
    assert all(scales[i] == scales[i - 1] / 2 for i in bursts)
    # Five steps after a burst it has grown again, and not before.
    assert scales[66] == scales[62] and scales[67] == 2 * scales[62]
    assert max(scales) < np.inf and losses[-1] < losses[19] < losses[0]


def test_check_knows_a_loss_scale_too():
    tx = amp.dynamic_loss_scale(optax.sgd(1.0), max_consecutive=1)
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(2):
        amp.check_skipped(state)
        _, state = tx.update(jnp.full(2, jnp.nan), state, params)
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        amp.check_skipped(state)
    assert not amp.step_applied(tx.init(params), state)
    with pytest.raises(ValueError, match="has neither dynamic_loss_scale nor"):
        amp.step_applied(optax.EmptyState(), optax.EmptyState())


# Data.


@pytest.fixture
def images(tmp_path):
    """A folder of 40 JPEGs in two classes."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("at", "readers"),
    [
        pytest.param("step 7", True, marks=SLOW),
        pytest.param("start", False, marks=SLOW),
        pytest.param("start", True, marks=SLOW),
        pytest.param("step 7", False, marks=SLOW),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named_and_the_mended_run_goes_on(
    monkeypatch, images, tmp_path, readers, at
):
    cfg = dataclasses.replace(
        RUN, data=str(images), batch=4, save_every=3, out=str(tmp_path / "whole")
    )
    train.run(cfg)
    if readers:
        monkeypatch.setattr(trainer, "_SMALL", 0)
    monkeypatch.setattr(
        images_lib, "ALL_UP_TO", 10
    )  # as a large set, only looked at here and there
    monkeypatch.setattr(images_lib, "SAMPLE", 3)
    good = {path: path.read_bytes() for path in images.rglob("*.jpg")}

    def damage():
        # The header stays right; those that were looked at stay whole.
        for path, raw in good.items():
            if path.name not in ("0.jpg", "2.jpg", "39.jpg"):
                path.write_bytes(raw[: len(raw) // 2])

    out = dataclasses.replace(cfg, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        if at == "start":
            followed(patch, train, "load", damage)
        else:
            before_step(patch, 7, damage)
        with pytest.raises(UserError, match=r"^[ab]/\d+.jpg can't be read \(.*\): remove it, or"):
            train.run(out)
    assert all(step in (3, 6, 9) for step in steps_of(out.out))
    assert bool(steps_of(out.out)) == (at != "start")
    for path, raw in good.items():
        path.write_bytes(raw)
    assert_goes_on_to(cfg.out, out)


@pytest.mark.parametrize("readers", [False, pytest.param(True, marks=SLOW)])
def test_images_that_break_in_mid_run_are_skipped_on_request(
    monkeypatch, capsys, images, tmp_path, readers
):
    """Stopped and resumed, with the broken images found by the look this time, it is the same run."""
    if readers:
        monkeypatch.setattr(trainer, "_SMALL", 0)
    (images / "a/broken.jpg").write_bytes(b"from the start")
    cfg = dataclasses.replace(
        RUN,
        data=str(images),
        batch=4,
        save_every=3,
        skip_unreadable=True,
        out=str(tmp_path / "whole"),
    )
    good = {path: path.read_bytes() for path in images.rglob("?.jpg")}

    def damage():
        for path, raw in good.items():
            path.write_bytes(raw[: len(raw) // 2])

    def mend():
        for path, raw in good.items():
            path.write_bytes(raw)

    with monkeypatch.context() as patch:
        followed(patch, train, "load", damage)
        result = train.run(cfg)
    mend()
    said = capsys.readouterr().out
    assert "can't be read any more" in said and "another image of its class is used" in said
    assert 0 < result["skipped_records"] <= len(good)
    text = report.markdown(rundir.read(cfg.out), ())
    assert f"{result['skipped_records']} images broke while the run read them" in text
    stopped = dataclasses.replace(cfg, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        followed(patch, train, "load", damage)
        before_step(patch, 11, terminate)
        assert train.run(stopped) is None
    # They are still broken: found by the look, and not left out, which would move all the others.
    assert train.run(dataclasses.replace(stopped, resume=True)) is not None
    assert log_of(stopped.out) == log_of(cfg.out)
    assert result_of(stopped.out) == result_of(cfg.out)
    left_out = json.loads((tmp_path / "stopped/config.json").read_text())["data"]["left_out"]
    assert left_out == ["a/broken.jpg"]


# Disks.

FULL = """
import resource, sys
from jaxtricks.lab import cli
from jaxtricks.lab import trainer
from jaxtricks.lab.checkpoint import Checkpoints

limit, step = map(int, sys.argv[1:3])
original, save = trainer.fit, Checkpoints.save

def save_and_wait(self, *args):
    save(self, *args)
    self._writing(self._manager.wait_until_finished)

def fit(*args, after, **kwargs):
    def filling(done, *rest):
        if done == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return after(done, *rest)

    return original(*args, after=filling, **kwargs)

trainer.fit, Checkpoints.save = fit, save_and_wait
cli.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("limit", "step", "words"),
    [
        (
            6000,
            10,
            "can't write checkpoints to {out}/checkpoints (File too large): free space or give",
        ),
        pytest.param(
            100,
            8,
            "can't write {out}/metrics.jsonl (File too large): free space or give",
            marks=SLOW,
        ),
    ],
    ids=["checkpoint", "log"],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(whole, cfg, limit, step, words):
    # No file may grow past so many bytes in the child: as on a full disk, writing fails in the middle.
    flags = "--echo --widths 4 --steps 24 --batch 16 --ema 0.9 --log-every 4 --eval-every 8 --save-every 5"
    args = ["train", *flags.split(), "--keep", "2", "--out", cfg.out]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(limit), str(step), *args],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("jaxtricks: " + words.format(out=cfg.out)), done.stderr
    assert done.stderr.count("\n") == 1
    assert named(pathlib.Path(cfg.out)) == [newest(pathlib.Path(cfg.out))] == [5]
    assert_goes_on_to(whole, cfg)


ABANDONED = """
import gc, pathlib, sys
from jaxtricks.lab.checkpoint import Checkpoints
from jaxtricks.lab.config import UserError

def fail():
    raise OSError("no space")

async def write_fragment():
    pass

class Callback:
    def __del__(self):
        raise RuntimeError("Event loop is closed")

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=1)
if sys.argv[2] == "fails":
    try:
        checkpoints._writing(fail)
    except UserError:
        pass
checkpoints.close()
left = write_fragment(), Callback()
del left
gc.collect()
"""


@pytest.mark.parametrize("write", ["fails", "succeeds"])
def test_a_write_that_orbax_abandons_adds_nothing_to_the_sentence(tmp_path, write):
    # Whether a failing write leaves some of these is a matter of its threads; Python names them at the end.
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(tmp_path / "checkpoints"), write],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "never awaited" not in done.stderr
    assert ("Event loop is closed" in done.stderr) == (write == "succeeds")


@pytest.mark.parametrize("name", ["checkpoints", pytest.param(rundir.METRICS, marks=SLOW)])
def test_a_run_directory_that_cannot_be_written_any_more(monkeypatch, whole, cfg, name):
    """Something else lies where the run writes, which stops root too."""
    path = pathlib.Path(cfg.out) / name
    aside = path.with_name("aside")

    def obstruct():
        wait = [c for c in checkpoints if c]
        wait[0]._manager.wait_until_finished()
        path.rename(aside)
        path.touch() if name == "checkpoints" else path.mkdir()

    checkpoints = []
    original = Checkpoints.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoints,
            "__init__",
            lambda self, *args: checkpoints.append(self) or original(self, *args),
        )
        before_step(patch, 7, obstruct)
        with pytest.raises(UserError, match=f"can't write .*{name}.* \\(.*\\): free space or give"):
            train.run(cfg)
    path.unlink() if name == "checkpoints" else path.rmdir()
    aside.rename(path)
    assert steps_of(cfg.out) == [5]
    assert_goes_on_to(whole, cfg)


def never(*args):
    raise AssertionError("computed")


def test_a_place_that_cannot_be_written_is_said_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "load", never)
    (tmp_path / "file").touch()
    for out in ("/proc/run", "/proc/self/a/b", "/sys/run"):
        with pytest.raises(UserError, match=f"can't write {out} \\(.*\\): free space or give"):
            train.run(dataclasses.replace(RUN, out=out))
    rundir.check_writable(str(tmp_path / "a/b"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@SLOW
def test_a_disk_that_is_mounted_read_only(whole, tmp_path):
    """In a mount namespace of its own, where root may not write either."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    shutil.copytree(whole, tmp_path / "disk/run")
    before = sorted(p for p in (tmp_path / "disk").rglob("*"))
    bound = (
        f"mount --bind {tmp_path}/disk {tmp_path}/disk && mount -o remount,ro,bind {tmp_path}/disk"
    )
    for out, more in ((tmp_path / "disk/new", ()), (tmp_path / "disk/run", ("--resume",))):
        line = " ".join(command(out, *more))
        done = subprocess.run(
            ["unshare", "-Urm", "sh", "-c", f"{bound} && {line}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"jaxtricks: can't write {out} (Read-only file system): ")
    assert sorted(p for p in (tmp_path / "disk").rglob("*")) == before


@SLOW
@pytest.mark.parametrize("kilobytes", [90, 160, 220])
def test_a_disk_that_is_full_is_one_sentence_and_nothing_of_asyncio(tmp_path, kilobytes):
    """A small disk of its own; Orbax writes in threads, whose errors asyncio would print too."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    (tmp_path / "disk").mkdir()
    flags = "--echo --widths 8 --steps 24 --batch 16 --save-every 2 --log-every 4 --out"
    line = f"{sys.executable} -m jaxtricks train {flags} {tmp_path}/disk/run"
    mount = f"mount -t tmpfs -o size={kilobytes}k none {tmp_path}/disk"
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f"{mount} && {line}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("jaxtricks: can't write ") and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


# Two processes.


def test_a_second_process_is_refused_and_spoils_nothing(whole, cfg):
    """While one trains, a second --resume, a fresh run and `fuse` are refused, each by a sentence."""
    said = {}

    def others():
        for words in (["train", "--resume"], ["train"], ["fuse", cfg.out]):
            more = [] if words[0] == "fuse" else [*flags_of(cfg), "--out", cfg.out]
            done = subprocess.run(
                [sys.executable, "-m", "jaxtricks", *words, *more],
                capture_output=True, text=True, timeout=600, check=False,
            )  # fmt: skip
            said[" ".join(words[:2])] = done.returncode, done.stderr

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 12, others)
        train.run(cfg)
    assert log_of(cfg.out) == log_of(whole) and result_of(cfg.out) == result_of(whole)
    assert len(said) == 3
    for code, text in said.values():
        assert code == 2 and text.count("\n") == 1, text
        assert f"is being written by process {os.getpid()} on" in text or "already holds" in text


def flags_of(cfg):
    """The command line of RUN."""
    options = {"widths": 4, "steps": 24, "batch": 16, "ema": 0.9, "log_every": 4, "eval_every": 8}
    options |= {"save_every": 5, "keep": 2}
    return [
        "--echo",
        *(w for k, v in options.items() for w in ("--" + k.replace("_", "-"), str(v))),
    ]


# SIGTERM.


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def preceded(patch, owner, name, action, nth=1):
    """The action comes at the nth call of that function, before it does its work."""
    original, calls = getattr(owner, name), []

    def calling(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            action()
        return original(*args, **kwargs)

    patch.setattr(owner, name, calling)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (step_lib.TrainStep, "compile"),
        pytest.param(data, "load", marks=SLOW),
        pytest.param(step_lib, "prepare", marks=SLOW),
        pytest.param(train, "open_folder", marks=SLOW),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_sigterm_in_start_up_ends_it_at_once(monkeypatch, whole, cfg, capsys, owner, name):
    with monkeypatch.context() as patch:
        followed(patch, owner, name, terminate)
        assert train.run(cfg) is None
    assert "stopped on SIGTERM before a step was done, nothing to save" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if owner in (step_lib, step_lib.TrainStep):
        assert not steps_of(cfg.out)
    assert_goes_on_to(whole, cfg)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "saved"),
    [
        (trainer.Trainer, "validate", 2, 16),
        (Checkpoints, "save", 2, 11),
        pytest.param(rundir.RunDir, "log", 3, 12, marks=SLOW),
    ],
    ids=["evaluation", "saving", "logging"],
)
def test_sigterm_in_steps_saves(monkeypatch, whole, cfg, capsys, owner, name, nth, saved):
    with monkeypatch.context() as patch:
        preceded(patch, owner, name, terminate, nth)
        assert train.run(cfg) is None
    assert "stopped on SIGTERM, saved: go on with --resume" in capsys.readouterr().out
    assert steps_of(cfg.out)[-1] == saved
    assert_goes_on_to(whole, cfg)


@SLOW
def test_sigterm_while_a_run_is_restored_loses_nothing(monkeypatch, whole, cfg, capsys):
    with monkeypatch.context() as patch:
        preceded(patch, Checkpoints, "save", terminate, 3)
        assert train.run(cfg) is None
        preceded(patch, Checkpoints, "_read", terminate)
        assert train.run(dataclasses.replace(cfg, resume=True)) is None
    assert steps_of(cfg.out) == [15, 16]
    assert_goes_on_to(whole, cfg)


def test_sigterm_in_the_last_evaluation_lets_it_finish(monkeypatch, whole, cfg):
    preceded(monkeypatch, trainer.Trainer, "result", terminate)
    assert train.run(cfg) is not None
    assert result_of(cfg.out) == result_of(whole)


def test_ctrl_c_in_start_up_is_what_it_always_is(monkeypatch, cfg):
    monkeypatch.setattr(train, "load", lambda cfg: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train.run(cfg)
    assert not pathlib.Path(cfg.out).exists()


def test_a_process_that_starts_up_exits_with_0(tmp_path):
    out = tmp_path / "run"
    process = begin(out)
    wait_until((out / rundir.CONFIG).exists, process)
    process.terminate()
    assert "stopped on SIGTERM" in end(out, process)
