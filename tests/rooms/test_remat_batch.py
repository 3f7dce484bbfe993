"""The largest batch within a budget, plans for several sizes, and the folder that keeps plans."""

import dataclasses
import functools
import json
import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jaxtricks import remat
from jaxtricks.remat import _batches, _budgets, _cache, _host_memory, _trial

from tests.rooms.test_remat_plan import close, convnet, mlp, scanned, transformer

pytestmark = pytest.mark.stock


def rnn(steps=12, width=16, batch=32):
    keys = jax.random.split(jax.random.key(3), 3)
    params = {"w": 0.5 * jax.random.normal(keys[0], (width, width))}
    params["u"] = jax.random.normal(keys[1], (8, width))

    def loss(params, x):
        h = jnp.zeros((len(x), width))
        for t in range(steps):
            h = jnp.tanh(h @ params["w"] + x[:, t] @ params["u"])
        return (h**2).mean()

    return loss, params, jax.random.normal(keys[2], (batch, steps, 8))


@pytest.fixture
def compiles(monkeypatch):
    """A list that grows by one with every program that is compiled to be measured."""
    done = []
    compiled = _trial.compiled

    def counted(*args):
        done.append(args)
        return compiled(*args)

    monkeypatch.setattr(_trial, "compiled", counted)
    return done


@pytest.fixture
def unchecked():
    """Call as users do, without the type checker of the tests in front."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def at(x, batch):
    """Arguments like x with another batch."""
    return jax.random.normal(jax.random.key(9), (batch, *x.shape[1:]))


def is_near(figure, wanted):
    return abs(figure - wanted) <= max(64, wanted / 1000)


# The largest batch.

MODELS = {
    "mlp": (mlp, 1_000_000, 8),
    "transformer": (transformer, 3_000_000, 1),
    "convnet": (convnet, 4_000_000, 1),
    "rnn": (rnn, 600_000, 4),
    "scanned": (scanned, 1_500_000, 8),
}
HEAVY = {"transformer", "rnn"}


CASES = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in HEAVY else [])
    for name, case in MODELS.items()
]


@pytest.mark.parametrize(("model", "budget", "step"), CASES)
def test_the_plan_of_the_largest_batch_is_what_it_says(model, budget, step, compiles):
    loss, params, x = model()
    found = remat.plan(loss, params, x, budget_bytes=budget, batch="max", batch_step=step)
    assert 1 <= len(compiles) <= 8
    assert found.batch % step == 0 and found.budget == budget
    # What was measured is the step of the user, at that batch.
    x = at(x, found.batch)
    report = remat.memory_analysis(jax.value_and_grad(found.fn), params, x)
    assert is_near(report.temp, found.report.temp) and is_near(report.peak, found.peak)
    assert report.peak <= budget and report.flops == found.flops == found.report.flops
    whole = remat.memory_analysis(jax.value_and_grad(loss), params, x)
    assert is_near(whole.peak, found.baseline)
    assert found.extra_flops == report.flops / whole.flops - 1 < 0.6
    close(
        jax.jit(jax.value_and_grad(found.fn))(params, x),
        jax.jit(jax.value_and_grad(loss))(params, x),
    )
    # Every size that was compiled, in order; the one found is the largest that fits.
    sizes = [_batches.Size(*row) for row in found.sizes]
    assert [s.batch for s in sizes] == sorted({s.batch for s in sizes})
    assert max(s.batch for s in sizes if s.fits) == found.batch
    assert all(s.fits == (s.figure <= budget) and s.batch % step == 0 for s in sizes)
    assert all(s.flops_per_example > 0 and s.extra_flops > -0.01 for s in sizes)
    for size in sizes:
        assert f"batch {size.batch}: " in str(found)
    if found.fn is not loss:
        with pytest.raises(ValueError, match="plan again"):
            found.fn(params, at(x, found.batch + step))


@pytest.mark.parametrize(("model", "budget", "step"), CASES)
@pytest.mark.slow
def test_no_batch_that_is_two_percent_larger_fits(model, budget, step):
    loss, params, x = model()
    found = remat.plan(loss, params, x, budget_bytes=budget, batch="max", batch_step=step)
    fitting = []
    for factor in (1.02, 1.04, 1.08):
        batch = (int(found.batch * factor) // step + 1) * step
        try:
            plan = remat.plan(loss, params, x, budget_bytes=budget, batch=batch, max_compiles=8)
        except remat.BudgetInfeasible:
            continue
        if plan.extra_flops <= 0.5:
            fitting.append((batch, plan.peak, plan.extra_flops))
    assert not fitting, (found.batch, found.peak, found.extra_flops)


SMALL = functools.partial(mlp, 4, 16, 64)


def test_temporaries_alone_and_a_step_above_one():
    loss, params, x = SMALL()
    plan = functools.partial(remat.plan, loss, params, x, budget_bytes=60_000, batch="max")
    found = plan(wrt="temp", batch_step=50)
    measured = remat.memory_analysis(jax.value_and_grad(found.fn), params, at(x, found.batch))
    assert found.wrt == "temp" and found.peak == measured.temp <= 60_000
    assert found.batch % 50 == 0 and all(batch % 50 == 0 for batch, *_ in found.sizes)
    # Arguments and results count too.
    assert plan(wrt="peak").batch < found.batch


def test_the_most_that_runs_twice_bounds_the_batch():
    loss, params, x = SMALL()
    plan = functools.partial(remat.plan, loss, params, x, budget_bytes=60_000, batch="max")
    none, some = plan(max_extra_flops=0), plan(max_extra_flops=1.0)
    assert none.extra_flops < 0.02 and none.batch < some.batch
    assert max(extra for _, _, extra, _, _ in none.sizes) < 0.02


def test_a_budget_that_not_even_the_smallest_batch_meets(compiles):
    loss, params, x = SMALL()
    plan = functools.partial(remat.plan, loss, params, x, batch="max")
    with pytest.raises(remat.BudgetInfeasible, match="^budget_bytes is .* the smallest") as caught:
        plan(budget_bytes=3000)
    assert caught.value.best > 3000 and len(compiles) <= 8
    with pytest.raises(remat.BudgetInfeasible):
        plan(budget_bytes=60_000, batch_step=10_000)


def test_within_a_donated_step_with_an_optimizer(compiles):
    loss, params, x = SMALL()
    tx = optax.adamw(1e-3)
    asked = []

    def step_of(loss, batch):
        asked.append(batch)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, x):
            value, grads = jax.value_and_grad(loss)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        shapes = jax.eval_shape(lambda: params)
        x_shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
        return step, (shapes, jax.eval_shape(tx.init, params), x_shape)

    plan = functools.partial(remat.plan, loss, params, x, within=step_of)
    found = plan(budget_bytes=80_000, batch="max", batch_step=4)
    assert len(compiles) <= 8 and None not in asked and found.batch in asked
    step, args = step_of(found.fn, batch=found.batch)
    report = remat.memory_analysis(step, *args)
    assert report.peak == found.peak <= 80_000 and report.alias > 0
    one = plan(budget_bytes=80_000, batch=found.batch)
    assert one.batch == found.batch and one.peak <= 80_000


# Sizes.


def test_of_several_sizes_the_largest_that_fits(unchecked):
    loss, params, x = SMALL()
    plan = functools.partial(remat.plan, loss, params, x, max_compiles=2)
    found = plan(budget_bytes=60_000, batch=[4096, 64, np.int64(128), 64])
    assert found.batch == 128 and [row[0] for row in found.sizes] == [64, 128, 4096]
    assert [row[-1] for row in found.sizes] == [True, True, False]
    assert "batch 4096: " in str(found) and "does not fit" in str(found)
    report = remat.memory_analysis(jax.value_and_grad(found.fn), params, at(x, 128))
    assert report.peak == found.peak == found.sizes[1][1]
    with pytest.raises(remat.BudgetInfeasible, match="raise the budget"):
        plan(budget_bytes=10_000, batch=(4096, 64))


@pytest.mark.parametrize("batch", [96, np.int32(96), jnp.int32(96), [96]], ids=str)
def test_one_size(batch, unchecked):
    loss, params, x = mlp(4, 8, 64)
    found = remat.plan(loss, params, x, budget_bytes=0.99, batch=batch, max_compiles=2)
    assert found.batch == 96 and [row[0] for row in found.sizes] == [96]
    like = remat.plan(loss, params, at(x, 96), budget_bytes=0.99, max_compiles=2)
    assert (found.peak, found.flops, found.budget) == (like.peak, like.flops, like.budget)
    assert like.batch is None and like.sizes == ()


def test_the_arguments_that_begin_with_the_batch(unchecked):
    def loss(params, table, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return ((x @ table.T) ** 2).mean()

    _, params, x = mlp(3, 8, 64)
    table = jnp.ones((50, 8))
    plan = functools.partial(remat.plan, loss, params, table, x, budget_bytes="1GB", batch=32)
    with pytest.raises(
        ValueError, match=r"axes of \[50, 64\].* name those that do by batch_argnums"
    ):
        plan()
    for positions in (2, -1, (2,), np.int32(2)):
        found = plan(batch_argnums=positions)
        assert found.batch == 32
        wanted = remat.memory_analysis(jax.value_and_grad(loss), params, table, at(x, 32))
        assert found.peak == wanted.peak
    with pytest.raises(ValueError, match="^batch_argnums=3 is of no argument"):
        plan(batch_argnums=3)
    with pytest.raises(ValueError, match="begin with no array"):
        plan(batch_argnums=())


@pytest.mark.parametrize(
    "scale", [0.5, np.float32(0.5), jnp.float32(0.5)], ids=lambda x: type(x).__name__
)
def test_keys_and_scalars_stay(scale, unchecked):
    def loss(params, x, key, keys, scale):
        for w in params:
            x = jnp.tanh(x @ w) * jax.random.bernoulli(key, 0.5, x.shape)
        return (x**2).mean() * scale + jax.random.uniform(keys[1])

    _, params, x = mlp(3, 8, 64)
    rest = jax.random.key(0), jax.random.split(jax.random.key(1), 3), scale
    found = remat.plan(loss, params, x, *rest, budget_bytes=0.95, batch=48, max_compiles=2)
    assert found.batch == 48
    x = at(x, 48)
    close(jax.grad(found.fn)(params, x, *rest), jax.grad(loss)(params, x, *rest))


def test_shapes_and_their_shardings_are_resized():
    mesh = jax.make_mesh((1,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((8, 3), jnp.int32, sharding=spread)
    tree = {"x": shape, "n": jax.ShapeDtypeStruct((), jnp.float32)}
    params, (resized) = _batches.resized([shape, tree], (1,), 5)
    assert params is shape and resized["n"] is tree["n"]
    assert resized["x"].shape == (5, 3) and resized["x"].sharding == spread
    # An array is somewhere, and for a topology that is not attached it would be elsewhere.
    (anywhere,) = _batches.resized([np.ones(4)], (0,), 7)
    (somewhere,) = _batches.resized([jnp.ones(4)], (0,), 7)
    assert anywhere.sharding is None and somewhere.sharding is None
    weak = jnp.asarray(1.0) * jnp.ones(4)
    (again,) = _batches.resized([weak], (0,), 7)
    assert again.shape == (7,) and again.weak_type == weak.weak_type


# What is refused.

NO_BATCHES = [
    0,
    -1,
    2.5,
    True,
    "most",
    "",
    (),
    [0, 1],
    [8, 2.5],
    2**31,
    {},
    np.zeros(2),
    1j,
]


@pytest.mark.parametrize("batch", NO_BATCHES, ids=lambda x: repr(x)[:20])
def test_what_is_no_batch_is_refused_in_a_sentence(batch, unchecked):
    if batch is not True:  # which is an integer to Python: the signature refuses it
        with pytest.raises(
            ValueError, match=r'^batch is .{1,40}: give a positive integer, .* "max"$'
        ):
            _batches.sizes(batch, 1)
    loss, params, x = SMALL()
    with pytest.raises(ValueError, match="batch") as caught:
        remat.plan(loss, params, x, budget_bytes="1GB", batch=batch)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("step", [0, -8, 2.5, "8", (1, 2), (8,), None, 2**31], ids=repr)
def test_what_is_no_step_is_refused_in_a_sentence(step, unchecked):
    with pytest.raises(ValueError, match="^batch_step is .{1,40}: give a positive integer$"):
        _batches.sizes("max", step)


def test_what_the_largest_batch_cannot_be_searched_with(unchecked):
    loss, params, x = SMALL()
    plan = functools.partial(remat.plan, loss, params, x, batch="max")
    for fraction in (0.5, 1.0, np.float32(0.5), 1):
        with pytest.raises(ValueError, match="^budget_bytes is .* a fraction .* size such as"):
            plan(budget_bytes=fraction)
    for extra in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^max_extra_flops is .*: give a fraction"):
            plan(budget_bytes="1GB", max_extra_flops=extra)
    for bandwidth in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^host_bandwidth is .*: give bytes per second, or 0"):
            plan(budget_bytes="1GB", host_bandwidth=bandwidth)
    with pytest.raises(ValueError, match="begin with no array"):
        remat.plan(lambda p: (p**2).sum(), x, budget_bytes="1GB", batch="max")


def test_the_budget_below_arguments_and_results_says_so():
    text = str(_budgets.BudgetInfeasible(10, 30, 20, "peak"))
    assert text.startswith(
        "budget_bytes is 10 B and the smallest peak reached is 30 B (20 B of it are"
    )
    assert text.endswith("raise the budget or make the batch smaller")
    assert "arguments" not in str(_budgets.BudgetInfeasible(10, 30, 0, "temp"))


# The memory of the host.


def test_what_a_byte_on_the_host_costs(monkeypatch):
    host = _host_memory.host_memory
    assert host("v5e:2x2", None).flops_per_byte == pytest.approx(197e12 / 1.5e10)
    assert host("v5e:2x2", 1e9).flops_per_byte == pytest.approx(197e3)
    assert host("v5e:2x2", 0) is None and host("v99:2x2", None) is None
    # An unknown chip, as the fastest one.
    assert host("v99:2x2", 1e12).flops_per_byte == pytest.approx(1153)
    assert host(None, None) is None and host(None, 1e9) is None  # XLA's CPU backend has one memory

    class Device:
        device_kind = ""

    monkeypatch.setattr(_host_memory._memory, "platform", lambda topology: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    kinds = {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "Tesla T4": 65e12}
    kinds |= {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v4": 275e12, "TPU7x": 1153e12}
    for kind, flops in kinds.items():
        Device.device_kind = kind
        assert host(None, 1e12).flops_per_byte == pytest.approx(flops / 1e12), kind
        assert host(None, None) is not None
    Device.device_kind = "Some other chip"
    assert host(None, None) is None


# JSON.


def test_a_plan_keeps_its_batch_and_sizes_in_json():
    loss, params, x = SMALL()
    plan = remat.plan(loss, params, x, budget_bytes=60_000, batch=(64, 96, 4096), max_compiles=2)
    again = remat.plan_from_json(plan.to_json(), loss)
    assert again.batch == plan.batch == 96 and len(again.sizes) == 3
    assert str(again) == str(plan) and again.to_json() == plan.to_json()
    np.testing.assert_equal(again.sizes, plan.sizes)  # of what does not fit, some are unknown
    assert again.fn is loss or again.fn(params, at(x, 96)) == plan.fn(params, at(x, 96))


# The folder of plans.


def test_a_plan_comes_from_its_folder_without_compiling(tmp_path, compiles, unchecked):
    loss, params, x = SMALL()
    folder = tmp_path / "a" / "b"
    plan = functools.partial(remat.plan, loss, params, x, cache=folder)
    for settings in (
        {"budget_bytes": 0.95},
        {"budget_bytes": 60_000, "batch": "max"},
        {"budget_bytes": 60_000, "batch": [64, 96], "max_compiles": 2},
        {"budget_bytes": 60_000, "batch": np.array([32, 48])},
    ):
        first = plan(**settings)
        assert compiles
        compiles.clear()
        again = plan(**settings)
        assert not compiles and again.to_json() == first.to_json() and str(again) == str(first)
        inputs = x if first.batch is None else at(x, first.batch)
        close(jax.grad(again.fn)(params, inputs), jax.grad(loss)(params, inputs))
    assert len(list(folder.iterdir())) == 4
    assert plan(budget_bytes=0.95, cache=str(folder)).peak and not compiles


def test_a_step_that_needs_its_batch_has_a_folder_too(tmp_path, compiles):
    loss, params, x = SMALL()

    def within(loss, batch):
        assert batch is not None
        return jax.jit(jax.value_and_grad(loss))

    plan = functools.partial(remat.plan, loss, params, x, within=within, cache=tmp_path)
    for batch in (48, "max"):
        first = plan(budget_bytes=60_000, batch=batch)
        compiles.clear()
        assert plan(budget_bytes=60_000, batch=batch).to_json() == first.to_json()
        assert not compiles


def test_whatever_changes_the_plan_gives_another_file(tmp_path, monkeypatch, compiles):
    loss, params, x = mlp(2, 8, 16)
    roomy = {"budget_bytes": "1GB", "cache": tmp_path}

    def count():
        return len(list(tmp_path.iterdir()))

    def donating(loss):
        return jax.jit(jax.grad(loss), donate_argnums=0)

    settings = [{}, {"budget_bytes": "2GB"}, {"wrt": "temp"}, {"argnums": (0,)}, {"batch": 16}]
    settings += [{"batch": 32}, {"max_compiles": 5}, {"host_bandwidth": 1e9}, {"within": donating}]
    settings += [{"within": lambda loss: jax.jit(jax.grad(loss))}]
    for i, change in enumerate(settings):
        remat.plan(loss, params, x, **roomy | change)
        assert count() == i + 1, change
    n = count()
    remat.plan(lambda p, x: 2 * loss(p, x), params, x, **roomy)
    remat.plan(loss, params, x[:8], **roomy)
    remat.plan(loss, params, x.astype(jnp.bfloat16), **roomy)
    assert count() == n + 3
    for module in (jax, _cache.jaxlib):
        monkeypatch.setattr(module, "__version__", "0.0.1")
        remat.plan(loss, params, x, **roomy)
    assert count() == n + 5
    compiles.clear()
    remat.plan(loss, params, x, **roomy)
    assert count() == n + 5 and not compiles


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\xff\xfe" + raw,
        lambda raw: b"[]",
        lambda raw: b"null",
        lambda raw: json.dumps({**json.loads(raw), "format": 99}).encode(),
        lambda raw: json.dumps({**json.loads(raw), "peak": "much"}).encode(),
        lambda raw: json.dumps({**json.loads(raw), "sizes": [[1]]}).encode(),
    ],
    ids=["empty", "half", "no text", "list", "null", "version", "type", "sizes"],
)
def test_a_file_that_cannot_be_read_is_planned_anew(damage, tmp_path, compiles):
    loss, params, x = mlp(2, 8, 16)
    plan = functools.partial(remat.plan, loss, params, x, budget_bytes="1GB", cache=tmp_path)
    first = plan()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    compiles.clear()
    assert plan().to_json() == first.to_json() and len(compiles) == 1
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == whole


def test_a_file_that_is_no_folder_is_refused_before_anything_compiles(tmp_path, compiles):
    loss, params, x = SMALL()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="^cache is .*file, a file: give a folder$"):
        remat.plan(loss, params, x, budget_bytes="1GB", cache=file)
    assert file.read_text() == "mine" and not compiles


def test_writers_at_once_never_leave_half_a_file(tmp_path, monkeypatch):
    loss, params, x = mlp(2, 8, 16)
    plan = remat.plan(loss, params, x, budget_bytes="1GB")
    # Long enough to be written in several pieces.
    plan = dataclasses.replace(plan, rows=(("x" * 100,) * 6,) * 3000)
    text = plan.to_json() + "\n"
    cache, done, seen = _cache.Cache(tmp_path), threading.Event(), []

    def write():
        for _ in range(10):
            cache.write("key", plan)

    def read():
        while not done.is_set():
            for file in tmp_path.glob("*.json"):
                seen.append(file.read_text() == text)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert seen and all(seen)
    assert len(list(tmp_path.iterdir())) == 1
    # A writer that dies before the end.
    monkeypatch.setattr(os, "replace", None)
    with pytest.raises(TypeError):
        cache.write("another", plan)
    assert len(list(tmp_path.glob("*.json"))) == 1 and cache.read("another", loss) is None
    assert isinstance(cache.read("key", loss), remat.Plan)
    assert pathlib.Path(cache._path("key")).read_text() == text
