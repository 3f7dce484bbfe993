"""The lab: data, one step for every seed and device, all ten tricks at once, the ablation."""

import dataclasses
import itertools
import json
import zipfile

import chex
import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from jaxtricks import _jaxpr
from jaxtricks.lab import cli, data, rundir, trainer
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import ablate, train
from jaxtricks.lab.config import Ablate, Parallel, Train, Tricks, UserError
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.trainer import Evaluator

from tests.lab import mangle
from tests.lab.test_cli import make_images

TINY = Train(widths=(4,), batch=16, steps=40, imbalance=10.0, learning_rate=1e-2)


def start(cfg, dataset):
    """(program, state, batches) of a run."""
    program = step_lib.TrainStep(cfg, dataset)
    state = program.start(cfg.seed, dataset.counts)
    reads = step_lib.build_echo(cfg, cfg.batch)
    batches = data.pipeline(dataset.train, batch=cfg.batch, seed=cfg.seed, transform=reads)
    return program, state, map(program.placement.put, batches)


def log_to(logged):
    """An `after` of fitting.fit that keeps what would be logged."""
    return lambda i, state, means: bool(means and logged.append((i, means)))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", imbalance=10)


def test_digits_are_long_tailed_and_split_by_class(digits):
    counts = np.bincount(digits.train.labels)
    assert counts[0] == 10 * counts[9] or abs(counts[0] / counts[9] - 10) < 0.8
    assert (np.diff(counts) <= 0).all()
    full = data.load("digits")
    assert len(full.train) + len(full.test) == 1797
    assert np.bincount(full.test.labels).min() >= 34
    example = full.train[0]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
    assert full.train.bytes_read == 64
    other = data.load("digits", imbalance=10, seed=1)
    assert not np.array_equal(other.train[0]["image"], digits.train[0]["image"])


def test_folders_and_zips_read_alike(tmp_path):
    folder = make_images(tmp_path / "set/train", {"2": 3, "10": 2}).parent
    make_images(folder / "test", {"2": 1, "10": 1})
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "__MACOSX").mkdir()
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path))
    sets = data.load(str(folder)), data.load(str(tmp_path / "set.zip"))
    for d in sets:
        assert d.classes == ("2", "10") and len(d.train) == 5 and len(d.test) == 2
    for i in range(5):
        np.testing.assert_array_equal(sets[0].train[i]["image"], sets[1].train[i]["image"])
    assert sets[0].train.bytes_read == sets[1].train.bytes_read > 0


def test_echo_halves_the_reads(digits):
    read = {}
    for factor in (1.0, 2.0):
        source = digits.train.subset(np.arange(len(digits.train)))
        cfg = dataclasses.replace(TINY, tricks=Tricks.of("echo"), echo_factor=factor, steps=1)
        batches = data.pipeline(
            source, batch=16, seed=0, transform=step_lib.build_echo(cfg, cfg.batch)
        )
        for _ in itertools.islice(batches, 40):
            pass
        read[factor] = source.bytes_read
    assert read[1.0] == 40 * 16 * 64
    # Until the first copies are due (4 batches on) every output is a read.
    assert 0.5 <= read[2.0] / read[1.0] < 0.56


def test_eval_batches_cover_everything_once(digits):
    seen = [b["label"][b["where"]] for b in data.eval_batches(digits.test, 100)]
    np.testing.assert_array_equal(np.concatenate(seen), digits.test.labels)
    few = list(data.eval_batches(digits.test, 16, limit=40))
    assert sum(int(b["where"].sum()) for b in few) == 40 and len(few) == 3


def test_one_trace_serves_every_step_and_seed(digits):
    program, state, batches = start(TINY, digits)
    step = jax.jit(chex.assert_max_traces(program.step, 1), donate_argnums=0)
    first = jax.tree.map(np.asarray, state.params)
    logged = []
    state = trainer.fit(step, state, batches, 40, log_every=10, after=log_to(logged))
    assert [i for i, _ in logged] == [10, 20, 30, 40]
    assert logged[-1][1]["loss"] < logged[0][1]["loss"] - 0.1
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, state.params)
    assert all(jax.tree.leaves(changed))
    _, state, batches = start(dataclasses.replace(TINY, seed=1), digits)
    trainer.fit(step, state, batches, 2)


def test_the_device_is_read_only_every_k_steps(digits, monkeypatch):
    program, state, batches = start(TINY, digits)
    reads = []
    monkeypatch.setattr(
        step_lib.jax, "device_get", lambda x: reads.append(len(x)) or jax.tree.map(np.asarray, x)
    )
    trainer.fit(jax.jit(program.step), state, batches, 7, log_every=3)
    assert reads == [3, 3, 1]


@pytest.mark.devices
@pytest.mark.parametrize(
    "tricks", [pytest.param((), id="none"), pytest.param(jt.KEYS, id="all", marks=pytest.mark.slow)]
)
def test_four_devices_compute_what_one_computes(digits, tricks):
    keys = [k for k in tricks if k != "amp"]  # bfloat16 would round the two sums differently
    cfg = dataclasses.replace(TINY, tricks=Tricks.of(*keys))
    results = []
    for devices in (1, 4):
        parallel = Parallel(mesh=f"data={devices}")
        program, state, batches = start(dataclasses.replace(cfg, parallel=parallel), digits)
        state, metrics = jax.jit(program.step)(state, next(batches))
        results.append((jax.device_get(metrics), jax.device_get(state.params)))
        assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == devices
    chex.assert_trees_all_close(*results, atol=2e-4, rtol=2e-4)


@pytest.mark.stock
def test_all_ten_at_once_learn_and_report(digits):
    cfg = dataclasses.replace(TINY, tricks=Tricks.of(*jt.KEYS), steps=60)
    program, state, batches = start(cfg, digits)
    logged = []
    step = jax.jit(program.step, donate_argnums=0)
    state = trainer.fit(step, state, batches, 60, after=log_to(logged))
    (_, first), (_, last) = logged[0], logged[-1]
    assert last["loss"] < first["loss"]
    assert {"amp/loss_scale", "amp/skipped_steps", "agc/clipped_fraction"} <= set(first)
    assert last["amp/skipped_steps"] == 0
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    summary = Evaluator(program, digits, 64)(state, digits.test)
    assert summary["balanced_accuracy"] > 0.15


@pytest.mark.parametrize(
    "tricks",
    [pytest.param(("amp",), id="amp"), pytest.param(jt.KEYS, id="all", marks=pytest.mark.slow)],
)
def test_amp_computes_every_convolution_in_bfloat16(digits, tricks):
    cfg = dataclasses.replace(TINY, tricks=Tricks.of(*tricks))
    program, state, batches = start(cfg, digits)
    counts = _jaxpr.census(program.step, state, next(batches))
    dtypes = {dtype for name, dtype in counts if name in ("conv_general_dilated", "dot_general")}
    assert dtypes == {"bfloat16"}


@pytest.mark.slow
def test_a_planned_step_trains_what_the_step_trains(digits):
    cfg = dataclasses.replace(TINY, remat_budget="0.8")
    program, state, batches = start(cfg, digits)
    found = program.plan()
    planned = program.with_loss(found.fn).step
    batches = list(itertools.islice(batches, 2))
    results = []
    for step in (program.step, planned):
        after = state
        for batch in batches:
            after, metrics = jax.jit(step)(after, batch)
        results.append((after.params, after.model_state, metrics))
    chex.assert_trees_all_close(*results, atol=1e-5, rtol=1e-5)
    before, after = map(jax.tree.leaves, (state.model_state, results[1][1]))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))  # batch statistics
    compiled = jax.jit(planned, donate_argnums=0)
    peak = jt.remat.memory_analysis(compiled, state, batches[0]).peak
    assert peak == found.peak <= found.budget < found.baseline


def test_remat_means_every_block_without_a_budget_and_the_plan_with_one(digits):
    def recomputes(**settings):
        cfg = dataclasses.replace(TINY, **settings)
        return step_lib.build_model(cfg, 1, 10, jax.random.key(0)).recompute

    assert recomputes(tricks=Tricks.of("remat")) and not recomputes(remat_budget="0.5")
    assert not recomputes(tricks=Tricks.of("remat"), remat_budget="0.5")


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(jt.KEYS, 2)), ids="+".join)
def test_every_pair_of_tricks_makes_a_step(digits, pair):
    cfg = dataclasses.replace(TINY, tricks=Tricks.of(*pair))
    program, state, batches = start(cfg, digits)
    for _ in range(2):
        state, metrics = jax.jit(program.step)(state, next(batches))
    chex.assert_tree_all_finite((metrics, state.params, state.model_state))


def test_augmentation_shifts_flips_and_keeps_bytes():
    images = jnp.arange(4 * 6 * 6, dtype=jnp.uint8).reshape(4, 6, 6, 1)
    out = step_lib.augment(jax.random.key(0), images, pad=1, flip=True)
    assert out.shape == images.shape and out.dtype == jnp.uint8
    again = step_lib.augment(jax.random.key(0), images, pad=1, flip=True)
    other = step_lib.augment(jax.random.key(1), images, pad=1, flip=True)
    assert (out == again).all() and not (out == other).all()
    still = step_lib.augment(jax.random.key(0), images, pad=0, flip=False)
    assert (still == images).all()


def test_averaging_is_the_bias_corrected_mean_of_the_parameters(digits):
    weights = np.array([0.8**2, 0.8, 1.0]) * 0.2 / (1 - 0.8**3)
    for accumulate in (1, 2):
        cfg = dataclasses.replace(TINY, ema=0.8, accumulate=accumulate, tricks=Tricks.of("amp"))
        program, state, batches = start(cfg, digits)
        step, seen = jax.jit(program.step), []
        chex.assert_trees_all_equal(program.averaged(state), state.params)
        for i in range(3 * accumulate):
            state, _ = step(state, next(batches))
            if (i + 1) % accumulate == 0:
                seen.append(state.params)
        wanted = jax.tree.map(lambda *xs: sum(map(np.multiply, weights, xs)), *seen)
        chex.assert_trees_all_close(program.averaged(state), wanted, rtol=1e-5, atol=1e-6)


def test_accumulation_is_the_step_of_the_whole_batch(digits):
    # Without normalization and augmentation the gradients of parts average to that of the whole.
    dataset = digits._replace(flip=False)
    cfg = dataclasses.replace(TINY, model="nfnet", tricks=Tricks.of("agc", "memopt"))
    after = []
    for accumulate in (1, 4):
        split = dataclasses.replace(cfg, accumulate=accumulate)
        program, state, batches = start(split, dataset)
        parts = np.split(np.arange(16), accumulate)
        batch = next(batches)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_lib, "augment", lambda key, images, **_: images)
            for part in parts:
                micro = {name: x[part] for name, x in batch.items()}
                state, _ = jax.jit(program.step)(state, micro)
        after.append(jax.device_get(state.params))
    chex.assert_trees_all_close(*after, rtol=1e-4, atol=1e-5)


def test_label_smoothing_raises_the_loss_by_its_share():
    losses = []
    for smoothing in (0.0, 0.5):
        loss = step_lib.build_loss(
            dataclasses.replace(TINY, label_smoothing=smoothing), jnp.ones(3)
        )
        losses.append(loss(jnp.array([[9.0, 0.0, 0.0]]), jnp.array([0]))[0])
    # -log softmax is about 9 for the wrong classes; two of three get a sixth each.
    np.testing.assert_allclose(losses[1] - losses[0], 0.5 * 9 * 2 / 3, rtol=1e-4)


@pytest.mark.devices
def test_too_many_devices_is_a_users_mistake():
    with pytest.raises(UserError, match="--mesh data=9 has 9 devices, but there are 8"):
        Placement.of(Parallel(mesh="data=9"))


def test_ablation_writes_table_report_and_picture(tmp_path, capsys):
    out = tmp_path / "run"
    args = [
        "ablate",
        "--tricks",
        "memopt",
        "remat",
        "--seeds",
        "2",
        "--steps",
        "3",
        "--widths",
        "4",
    ]
    cli.main([*args, "--batch", "16", "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())
    assert [r["key"] for r in rows] == [
        "baseline",
        "memopt",
        "remat",
        "all",
        "all - memopt",
        "all - remat",
        "best",
    ]
    fields = {"key", "metric", "std", "n", "step_ms", "temp_bytes", "state_bytes", "reads", "note"}
    fields |= {"tricks", "validation", "by_seed"}
    assert set(rows[0]) == fields and rows[0]["n"] == 2
    by_key = {r["key"]: r for r in rows}
    assert by_key["memopt"]["state_bytes"] < 0.8 * by_key["baseline"]["state_bytes"]
    assert by_key["baseline"]["reads"] == 16 * 64
    text = (out / "report.md").read_text()
    assert "jaxtricks ablate --tricks memopt remat" in text and "ablation.png" in text
    assert f"jax {jax.__version__}" in text
    assert (out / "ablation.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "what changed here" in said
    # Without a terminal a line is printed for each row, as it is finished.
    lines = said.splitlines()[:6]
    assert [line.split(" ", 1)[0] for line in lines] == [f"{i}/6" for i in range(1, 7)]
    assert all(row["key"] in line for row, line in zip(rows[:-1], lines, strict=True))


SMALL = ["--seeds", "2", "--steps", "2", "--widths", "4", "--batch", "16", "--no-search"]


@pytest.mark.slow
def test_an_ablation_that_is_stopped_reports_its_rows_and_goes_on(tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    args = ["ablate", "--tricks", "agc", "memopt", *SMALL, "--out"]
    trained, stops, original = [], [], ablate.train_row

    def train_row(key, *args):
        if key in stops:
            raise KeyboardInterrupt
        trained.append(key)
        return original(key, *args)

    monkeypatch.setattr(ablate, "train_row", train_row)
    order = ["baseline", "agc", "memopt", "all", "all - agc", "all - memopt"]
    for count in (0, 2, 5):
        stops[:] = order[count : count + 1]
        with pytest.raises(SystemExit) as error:
            cli.main([*args, str(out), "--resume"])
        said = capsys.readouterr().out
        assert error.value.code == 130
        rows = f"{count} rows" if count != 1 else "1 row"
        assert f"stopped after {rows}: go on with --resume" in said and "report.md" in said
        text = (out / "report.md").read_text()
        assert "Not finished" in text and rows in text and "ablation.png" not in text
        assert all(f"| {key} |" in text.replace("  ", "") for key in order[:count])
        assert trained == order[:count]
    stops.clear()
    cli.main([*args, str(out), "--resume"])
    assert trained == order  # each of them once
    assert "Not finished" not in (out / "report.md").read_text()
    cli.main([*args, str(whole)])
    wanted, have = (json.loads((x / "results.json").read_text()) for x in (whole, out))
    measured = ("key", "tricks", "metric", "std", "by_seed", "temp_bytes", "state_bytes", "reads")
    for a, b in zip(wanted, have, strict=True):
        assert [a[name] for name in measured] == [b[name] for name in measured]
        assert b["step_ms"] > 0
    with pytest.raises(SystemExit):
        cli.main([*args, str(out)])
    assert "go on with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*args, str(out), "--resume", "--steps", "3"])
    assert "was begun with --steps 2, not --steps 3" in capsys.readouterr().err


def test_rows_that_are_damaged_are_trained_again(tmp_path):
    cfg = Ablate(tricks=("agc",), seeds=2, out=str(tmp_path / "run"))
    row = {
        "key": "agc", "tricks": ["agc"], "metric": 0.5, "std": 0.1, "n": 2, "validation": 0.5,
        "by_seed": {"test": [0.5, 0.5], "validation": [0.5, 0.5]}, "temp_bytes": 1,
        "state_bytes": 1, "reads": 2.0,
    }  # fmt: skip
    about = {"config": {}}
    rundir.RunDir(cfg.out, about)
    folder = rundir.RunDir(cfg.out, about, resume=True)
    path = tmp_path / "run/results.json"
    assert ablate.finished(cfg, folder) == {}
    path.write_text(json.dumps([row]))
    assert ablate.finished(cfg, folder) == {"agc": row}

    def check(raw):
        path.write_bytes(raw)
        for key, found in ablate.finished(cfg, folder).items():
            assert key == found["key"] == "agc" and found["tricks"] == ["agc"]
            assert found.keys() == row.keys() and len(found["by_seed"]["validation"]) == 2
            json.dumps(ablate.table([{**found, "step_ms": 1.0, "note": ""}]).rows)

    mangle.search(check, 150, raw=mangle.damaged_json([row]))


def test_one_seed_has_no_spread(tmp_path, capsys):
    out = tmp_path / "run"
    args = ["ablate", "--tricks", "agc", "memopt", *SMALL[2:-1], "--seeds", "1"]
    cli.main([*args, "--out", str(out)])
    text = (out / "report.md").read_text()
    assert "1 seed." in text and "1 seeds" not in text and "+- -" in text and "+- 0.0" not in text
    table = capsys.readouterr().out.split("tricks ")[1].split("\n\n")[0]
    rows = [line.split() for line in table.splitlines() if line.startswith(("agc", "base"))]
    assert [row[2] for row in rows] == ["-", "-"]


def test_an_ablation_that_ends_early_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "interleaved_times", lambda trained: 1 / 0)
    out = tmp_path / "run"
    args = ["--tricks", "memopt", "--seeds", "1", "--steps", "1", "--widths", "4", "--batch", "16"]
    with pytest.raises(ZeroDivisionError):
        cli.main(["ablate", *args, "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())
    assert [r["key"] for r in rows] == ["baseline", "memopt"]


def test_what_is_not_finite_becomes_null():
    value = {"a": [1.0, float("nan")], "b": (float("inf"), 2), "c": "x"}
    assert rundir.finite(value) == {"a": [1.0, None], "b": [None, 2], "c": "x"}


def test_the_plan_has_22_rows():
    keys = [key for key, _ in ablate.arrangements(jt.KEYS)]
    assert len(keys) == 22 == len(set(keys))
    assert dict(ablate.arrangements(jt.KEYS))["all - agc"].on == tuple(
        k for k in jt.KEYS if k != "agc"
    )


def test_verdicts_follow_from_the_figures():
    base = {"key": "baseline", "metric": 0.8, "std": 0.01, "n": 3, "step_ms": 10.0}
    base |= {"temp_bytes": 1000, "state_bytes": 100, "reads": 64.0}
    better = base | {"key": "longtail", "metric": 0.85}
    assert ablate.verdict(better, base) == "+5.0 points"
    same = base | {"key": "remat", "metric": 0.805, "temp_bytes": 500, "step_ms": 13.0}
    note = ablate.verdict(same, base)
    assert (
        "no difference beyond" in note and "temporaries -50 %" in note and "step time +30 %" in note
    )
    assert "does not help accuracy here" in note
    # The table has 0.1 ms for both.
    quick = base | {"step_ms": 0.11}
    assert "step time" not in ablate.verdict(quick | {"key": "echo", "step_ms": 0.13}, quick)
    worse = ablate.verdict(base | {"key": "agc", "metric": 0.7}, base)
    assert worse.startswith("-10.0 points") and "does not help" in worse


def test_summary_table_names_splits():
    summary = {"loss": 1.0, "accuracy": 0.5, "balanced_accuracy": 0.4, "many": 0.9, "few": 0.1}
    table = train.summary_table({"kind": "image", "test": {**summary, "medium": None}})
    assert "medium" in str(table) and "test" in str(table)
    assert train.summary_table({"kind": "text", "test": summary}).headers[1:] == (
        "loss",
        "accuracy",
    )


def test_the_search_keeps_what_helps_beyond_the_seeds_spread():
    gains = {"a": (0.01, 0.03), "b": (0.2, 0.1), "c": (-0.1, -0.2), "d": (0.05, -0.04)}
    asked = []

    def measure(subset):
        asked.append(subset)
        # a is of no use once b is on.
        on = [key for key in subset if key != "a" or "b" not in subset]
        return [0.5 + sum(gains[key][seed] for key in on) for seed in range(2)]

    best, trials = ablate.search("abcd", measure)
    assert best == ("b",)
    assert [(t.offered, t.subset, t.accepted) for t in trials] == [
        ("b", ("b",), True),
        ("a", ("a", "b"), False),
        ("d", ("b", "d"), False),  # +0.5 points on average, one seed up and one down
        ("c", ("b", "c"), False),
    ]
    assert trials[0].gain == pytest.approx(0.15) and trials[0].error == pytest.approx(0.05)
    assert len(asked) == 1 + 4 + 4


def test_the_search_may_find_that_nothing_helps():
    best, trials = ablate.search("ab", lambda subset: [1.0 - len(subset)])
    assert best == () and [t.accepted for t in trials] == [False, False]


def test_the_best_row_names_its_tricks():
    base = {"key": "baseline", "tricks": [], "metric": 0.8, "std": 0.01, "n": 3, "step_ms": 10.0}
    base |= {"temp_bytes": 1000, "state_bytes": 100, "reads": 64.0}
    best = base | {"key": "best", "tricks": ["echo", "longtail"], "metric": 0.9}
    assert ablate.annotate([base, best])[1]["note"] == "echo + longtail: +10.0 points"
