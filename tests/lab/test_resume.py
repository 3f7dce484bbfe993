"""A run that was stopped, killed or damaged goes on as if nothing had happened, bit for bit."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from jaxtricks.lab import report, rundir
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import Parallel, Text, Train, Tricks
from PIL import Image

from tests.lab.run_dirs import log_of, steps_of

# Logs, checkpoints and evaluations at steps of their own; an iterator, statistics and averages with state.
RUN = Train(
    tricks=Tricks.of("echo", "memopt"),
    widths=(4,),
    steps=30,
    batch=16,
    accumulate=2,
    ema=0.9,
    label_smoothing=0.1,
    imbalance=3.0,
    log_every=4,
    eval_every=8,
    save_every=7,
    keep=2,
)


PLANNED = Train(
    tricks=Tricks.of("amp"),
    model="transformer",
    text=Text(context=16, features=16, layers=1, heads=2),
    remat_budget="0.95",
    steps=6,
    batch=8,
    accumulate=2,
    log_every=2,
    save_every=2,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.run(dataclasses.replace(RUN, out=str(out)))
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same run, sent SIGTERM in step 18: in the middle of a window of the log."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert stop_at(18, dataclasses.replace(RUN, out=str(out))) is None
    return out


def stop_at(step, cfg, number=signal.SIGTERM):
    """What train.run returns if the signal comes while that step runs."""
    from jaxtricks.lab import trainer

    def fit(compiled, state, batches, steps, *, after, **kwargs):
        def signalled(done, state, means):
            if done == step:
                os.kill(os.getpid(), number)
            return after(done, state, means)

        return original(compiled, state, batches, steps, after=signalled, **kwargs)

    original = trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", fit)
        return train.run(cfg)


def resumed(run, tmp_path, **changes):
    """The run directory of a copy of `run` that went on to its end."""
    out = tmp_path / "resumed"
    shutil.copytree(run, out)
    result = train.run(dataclasses.replace(RUN, out=str(out), resume=True, **changes))
    assert result == json.loads((out / rundir.RESULT).read_text())
    return out


def test_a_run_keeps_the_newest_checkpoints_and_explains_itself(whole):
    assert steps_of(whole) == [28, 30]
    rows = [json.loads(line) for line in log_of(whole).splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [row["step"] for row in rows if "val_loss" in row] == [8, 16, 24, 30]
    assert not any("second" in key or "time" in key for row in rows for key in row)
    about = json.loads((whole / rundir.CONFIG).read_text())
    assert about["config"]["tricks"]["echo"] and about["data"]["classes"] == list("0123456789")
    assert about["versions"]["jax"] and about["hardware"]["cores"] == os.cpu_count()
    timing = [json.loads(x) for x in (whole / rundir.TIMING).read_text().splitlines()]
    assert [t["steps"] for t in timing] == [4] * 7 + [2]


def test_sigterm_saves_and_going_on_is_bit_equal(whole, stopped, tmp_path, capsys):
    assert steps_of(stopped) == [14, 18]
    assert not (stopped / rundir.RESULT).exists()
    past = tmp_path / "past"
    shutil.copytree(stopped, past)
    with open(past / rundir.METRICS, "a") as file:  # lines past the checkpoint, the last one torn
        file.write('{"step": 20, "loss": 99.0}\n{"step": 24, "lo')
    out = resumed(past, tmp_path)
    assert "going on after step 18 of 30" in capsys.readouterr().out
    assert log_of(out) == log_of(whole)
    results = [json.loads((run / rundir.RESULT).read_text()) for run in (whole, out)]
    assert results[0]["test"] == results[1]["test"]
    assert json.loads((out / rundir.CONFIG).read_text())["resumed"][0]["step"] == 18


@pytest.mark.slow
def test_a_planned_run_goes_on_with_the_same_plan(tmp_path):
    cfgs = [dataclasses.replace(PLANNED, out=str(tmp_path / name)) for name in ("whole", "stopped")]
    whole = train.run(cfgs[0])
    assert stop_at(3, cfgs[1]) is None
    again = train.run(dataclasses.replace(cfgs[1], resume=True))
    assert {**again, "bytes_read": whole["bytes_read"]} == whole  # reading ahead ends where it ends
    assert log_of(cfgs[0].out) == log_of(cfgs[1].out)
    plan = whole["plan"]
    assert plan["peak_bytes"] <= plan["budget_bytes"] < plan["unplanned_peak_bytes"]
    report.write(rundir.read(cfgs[0].out), ())
    assert "peak of the planned step" in (tmp_path / "whole/report.md").read_text()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    whole, stopped, tmp_path, capsys
):
    damaged = tmp_path / "damaged"
    shutil.copytree(stopped, damaged)
    for path in (damaged / "checkpoints/18").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    out = resumed(damaged, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/18 can't be read" in said and "going on after step 14 of 30" in said
    assert log_of(out) == log_of(whole)
    assert (out / "checkpoints-unreadable/18").is_dir()


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    out = resumed(whole, tmp_path)
    assert log_of(out) == log_of(whole)
    assert steps_of(out) == steps_of(whole)


def test_resume_without_a_run_begins_one(tmp_path):
    cfg = dataclasses.replace(RUN, out=str(tmp_path / "new"), resume=True, steps=2)
    assert train.run(cfg)["test"]["loss"] > 0


def test_ctrl_c_saves_too(tmp_path):
    cfg = dataclasses.replace(RUN, out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        stop_at(3, cfg, signal.SIGINT)
    assert steps_of(tmp_path / "run") == [3]


@pytest.mark.slow
@pytest.mark.devices
def test_text_and_two_devices_resume_bit_equal(tmp_path):
    text = Text(context=16, features=16, layers=1, heads=2)
    cfg = dataclasses.replace(
        RUN,
        model="transformer",
        text=text,
        tricks=Tricks.of("echo"),
        imbalance=1.0,
        parallel=Parallel(mesh="data=2"),
        steps=9,
    )
    mesh = train.run(dataclasses.replace(cfg, out=str(tmp_path / "whole")))["mesh"]
    assert mesh["axes"] == "data=2, model=1" and mesh["sent"].keys() == {"all-reduce"}
    report.write(rundir.read(tmp_path / "whole"), ())
    assert "sent between devices in a step | " in (tmp_path / "whole/report.md").read_text()
    part = dataclasses.replace(cfg, out=str(tmp_path / "part"))
    assert stop_at(5, part) is None
    train.run(dataclasses.replace(part, resume=True))
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")


# Killed from outside, in processes of their own.

COMMAND = [sys.executable, "-m", "jaxtricks", "train", "--widths", "4", "--batch", "16"]
COMMAND += ["--steps", "150", "--log-every", "3", "--save-every", "10", "--echo", "--agc"]


def run_process(out, *args):
    done = subprocess.run(
        [*COMMAND, "--out", str(out), *args], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interrupt_process(out, line, number, *args):
    """(exit code, output) of a run that gets a signal once its log has that many lines."""
    process = subprocess.Popen(
        [*COMMAND, "--out", str(out), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = pathlib.Path(out) / rundir.METRICS
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= line):
        time.sleep(0.002)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


@pytest.mark.slow  # test_faults kills in every run of the tests
def test_killed_then_terminated_then_finished_is_bit_equal(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_process(whole)
    code, _ = interrupt_process(out, 6, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, output = interrupt_process(out, 12, signal.SIGTERM, "--resume")
    assert code == 0 and "stopped on SIGTERM, saved" in output, output
    assert not (out / rundir.RESULT).exists()
    run_process(out, "--resume")
    assert log_of(out) == log_of(whole)
    assert not list(out.rglob("*tmp*"))


@pytest.mark.slow
def test_ten_random_kills_of_a_zip_of_jpegs(tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(300):
            image = Image.fromarray(rng.integers(0, 256, (12, 12 + i % 3, 3), np.uint8))
            with archive.open(f"{'ab'[i % 2]}/{i}.jpg", "w") as file:
                image.save(file, "JPEG")
    args = ("--data", str(tmp_path / "set.zip"))
    run_process(tmp_path / "whole", *args)
    choose = random.Random(0)
    for i in range(10):
        out = tmp_path / str(i)
        interrupt_process(out, choose.randint(0, 49), signal.SIGKILL, *args)
        run_process(out, "--resume", *args)
        assert log_of(out) == log_of(tmp_path / "whole"), i
