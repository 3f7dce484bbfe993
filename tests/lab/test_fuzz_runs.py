"""Bad bytes in what a run left behind: config.json, logs, plans and checkpoints."""

import copy
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jaxtricks import remat
from jaxtricks.lab import cli, data, report, rundir
from jaxtricks.lab.checkpoint import SUMS, Checkpoints, Restored
from jaxtricks.lab.commands import compare, fuse
from jaxtricks.lab.config import Train, Tricks, UserError
from jaxtricks.lab.distributed import Hosts, Placement
from jaxtricks.lab.trainer import Feed, Trainer

from tests.lab import mangle
from tests.lab.test_fuzz import TIMES, allowed

SESSION = {
    "command": "jaxtricks train --out 'runs/a b'",
    "started": "2025-01-01T00:00:00+00:00",
    "versions": {"python": "3.11", "jax": "0.7.2"},
    "hardware": {"devices": ["cpu:0"], "kind": "cpu", "cores": 2, "machine": "x86_64"},
    "git": {"commit": "0123abc", "branch": "main", "dirty": True},
}
ABOUT = {
    **SESSION,
    "config": dataclasses.asdict(Train(tricks=Tricks.of("echo"))),
    "data": {
        "name": "digits",
        "kind": "image",
        "train": 60,
        "validation": 10,
        "test": 30,
        "classes": ["0", "1", "2"],
        "counts": [30, 20, 10],
        "shape": [8, 8, 1],
        "notes": ["resized"],
    },
    "resumed": [{"step": 10, **SESSION}],
}
SUMMARY = {
    "loss": 0.5,
    "accuracy": 0.9,
    "balanced_accuracy": 0.8,
    "many": 1.0,
    "medium": 0.5,
    "few": None,
}
ABOUT = json.loads(json.dumps(ABOUT))
RESULT = {
    "kind": "image",
    **dict.fromkeys(("train", "validation", "test"), SUMMARY),
    **dict.fromkeys(("parameters", "state_bytes", "temp_bytes", "bytes_read"), 12345),
    "plan": {"peak_bytes": 9, "unplanned_peak_bytes": 10, "budget_bytes": 9, "extra_flops": 0.1},
}
ROWS = [{"step": i, "loss": 1.0 / i, "val_loss": 0.5, "val_accuracy": None} for i in (10, 20, 30)]
TIMING = [{"step": i, "steps": 10, "seconds": 0.5, "examples_per_s": 1280.0} for i in (10, 20, 30)]


def lines(rows):
    """Bytes of a log, lines of it damaged."""
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    one = st.sampled_from(range(len(rows))).flatmap(lambda i: mangle.damaged_json(rows[i]))
    return st.one_of(
        st.just(whole), mangle.damaged(whole), st.lists(one, max_size=4).map(b"\n".join)
    )


def rarely(value):
    """The file as it was, or damaged."""
    return st.one_of(st.just(json.dumps(value).encode()), mangle.damaged_json(value))


@TIMES
def test_runs_are_read(times):
    def check(about, rows, timing, result):
        with mangle.watched() as folder:
            for name, raw in zip(
                (rundir.CONFIG, rundir.METRICS, rundir.TIMING, rundir.RESULT),
                (about, rows, timing, result),
                strict=True,
            ):
                pathlib.Path(folder, name).write_bytes(raw)
            try:
                run = rundir.read(folder)
                compare.for_terminal([run, run]).encode()
                json.dumps(compare.points([run]))
                report.write(run, ("curves.png",))
                fuse.settings_of(run)
            except UserError as error:
                allowed(error)

    mangle.search(
        check,
        150,
        times,
        about=rarely(ABOUT),
        rows=lines(ROWS),
        timing=lines(TIMING),
        result=rarely(RESULT),
    )


@TIMES
def test_resuming(times):
    def check(about, rows, timing):
        with mangle.watched() as folder:
            path = pathlib.Path(folder)
            for name, raw in (
                (rundir.CONFIG, about),
                (rundir.METRICS, rows),
                (rundir.TIMING, timing),
            ):
                (path / name).write_bytes(raw)
            try:
                run = rundir.RunDir(folder, ABOUT, resume=True)
            except UserError as error:
                allowed(error)
                assert (path / rundir.CONFIG).read_bytes() == about  # nothing is changed then
            else:
                run.begin_again(20, SESSION)
                kept = [
                    json.loads(line) for line in (path / rundir.METRICS).read_text().splitlines()
                ]
                assert all(row["step"] <= 20 for row in kept)
                assert json.loads((path / rundir.CONFIG).read_text())["resumed"][-1]["step"] == 20
                report.write(rundir.read(folder), ()) if _sound(folder) else None

    def _sound(folder):
        try:
            rundir.read(folder)
        except UserError as error:
            allowed(error)
            return False
        return True

    mangle.search(check, 120, times, about=rarely(ABOUT), rows=lines(ROWS), timing=lines(TIMING))


def test_what_is_whole_is_read_whole(tmp_path):
    for name, value in ((rundir.CONFIG, ABOUT), (rundir.RESULT, RESULT)):
        (tmp_path / name).write_text(json.dumps(value))
    for name, rows in ((rundir.METRICS, ROWS), (rundir.TIMING, TIMING)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = rundir.read(tmp_path)
    assert (run.about, run.result, run.rows, run.timing) == (ABOUT, RESULT, ROWS, TIMING)
    assert fuse.settings_of(run) == Train(tricks=Tricks.of("echo"))


def test_the_command_line_ends_with_one_sentence(tmp_path, capsys):
    about = {**ABOUT, "config": {**ABOUT["config"], "steps": "many\n"}}
    (tmp_path / rundir.CONFIG).write_text(json.dumps(about))
    for command in ("compare", "fuse"):
        with pytest.raises(SystemExit) as error:
            cli.main([command, str(tmp_path)])
        said = capsys.readouterr().err
        assert error.value.code == 2 and said.count("\n") == 1
        assert (
            "config.json is damaged (Expected `int | null`, got `str` - at `$.config.steps`" in said
        )


def continuing(host, folder):
    """A trainer, as far as it goes on from what a checkpoint says of its data."""
    trainer, cfg = object.__new__(Trainer), Train(data="digits", batch=16)
    trainer.batches = Feed(cfg, data.load("digits"), Placement.of(cfg.parallel))
    trainer.folder, trainer.hosts = rundir.RunDir(str(folder), {}), Hosts()
    if host is None:
        host = {"feeds": [trainer.batches.get_state()], "window": [], "bytes_read": 5}
    return trainer, Restored(7, None, host)


def test_a_checkpoint_that_says_where_its_data_was(tmp_path):
    trainer, restored = continuing(None, tmp_path)
    trainer._continue(restored, print)
    assert trainer.bytes_before == 5


FEED = {"rows": [0, 16], "first": 0, "read": 0}


@pytest.mark.parametrize(
    "host", [{}, [], {"feeds": [{**FEED, "batches": {}}], "window": 3, "bytes_read": 0}]
)
def test_a_checkpoint_that_does_not_say_where_its_data_was(host, tmp_path):
    trainer, restored = continuing(host, tmp_path)
    with pytest.raises(UserError, match="step 7 in .* does not say how far its data was read"):
        trainer._continue(restored, print)


# Plans.


@functools.cache
def planned():
    """(loss, its arguments, the plan as a JSON value, the gradient)."""

    def loss(w, x):
        def layer(x, _):
            return jnp.tanh(x @ w), None

        for _ in range(3):
            x = jnp.sin(jnp.tanh(x @ w))
        return jax.lax.scan(layer, x, None, length=6)[0].sum()

    args = jnp.eye(8) * 0.9, jnp.ones((64, 8))
    text = remat.plan(loss, *args, budget_bytes=0.8, max_compiles=3).to_json()
    return loss, args, json.loads(text), np.asarray(jax.grad(loss)(*args))


@TIMES
def test_plans(times):
    loss, args, plan, gradient = planned()

    def check(raw):
        try:
            found = remat.plan_from_json(raw.decode("utf-8", "surrogateescape"), loss)
            str(found)
            result = jax.eval_shape(jax.grad(found.fn), *args)
        except ValueError as error:
            assert "plan" in str(error)
        else:
            assert result.shape == gradient.shape

    steps = st.sampled_from(schedules(plan["schedule"], len(plan["ends"])))
    other = steps.map(lambda s: json.dumps({**plan, "schedule": s}).encode())
    raw = st.one_of(mangle.damaged_json(plan), other)
    mangle.search(check, 80, times, raw=raw)


def schedules(steps, n):
    """Schedules that are almost right."""
    keep = [[i, [None, 0]] for i in range(n)]
    deep = {"again": keep}
    for _ in range(40):
        deep = {"again": [deep]}
    found = [
        keep,
        keep[::-1],
        keep[:-1],
        keep + keep[-1:],
        [deep],
        [{"again": []}, *keep],
        None,
        [],
    ]
    for choice in (
        [[0], 0],
        [[10**6], 0],
        [[0, 0], 0],
        [[], 0],
        [None, 2],
        [None, 4],
        [[], 3],
        [[99], 2],
    ):
        found += [[*keep[:i], [i, choice], *keep[i + 1 :]] for i in range(n)]
    return [copy.deepcopy(s) for s in (steps, *found)]


# Checkpoints.


def state(x):
    return {"kernel": jnp.full((8, 8), float(x)), "key": jax.random.key(x), "step": jnp.int32(x)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(
            step, state(step), {"window": [{"loss": 0.5}], "batches": {"next_index": step}}
        )
    checkpoints.close()
    return folder


def sum_again(folder):
    """Checksums that agree with the files, as somebody who means harm would leave them."""
    sums = json.loads((folder / SUMS).read_text())
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums}
    (folder / SUMS).write_text(json.dumps(sums))


def is_json(raw):
    return raw[:1] in (b"{", b"[")


# One array that can't be read, and Orbax leaves its coroutines for the others where they are.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*_read_array_index:pytest.PytestUnraisableExceptionWarning"
)
@TIMES
@pytest.mark.parametrize("agree", [False, True], ids=["sums-as-they-were", "sums-agree"])
def test_checkpoints(saved, times, agree):
    names = sorted(
        p.relative_to(saved / "2").as_posix() for p in (saved / "2").rglob("*") if p.is_file()
    )
    names = [n for n in names if not (agree and n == SUMS)]
    whole = {name: (saved / "2" / name).read_bytes() for name in names}

    def injured(name):
        raw = whole[name]
        changed = mangle.damaged_json(json.loads(raw)) if is_json(raw) else mangle.damaged(raw)
        return st.tuples(st.just(name), changed)

    def check(injury, stray):
        name, raw = injury
        with mangle.watched() as folder:
            run = pathlib.Path(folder, "run")
            shutil.copytree(saved, run)
            (run / "2" / name).write_bytes(raw)
            if agree:
                sum_again(run / "2")
            if stray:
                (run / stray).mkdir()
            told = []
            checkpoints = Checkpoints(run, keep=5)
            try:
                found = checkpoints.restore(state(0), told.append)
            except UserError as error:
                allowed(error)
                assert agree  # the layout was changed to that of another model
            else:
                assert found.step in (1, 2) and (found.step == 2 or told)
                if not agree:
                    np.testing.assert_array_equal(
                        found.state["kernel"], state(found.step)["kernel"]
                    )
            finally:
                checkpoints.close()

    injuries = st.sampled_from(names).flatmap(injured)
    strays = st.sampled_from(
        [None, None, None, "007", "\u0663", "9" * 200, "12.orbax-checkpoint-tmp"]
    )
    mangle.search(check, 30, times, injury=injuries, stray=strays)
