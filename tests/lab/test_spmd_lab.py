"""The lab's training step is the same run on any mesh, and sends no more than it must."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import KEYS, _dtypes, _tree
from jaxtricks.lab import collectives, data
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.config import IDLE, Parallel, Text, Train, Tricks
from jaxtricks.lab.distributed import device_bytes

pytestmark = pytest.mark.devices

STEPS = 4
# amp rounds to bfloat16, and sums in another order round differently; echo changes only what is read.
TRICKS = tuple(key for key in KEYS if key not in ("amp", "echo"))
SHARED = {"batch": 16, "steps": 20, "learning_rate": 1e-2, "label_smoothing": 0.1, "ema": 0.9}
TEXT = Text(context=8, features=64, layers=2, heads=4)

CONVNETS = ("resnet", "nfnet", "repvgg")
ON_MESHES = [
    ("data=2", False),
    ("data=4", True),
    ("data=8", False),
    ("data=8", True),
    ("model=4", False),
    ("data=4,model=2", True),
    ("data=2,model=4", False),
]


def settings(model, tricks=TRICKS, **changed):
    on = Tricks.of(*(key for key in tricks if model not in IDLE.get(key, {})))
    if model == "repvgg":  # its 1x1 kernels over gray images have a fan-in of 1
        on = dataclasses.replace(on, weightstd=False)
    return Train(model=model, tricks=on, widths=(16, 32), text=TEXT, **{**SHARED, **changed})


@functools.cache
def dataset(model):
    if model == "transformer":
        return data.load("topics", context=TEXT.context)
    return data.load("digits", imbalance=10)


def compiled(cfg, wide):
    """(program, compiled step, its first state) in float32 or float64."""
    set_ = dataset(cfg.model)
    program = step_lib.TrainStep(cfg, set_)
    state = program.init(0, set_.counts)
    batch = program.batch_shapes()
    if wide:
        state = jax.tree.map(lambda x: x.astype(float) if _dtypes.is_floating(x) else x, state)
        # What is float32 whatever the parameters are, such as figures that are only logged.
        kept, _ = jax.eval_shape(program.step, state, batch)
        state = jax.tree.map(
            lambda x, y: x.astype(y.dtype) if _dtypes.is_floating(x) else x, state, kept
        )
    state = jax.device_put(state, program.shardings)
    return program, program.jitted().lower(state, batch).compile(), state


def batches(program, cfg):
    rng, shapes = (
        np.random.default_rng(0),
        program.batch_shapes(),
    )
    classes = len(dataset(cfg.model).classes)
    most = {"image": 256, "label": classes, "text": classes}
    for _ in range(STEPS * cfg.accumulate):
        host = {n: rng.integers(0, most[n], x.shape).astype(x.dtype) for n, x in shapes.items()}
        yield program.placement.put(host)


def curve(cfg, wide=False):
    """(losses, last state, compiled step)."""
    program, step, state = compiled(cfg, wide)
    losses = []
    for batch in batches(program, cfg):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state, step


@functools.cache
def alone(model, wide):
    return curve(settings(model), wide)[0]


WIDE = [(model, *on) for model in ("transformer", "resnet") for on in ON_MESHES]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh", "fsdp"), WIDE)
def test_the_loss_curve_is_that_of_one_device_in_float64(model, mesh, fsdp, x64):
    cfg = settings(model, parallel=Parallel(mesh=mesh, fsdp=fsdp))
    losses, state, _ = curve(cfg, wide=True)
    np.testing.assert_allclose(losses, alone(model, True), rtol=1e-12)
    assert np.ptp(losses) > 1e-3  # something was learned, or unlearned
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", *CONVNETS])
def test_the_loss_curve_is_that_of_one_device_in_float32(model):
    for mesh, fsdp in (("data=8", True), ("data=2,model=2", False)):
        cfg = settings(model, parallel=Parallel(mesh=mesh, fsdp=fsdp))
        np.testing.assert_allclose(curve(cfg)[0], alone(model, False), rtol=1e-5)


@pytest.mark.slow
def test_accumulated_micro_batches_and_amp_on_a_mesh():
    cfg = settings("transformer", ("amp", "agc"), accumulate=2)
    parallel = Parallel(mesh="data=4,model=2", fsdp=True)
    ours = curve(dataclasses.replace(cfg, parallel=parallel))[0]
    np.testing.assert_allclose(ours, curve(cfg)[0], rtol=2e-3)  # bfloat16


@pytest.mark.parametrize("memopt", [False, True], ids=["adamw", "adafactor"])
@pytest.mark.parametrize("mesh", [pytest.param("data=8", marks=pytest.mark.slow), "data=4,model=2"])
def test_fsdp_splits_state_and_gathers_parameters_once(mesh, memopt):
    tricks = ("agc", "memopt") if memopt else ("agc",)
    # Wide enough that matrices outweigh what stays whole: norms and vectors.
    cfg = settings("transformer", tricks, ema=0.0, parallel=Parallel(mesh=mesh, fsdp=True))
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(TEXT, features=256))
    _, step, state = compiled(cfg, False)
    here, total = device_bytes(state.params), _tree.nbytes(state.params)
    assert here < 1.1 * total / 8 if mesh == "data=8" else here < 1.3 * total / 8
    here, total_state = device_bytes(state.opt_state), _tree.nbytes(state.opt_state)
    if not memopt:  # Adafactor's rows and columns are too small to matter
        assert here < 1.3 * total_state / 8
    found = collectives.census(step)
    gathered = [c for c in found if c.kind == "all-gather"]
    assert max(c.bytes for c in gathered) <= max(x.nbytes for x in jax.tree.leaves(state.params))
    assert sum(c.bytes for c in gathered) < 1.05 * total
    # XLA names them after the constraint that asks for whole parameters, or after the parameter (0.12).
    others = [c for c in gathered if not re.search("sharding_constraint|^state.params", c.name)]
    assert not [c for c in others if c.bytes > 1024]


@pytest.mark.slow
def test_data_parallel_steps_only_sum():
    cfg = settings("resnet", TRICKS, parallel=Parallel(mesh="data=8"))
    _, step, state = compiled(cfg, False)
    found = collectives.census(step)
    assert {c.kind for c in found} == {"all-reduce"}
    # Every gradient once; statistics of the batch and the loss beside them.
    assert sum(c.bytes for c in found) < 1.3 * _tree.nbytes(state.params)
