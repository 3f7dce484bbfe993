"""Two processes of four devices each on this machine: together as one, killed, resumed. `make multihost`.

Every test trains the same small run with the command line, as two hosts would that share a disk.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from jaxtricks.lab import distributed, rundir

from tests.lab.run_dirs import log_of

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "jaxtricks", "train", "--widths", "8", "--batch", "16"]
COMMAND += ["--steps", "60", "--log-every", "3", "--save-every", "10", "--eval-every", "30"]
COMMAND += ["--agc", "--memopt", "--fsdp"]
ECHO = ("--echo",)
# What jax.distributed says when a process is gone: of a worker, or of the one that all are joined to.
LOST = re.compile(r"another task died|tasks have crashed|[Ll]eader task was preempted")
LIMIT = 240  # seconds for any of the runs here


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "32"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def begin(out, *args, processes=2, devices=4):
    """The processes of a run, started."""
    coordinator = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    started = []
    for i in range(processes):
        joined = [*coordinator, "--process", str(i)] if processes > 1 else []
        with open(f"{out}.{i}.log", "w") as log:
            started.append(
                subprocess.Popen(
                    [*COMMAND, "--out", str(out), *joined, *args],
                    env=environment(devices),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def end(started, out):
    """Exit codes and outputs, once all have ended."""
    codes = [process.wait(LIMIT) for process in started]
    return codes, [pathlib.Path(f"{out}.{i}.log").read_text() for i in range(len(started))]


def run(out, *args, **kwargs):
    codes, outputs = end(begin(out, *args, **kwargs), out)
    assert not any(codes), outputs
    return " ".join(outputs[0].split())


def wait_for_line(out, line, started):
    log, until = pathlib.Path(out) / rundir.METRICS, time.monotonic() + LIMIT
    while not (log.exists() and log.read_bytes().count(b"\n") >= line):
        assert time.monotonic() < until and all(p.poll() is None for p in started)
        time.sleep(0.01)


def losses(out):
    rows = [json.loads(line) for line in log_of(out).splitlines()]
    return np.array([row["loss"] for row in rows]), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multihost")


@pytest.fixture(scope="module")
def whole(folder):
    """Two processes, never interrupted."""
    run(folder / "whole", *ECHO)
    return folder / "whole"


@pytest.fixture(scope="module")
def alone(folder):
    """One process with the same eight devices; without echoing it reads the same batches."""
    run(folder / "alone", "--mesh", "data=8", processes=1, devices=8)
    return folder / "alone"


def test_two_hosts_train_as_one_with_all_the_devices(folder, alone):
    said = run(folder / "two")
    assert "2 processes, 8 devices; should one be lost" in said
    (ours, rows), (expected, rows_alone) = losses(folder / "two"), losses(alone)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert rows[-1].keys() == rows_alone[-1].keys()
    tests = [json.loads((p / rundir.RESULT).read_text()) for p in (folder / "two", alone)]
    assert tests[0]["test"]["loss"] == pytest.approx(tests[1]["test"]["loss"], rel=1e-3)
    assert tests[0]["state_bytes"] == tests[1]["state_bytes"]


@pytest.mark.parametrize("killed", [1, 0], ids=["a worker", "the coordinator"])
def test_a_killed_process_ends_the_other_and_both_go_on(folder, whole, killed):
    out = folder / f"killed{killed}"
    started = begin(out, *ECHO)
    wait_for_line(out, 6, started)
    started[killed].kill()
    start = time.monotonic()
    codes, outputs = end(started, out)
    took = time.monotonic() - start
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] != 0
    assert LOST.search(outputs[1 - killed]), outputs[1 - killed][-2000:]
    assert took < distributed.HEARTBEAT + 60
    print(f"the other ended after {took:.1f} s with {codes[1 - killed]}")
    assert "going on after step" in run(out, *ECHO, "--resume")
    assert log_of(out) == log_of(whole)


def test_sigterm_to_one_saves_on_both_at_the_same_step(folder, whole):
    out = folder / "terminated"
    started = begin(out, *ECHO)
    wait_for_line(out, 6, started)
    started[1].send_signal(signal.SIGTERM)
    codes, outputs = end(started, out)
    assert codes == [0, 0], outputs
    assert "stopped on SIGTERM, saved: go on with --resume" in " ".join(outputs[0].split())
    run(out, *ECHO, "--resume")
    assert log_of(out) == log_of(whole)


@pytest.mark.parametrize("args", [(), ECHO], ids=["exactly", "echo"])
def test_another_number_of_hosts_and_devices_goes_on(folder, alone, args):
    out = folder / f"moved{len(args)}"
    started = begin(out, *args)
    wait_for_line(out, 6, started)
    started[0].send_signal(signal.SIGTERM)
    assert end(started, out)[0] == [0, 0]
    said = run(out, *args, "--resume", "--mesh", "data=2,model=2", processes=1)
    assert "2 hosts read before, 1 now: reading goes on" in said
    assert ("exactly where it was" if not args else "without the copies still to come") in said
    ours, rows = losses(out)
    assert [row["step"] for row in rows] == list(range(3, 61, 3))
    if not args:  # then even the batches are those of a run that one process made in one go
        np.testing.assert_allclose(ours, losses(alone)[0], rtol=1e-3)
    assert np.isfinite(ours).all() and ours[-1] < ours[0]


def test_a_mistake_is_said_by_all_and_waits_for_nobody(folder, whole):
    started = begin(whole, *ECHO)  # holds a run already
    codes, outputs = end(started, whole)
    assert codes == [2, 2]
    assert all("already holds a run" in output for output in outputs)
    started = begin(folder / "none", "--mesh", "data=2")
    codes, outputs = end(started, folder / "none")
    assert codes == [2, 2] and "leaves devices of some host unused" in outputs[0]
    assert not (folder / "none").exists()
