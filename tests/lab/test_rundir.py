"""The run directory: one writer, never overwritten, and what keeps a run from going on in it."""

import errno
import os
import subprocess
import sys
import threading

import pytest
from jaxtricks.lab import rundir
from jaxtricks.lab.config import Ablate, LrFind, Train, UserError
from jaxtricks.lab.rundir import RunDir

ABOUT = {
    "config": {"steps": 30, "tricks": {"agc": True}, "widths": [4, 8], "out": "a", "keep": 1},
    "data": {"train": 10, "counts": [5, 5], "notes": ["a"]},
}


def changed(section, **values):
    return {**ABOUT, section: {**ABOUT[section], **values}}


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (changed("config", steps=31), "was begun with --steps 30, not --steps 31"),
        (changed("config", tricks={"agc": False}), "was begun with --agc, not --no-agc"),
        (changed("config", widths=[4]), "was begun with --widths 4 8, not --widths 4"),
        (changed("data", train=11), "the data set has changed since"),
        (changed("data", counts=[6, 4]), "counts: [5, 5] then, [6, 4] now"),
    ],
)
def test_another_config_is_refused_with_the_first_difference(tmp_path, about, words):
    RunDir(str(tmp_path / "run"), ABOUT)
    before = (tmp_path / "run" / rundir.CONFIG).read_bytes()
    with pytest.raises(UserError) as error:
        RunDir(str(tmp_path / "run"), about, resume=True)
    assert words in str(error.value) and "another --out" in str(error.value)
    assert (tmp_path / "run" / rundir.CONFIG).read_bytes() == before


def test_what_changes_no_number_may_change(tmp_path):
    RunDir(str(tmp_path / "run"), ABOUT)
    assert RunDir(str(tmp_path / "run"), changed("config", keep=5, out="b"), resume=True).resumed


@pytest.mark.parametrize(
    ("text", "words"), [("{", "can't be read"), ("[]", "is not of a run"), (None, "holds no run")]
)
def test_a_folder_without_a_run_is_refused(tmp_path, text, words):
    (tmp_path / "notes.txt").write_text("mine")
    if text is not None:
        (tmp_path / rundir.CONFIG).write_text(text)
    with pytest.raises(UserError, match=words):
        RunDir(str(tmp_path), ABOUT, resume=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_directory_that_cannot_be_written():
    with pytest.raises(
        UserError, match=r"can't write /proc/nothing/run \(.*\): free space or give"
    ):
        RunDir("/proc/nothing/run", ABOUT)


# One writer.


def test_two_writers_of_one_directory_are_refused_by_name(tmp_path):
    first = RunDir(str(tmp_path / "run"), ABOUT)
    before = (tmp_path / "run" / rundir.CONFIG).read_bytes()
    words = f"run is being written by process {os.getpid()} on .*: wait until it ends, or give"
    with pytest.raises(UserError, match=words):
        RunDir(str(tmp_path / "run"), ABOUT, resume=True)
    with pytest.raises(UserError, match=words), rundir.only_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / rundir.CONFIG).read_bytes() == before
    # The other hosts of one run don't write.
    assert RunDir(str(tmp_path / "run"), ABOUT, resume=True, lock=False).resumed
    first.close()
    with RunDir(str(tmp_path / "run"), ABOUT, resume=True) as again:
        assert again.resumed
    with rundir.only_writer(tmp_path / "run"):
        pass


HOLDER = """
import sys, time
from jaxtricks.lab.rundir import RunDir
held = RunDir(sys.argv[1], {"command": "x", "config": {}}, resume=True)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_gone_with_it(tmp_path):
    for _ in range(2):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
        )
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"written by process {holder.pid} on"):
                RunDir(str(tmp_path / "run"), {"config": {}}, resume=True)
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()
    assert RunDir(str(tmp_path / "run"), {"config": {}}, resume=True).resumed


def test_of_many_that_begin_at_once_one_does(tmp_path):
    """Threads with a lock file each: flock keeps open files apart, of one process or of several."""
    for round_ in range(20):
        path, opened, refused = str(tmp_path / str(round_)), [], []
        barrier = threading.Barrier(6)

        def begin(path=path, opened=opened, refused=refused, barrier=barrier):
            barrier.wait()
            try:
                opened.append(RunDir(path, {"command": "x", "config": {}}, resume=False))
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=begin) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1 and len(refused) == 5
        assert all("is being written by" in x or "already holds a run" in x for x in refused)


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    RunDir(str(tmp_path / "run"), ABOUT)
    monkeypatch.setattr(rundir, "fcntl", None)
    assert RunDir(str(tmp_path / "run"), ABOUT, resume=True).resumed


# Other versions.


def with_versions(**versions):
    return {**ABOUT, "command": "jaxtricks train", "versions": versions}


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ({"jaxtricks": "99.0"}, "a newer jaxtricks than this, with jaxtricks 99.0 (now 0.1)"),
        ({"jaxtricks": "0.0.9"}, "begun with jaxtricks 0.0.9 (now 0.1): its figures may"),
        ({"jax": "0.7.2", "jaxtricks": "0.1"}, "begun with jax 0.7.2 (now 0.12): its figures"),
        ({"jaxtricks": "0.1", "jax": "0.12", "other": "1"}, ""),
        ({}, ""),
        ({"jaxtricks": None}, "begun with jaxtricks None (now 0.1)"),
        ({"jaxtricks": "9" * 5000}, "a newer jaxtricks"),
    ],
)
def test_other_versions_are_said(tmp_path, then, words):
    RunDir(str(tmp_path / "run"), with_versions(**then))
    run = RunDir(str(tmp_path / "run"), with_versions(jaxtricks="0.1", jax="0.12"), resume=True)
    assert words in run.note and bool(words) == bool(run.note)


def test_settings_of_a_newer_version_are_refused(tmp_path):
    newer = {**with_versions(jaxtricks="99.0"), "config": {**ABOUT["config"], "sharpness": 0.5}}
    RunDir(str(tmp_path / "run"), newer)
    with pytest.raises(
        UserError, match=r"--sharpness 0.5, which this version.*99\.0.*another --out"
    ):
        RunDir(str(tmp_path / "run"), with_versions(), resume=True)


def test_settings_that_an_older_version_did_not_have_are_the_defaults(tmp_path):
    RunDir(str(tmp_path / "run"), ABOUT)
    assert RunDir(str(tmp_path / "run"), changed("config", root=""), resume=True).resumed
    with pytest.raises(UserError, match="was begun with --root , not --root there"):
        RunDir(str(tmp_path / "run"), changed("config", root="there"), resume=True)


# Folders of others.


@pytest.mark.parametrize("resume", [None, False, True])
@pytest.mark.parametrize("names", [("notes.txt",), ("config.json",), ("a/b.png", "config.json")])
def test_somebodys_folder_is_never_advised_to_be_removed(tmp_path, resume, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"config": {"mine": 1}}')
    if resume and "config.json" in names:
        return
    with pytest.raises(UserError) as error:
        RunDir(str(tmp_path), ABOUT, resume=resume)
    assert "is not empty and holds no run" in str(error.value) and "remove" not in str(error.value)
    assert not (tmp_path / rundir.LOCK).exists()


def test_a_run_is_advised_to_be_resumed_where_that_can_be(tmp_path):
    RunDir(str(tmp_path), with_versions())
    for resume, words in ((False, "or go on with --resume"), (None, "give another or remove it")):
        with pytest.raises(UserError, match=f"already holds a run: .*{words}"):
            RunDir(str(tmp_path), ABOUT, resume=resume)


def test_nothing_to_resume_is_said(tmp_path):
    """It is meant: the same command may begin a run and go on with it."""
    folder = RunDir(str(tmp_path / "run"), with_versions(), resume=True)
    assert not folder.resumed and "nothing was begun" in folder.note
    folder.close()
    for resume, out in ((True, "run"), (False, "new")):
        assert not RunDir(str(tmp_path / out), with_versions(), resume=resume).note


@pytest.mark.parametrize("out", [".", "x", "x/y", "../data/x", "link/x"])
def test_a_run_directory_lies_outside_of_its_data(tmp_path, monkeypatch, out):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "data", tmp_path / "data/link")
    monkeypatch.chdir(tmp_path / "data")
    for kind in (Train, Ablate, LrFind):
        for data in (".", str(tmp_path / "data"), "link"):
            with pytest.raises(UserError, match=f"--out {out} lies in --data {data}, where"):
                kind(data=data, out=out).check()
            kind(data=data, out=str(tmp_path / "data-runs")).check()
    with pytest.raises(UserError, match="lies in --root"):
        Train(data="list.txt", root=".", out=out).check()
