"""Checkpoints: whole or absent, checked on reading, of this model or refused."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import _tree
from jaxtricks.lab.checkpoint import SUMS, Checkpoints
from jaxtricks.lab.config import UserError


@_tree.node
class State:
    params: dict
    key: jax.Array
    other: tuple


def make(x):
    params = {
        "layers": {0: {"kernel": jnp.full((64, 64), float(x))}},
        "half": jnp.full(3, x, jnp.bfloat16),
    }
    return State(params, jax.random.key(int(x)), (jnp.int32(x), None, jnp.zeros((0, 3))))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1, 2 and 3, keeping two."""
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), {"step": step, "window": [{"loss": 0.1 * step}]})
    checkpoints.close()
    return tmp_path / "run"


def restore(folder, like=None):
    told = []
    checkpoints = Checkpoints(folder, keep=2)
    restored = checkpoints.restore(make(0) if like is None else like, told.append)
    checkpoints.close()
    return restored, told


def test_round_trip(folder):
    restored, told = restore(folder)
    assert restored.step == 3 and not told
    assert restored.host == {"step": 3, "window": [{"loss": 0.1 * 3}]}
    assert_same(restored.state, make(3))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_nothing_saved_yet(tmp_path):
    restored, told = restore(tmp_path / "run")
    assert restored is None and not told


def test_anyone_can_read_the_arrays(folder):
    import orbax.checkpoint as ocp

    arrays = ocp.StandardCheckpointer().restore(folder.absolute() / "3/state")
    np.testing.assert_array_equal(arrays["params/layers/0/kernel"], np.full((64, 64), 3.0))


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": jnp.zeros((1000, 1000))}
    checkpoints = Checkpoints(tmp_path, keep=5)
    for i in range(1, 4):
        state = step(state)
        checkpoints.save(i, state, None)
        for _ in range(5):
            state = step(state)
        state = jax.tree.map(lambda x: x - 5, state)
    checkpoints.close()
    restored = Checkpoints(tmp_path, keep=5).restore(state)
    np.testing.assert_array_equal(restored.state["params"], np.full((1000, 1000), 3.0))


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(folder, tmp_path, damage):
    passed_over, summed = 0, json.loads((folder / "3" / SUMS).read_text())
    for name in files(folder / "3"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(tmp_path / "copy-unreadable", ignore_errors=True)
        shutil.copytree(folder, copy)
        damage(copy / "3" / name)
        restored, told = restore(copy)
        assert_same(restored.state, make(restored.step))
        assert restored.host["step"] == restored.step
        if restored.step == 2:
            passed_over += 1
            assert len(told) == 1 and str(copy / "3") in told[0] and "can't be read" in told[0]
            assert (tmp_path / "copy-unreadable/3").is_dir()
        else:
            assert not told
    assert passed_over == len(summed) + 1  # and the checksums themselves


def test_nothing_is_lost_when_no_checkpoint_can_be_read(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be read: give another --out"):
        restore(folder)
    assert sorted(p.name for p in (folder.parent / "run-unreadable").iterdir()) == ["2", "3"]


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(folder):
    shutil.rmtree(folder / "3/state")
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.restore(make(0), lambda _: None).step == 2
    checkpoints.save(3, make(7), None)
    checkpoints.close()
    assert_same(restore(folder)[0].state, make(7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: {**p, "half": jnp.zeros(4, jnp.bfloat16)},
            "params/half is bfloat16 [3] in it and ",
        ),
        (
            lambda p: {**p, "half": jnp.zeros(3)},
            "params/half is bfloat16 [3] in it and float32 [3] here",
        ),
        (
            lambda p: {**p, "more": jnp.zeros(4)},
            "params/more is nothing in it and float32 [4] here",
        ),
        (
            lambda p: {"half": p["half"]},
            "params/layers/0/kernel is float32 [64, 64] in it and nothing",
        ),
    ],
)
def test_another_model_is_refused_with_the_first_difference(folder, change, words):
    state = make(0)
    like = State(change(state.params), state.key, state.other)
    with pytest.raises(UserError) as error:
        restore(folder, like)
    assert words in str(error.value) and str(error.value).count("\n") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]  # nothing moved


def test_leftovers_of_a_killed_writer_are_removed(folder):
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    assert restore(folder)[0].step == 3
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


FULL_DISK = """
import resource, sys, pathlib
import jax.numpy as jnp
from jaxtricks.lab.checkpoint import Checkpoints
from jaxtricks.lab.config import UserError
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=2)
checkpoints.save(1, {"params": jnp.arange(10.0)}, None)
checkpoints._manager.wait_until_finished()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"params": jnp.sin(jnp.arange(100_000.0))}, None)
    checkpoints.close()
except UserError as error:
    print(error)
"""


def test_no_space_left_is_one_sentence_and_leaves_no_half_checkpoint(tmp_path):
    # No file may grow past 20 kB in the child: as a full disk, writing fails in the middle.
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("can't write checkpoints to"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1 and "(File too large): free space" in done.stdout
    assert not done.stderr
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.restore({"params": jnp.zeros(10)}).step == 1
    checkpoints.close()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["1"]


def test_a_folder_that_cannot_be_made():
    with pytest.raises(UserError, match="can't write checkpoints to /proc/nothing"):
        Checkpoints(pathlib.Path("/proc/nothing/run"), keep=2)
