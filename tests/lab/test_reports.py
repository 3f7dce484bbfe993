"""What is said about runs: reading their directories, report.md, the comparison, and the pictures."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jaxtricks as jt
import numpy as np
import pytest
from jaxtricks import plot
from jaxtricks.lab import plots, report, rundir
from jaxtricks.lab.commands import compare
from jaxtricks.lab.config import Ablate, Train, Tricks, UserError
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

STEPS = (10, 20, 30, 40)


def summary(accuracy, few=None):
    few = accuracy if few is None else few
    groups = {"many": 0.9, "medium": None, "few": few}
    return {"loss": 0.5, "accuracy": accuracy, "balanced_accuracy": accuracy - 0.1, **groups}


def make_run(folder, cfg=None, *, test=0.8, steps=STEPS, text=False, step_s=0.1, **data):
    """A run directory as `train` leaves it; test=None is one that has not finished."""
    cfg = cfg or Train(steps=40, out=str(folder))
    folder.mkdir(parents=True)
    kind = "text" if text else "image"
    found = {
        "name": "cats",
        "kind": kind,
        "train": 90,
        "validation": 10,
        "test": 20,
        "notes": ["a note"],
    }
    found |= {"classes": ["tabby", "manx"], "counts": [80, 10], "shape": [8, 8, 1], **data}
    about = {
        "command": f"jaxtricks train --steps 40 --out {folder}",
        "started": "2030-01-02T03:04:05",
        "config": dataclasses.asdict(cfg),
        "versions": {"python": "3.11.1", "jax": "0.9.9"},
        "hardware": {"devices": ["cpu:0"], "kind": "cpu", "cores": 2, "machine": "x86_64"},
        "git": {"commit": "abc123", "branch": "main", "dirty": True},
        "data": found,
    }
    (folder / "config.json").write_text(json.dumps(about))
    rows = [{"step": s, "loss": 10 / s, "accuracy": s / 50} for s in steps]
    for row in rows[1::2]:
        row |= {"val_loss": 20 / row["step"], "val_accuracy": row["step"] / 60}
        if not text:
            row["val_balanced_accuracy"] = row["step"] / 80
    lines(folder / "metrics.jsonl", rows)
    windows = [
        {"step": s, "steps": 10, "seconds": 10 * step_s, "examples_per_s": 64.0} for s in steps
    ]
    windows[0]["seconds"] = 1e3  # compilation
    lines(folder / "timing.jsonl", windows)
    if test is not None:
        splits = {"train": summary(0.99), "test": summary(test, 0.25)}
        if text:
            splits = {"test": {"loss": test, "accuracy": 0.5}}
        costs = {"parameters": 1234, "state_bytes": 4096, "temp_bytes": 2**21, "bytes_read": 400}
        (folder / "result.json").write_text(json.dumps({"kind": kind, **splits, **costs}))
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report_of(folder, pictures=None):
    run = rundir.read(folder)
    return report.markdown(run, pictures or ())


def test_reading_and_comparing_import_no_jax(tmp_path):
    make_run(tmp_path / "run")
    code = (
        "import sys; from jaxtricks.lab import report, rundir; from jaxtricks.lab.commands import compare; "
        f"run = rundir.read({str(tmp_path / 'run')!r}); print(compare.for_terminal([run])); "
        "report.markdown(run, ()); "
        "assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_whole_run_is_read(tmp_path):
    run = rundir.read(make_run(tmp_path / "run", Train(tricks=Tricks.of("echo", "agc"))))
    assert [row["step"] for row in run.rows] == list(STEPS) and run.done == 40 and run.finished
    assert run.step_ms == pytest.approx(100) and run.examples_per_s == 640  # compilation left out
    assert run.tricks == ("echo", "agc") and not run.is_text
    assert run.newest("val_loss") == 0.5 and run.newest("nothing") is None


def test_torn_and_repeated_lines_are_survived(tmp_path):
    folder = make_run(tmp_path / "run", test=None)
    with open(folder / "metrics.jsonl", "a") as file:
        # A killed run's half line with a resumed run's line behind it, then that run from step 20 on.
        file.write('{"step": 50, "lo{"step": 20, "loss": 1}\n[1]\n{"loss": 2}\n\n')
        file.write('{"step": 30, "loss": 7.0}\n{"step": 40, "loss": null}\n{"step": 50')
    rows = rundir.read(folder).rows
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[2]["loss"] == 7.0 and rows[3]["loss"] is None
    run = rundir.read(folder)
    assert run.newest("loss") == 7.0 and run.newest("val_loss") == 1.0 and not run.finished


def test_a_bare_run_is_read_and_told(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}}')
    (tmp_path / "result.json").write_text('{"test": {"accu')
    (tmp_path / "timing.jsonl").write_text('{"step": 1}\n{"step": 2, "seconds": null}\n')
    run = rundir.read(tmp_path)
    assert run.rows == [] and run.result == {} and run.step_ms is None
    text = report_of(tmp_path)
    assert "Not finished" in text and "None" not in text
    assert "None" not in compare.for_terminal([run, run])
    assert plots.compare(compare.points([run])).axes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    for name in ("config.json", "result.json", "metrics.jsonl", "timing.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is no run"):
        rundir.read(tmp_path)


@pytest.mark.parametrize("name", ["", "config.json", "missing"])
def test_no_run_is_one_sentence(tmp_path, name):
    if name == "config.json":
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=r"is no run: give a directory of `jaxtricks train --out`"):
        rundir.read(tmp_path / name)


def test_an_ablation_is_told_from_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": dataclasses.asdict(Ablate())}))
    with pytest.raises(UserError, match=r"is an ablation.*report\.md"):
        rundir.read(tmp_path)


def test_the_report_holds_every_figure(tmp_path):
    cfg = Train(steps=40, out="runs/x", tricks=Tricks.of("agc", "echo"), model="resnet")
    text = report_of(make_run(tmp_path / "run", cfg), ("curves.png",))
    assert text.startswith("# resnet on cats, with echo and agc\n")
    assert "| test | 80.0 | 70.0 | 90.0 | - | 25.0 |" in text and "Not finished" not in text
    for words in (
        "90 for training, 10 for validation, 20 for the test",
        "tabby: 80, manx: 10",
        "A note.",
        "40 steps of 64 images",
        "- agc: Adaptive gradient clipping",
        "| parameters | 1,234 |",
        "| optimizer state | 4.0 KiB |",
        "| temporaries of the compiled step | 2.0 MiB |",
        "| time of a step, median | 100.00 ms |",
        "| read from the data per step | 10 B |",
        "jax 0.9.9",
        "1 x cpu, 2 processor cores, x86_64",
        "git commit abc123 on main, with changes that were not committed",
        "![Loss and accuracy over the steps](curves.png)",
        "jaxtricks train --steps 40 --out runs/x-again",
        "jaxtricks train --steps 40 --out runs/x --resume",
    ):
        assert words in text, words


def test_the_report_is_written_beside_the_run(tmp_path):
    run = rundir.read(make_run(tmp_path / "run"))
    report.write(run, ("curves.png",))
    assert (tmp_path / "run/report.md").read_text().count("curves.png") == 1
    with pytest.raises(UserError, match="can't write"):
        report.write(run._replace(path=tmp_path / "missing"), ())


def test_the_report_of_text_counts_bits(tmp_path):
    cfg = Train(model="transformer", steps=40)
    text = report_of(make_run(tmp_path / "run", cfg, text=True, test=math.log(4)))
    assert "| test | 1.3863 | 2.0000 | 50.0 |" in text and "balanced" not in text.lower()
    assert "by class" not in text and "images" not in text
    assert "predict the next character" in text and "40 steps of 64 windows" in text


def test_the_report_of_an_unfinished_run_says_so(tmp_path):
    text = report_of(make_run(tmp_path / "run", test=None, steps=STEPS[:2]))
    assert "20 of 40 steps" in text and "balanced accuracy 0.25" in text and "| test |" not in text
    assert "| time of a step" in text


@pytest.mark.parametrize("counts", [[9, 5, 2], list(range(10, 0, -1)), list(range(130, 0, -1))])
def test_group_sizes_are_those_of_the_evaluation(counts):
    n, sizes = len(counts), report.group_sizes(counts)
    order = np.argsort(counts)
    wrong = [order[0], order[n // 2], order[-1]]  # one class of each group
    confusion = np.eye(n, n + 1, dtype=np.int32)
    confusion[wrong] = np.roll(confusion[wrong], 1, axis=1)
    state = dataclasses.replace(jt.longtail.metrics.init(n), confusion=confusion)
    split = "rank" if n < 100 else "threshold"  # as lab.evaluation has it
    summarize = jax.jit(jt.longtail.metrics.summary, static_argnames="split")
    means = summarize(state, np.asarray(counts), split=split)
    assert sizes == {name: round(1 / (1 - float(means[name]))) for name in sizes}
    assert sum(sizes.values()) == n


def runs_of(tmp_path, **named):
    """Runs by name; a value is (settings, arguments of make_run)."""
    return [
        rundir.read(make_run(tmp_path / name, Train(**{"steps": 40, **cfg}), **more))
        for name, (cfg, more) in named.items()
    ]


def column(table, name):
    return [row[table.headers.index(name)] for row in table.rows]


def test_the_best_of_each_column_is_marked(tmp_path):
    runs = runs_of(tmp_path, a=({}, {"test": 0.8}), b=({}, {"test": 0.9}), c=({}, {"test": None}))
    table = compare.table(runs)
    assert column(table, "run") == ["a", "b", "c"]
    assert column(table, "test acc. %") == ["80.0", "90.0*", "val 66.7"]
    assert column(table, "bal. %") == ["70.0", "80.0*", "val 50.0"]
    assert column(table, "few %") == ["25.0*", "25.0*", "-"]
    assert column(table, "steps") == ["40", "40", "40/40"]
    assert column(table, "step ms") == ["100.00"] * 3
    assert column(table, "state KiB") == ["4.0", "4.0", "-"]
    assert "nats/char" not in table.headers
    notes = " ".join(table.notes)
    assert "*: the best" in notes and "val: not finished" in notes and "differ" not in notes


def test_only_settings_that_differ_are_named(tmp_path):
    first = {"learning_rate": 0.01, "seed": 1, "out": "x", "tricks": Tricks.of("agc", "echo")}
    second = {"learning_rate": 0.01, "widths": (8,), "tensorboard": True, "resume": True}
    third = {"learning_rate": 0.1, "widths": (8,), "seed": 1}
    table = compare.table(runs_of(tmp_path, a=(first, {}), b=(second, {}), c=(third, {})))
    assert "learning_rate: 0.01 (a, b), 0.1 (c)." in table.notes
    assert "widths: 16 32 64 (a), 8 (b, c)." in table.notes
    told = [note.split(":")[0] for note in table.notes]
    assert not {"out", "resume", "tensorboard", "seed", "tricks", "context"} & set(told)
    assert column(table, "tricks") == ["echo+agc", "-", "-"]
    assert any("seeds differ" in note for note in table.notes)


def test_different_data_is_said(tmp_path):
    runs = runs_of(tmp_path, a=({}, {}), b=({}, {"name": "dogs"}))
    assert any("different test sets" in note for note in compare.table(runs).notes)
    runs[1].about["hardware"]["kind"] = "gpu"
    assert any("different hardware" in note for note in compare.table(runs).notes)


def test_text_is_compared_in_nats(tmp_path):
    text = {"text": True, "classes": []}
    runs = runs_of(tmp_path, a=({}, {"test": 1.5, **text}), b=({}, {"test": 1.25, **text}))
    table = compare.table(runs)
    assert column(table, "nats/char") == ["1.5000", "1.2500*"]
    assert not {"test acc. %", "bal. %", "few %"} & set(table.headers)
    (image,) = runs_of(tmp_path, c=({}, {}))
    mixed = compare.table([*runs, image])
    assert column(mixed, "nats/char")[2] == "-" and column(mixed, "test acc. %")[0] == "-"
    assert column(mixed, "test acc. %")[2] == "80.0"  # alone in its column: not "best"


def test_tricks_are_short(tmp_path):
    every = Tricks.of(*jt.KEYS)
    runs = runs_of(
        tmp_path,
        a=({"tricks": every}, {}),
        b=({"tricks": dataclasses.replace(every, agc=False)}, {}),
    )
    assert [compare.tricks(run) for run in runs] == ["all", "all - agc"]


def test_names_are_as_long_as_they_must_be(tmp_path):
    runs = runs_of(tmp_path, **{"x/run": ({}, {}), "y/run": ({}, {}), "z/other": ({}, {})})
    assert compare.names(runs) == ["x/run", "y/run", "z/other"]
    assert compare.names(runs[1:]) == ["run", "other"]
    assert compare.names([runs[0], runs[0]]) == ["run", "run"]


def test_the_terminal_gets_100_columns(tmp_path):
    named = {
        f"a-long-name-{i}-of-a-run-that-says-{i}-everything": (
            {"tricks": Tricks.of(*jt.KEYS[: i + 1]), "seed": i, "learning_rate": 10.0**-i},
            {"test": None if i % 3 else 0.5 + i / 100, "name": f"some/where/data-set-{i % 2}"},
        )
        for i in range(7)
    }
    runs = runs_of(tmp_path, **named, t=({"model": "transformer"}, {"text": True}))
    text = compare.for_terminal(runs)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"a-long-name-{i}" in text for i in range(7)) and "*" in text
    alike = compare.for_terminal(runs_of(tmp_path, u=({}, {}), v=({}, {})))
    assert "All runs: data cats, model resnet, tricks -, seed 0" in alike
    assert "model" not in alike.split("\n\n")[1]
    with pytest.raises(UserError, match="nothing to compare"):
        compare.for_terminal([])


def drawn(figure):
    """The figure, drawn: layout and every text are then settled, and every warning is out."""
    FigureCanvasAgg(figure).draw()
    return figure


def line_labels(axis):
    return [line.get_label() for line in axis.get_lines()]


def test_curves_draw_what_is_logged(tmp_path):
    rows = rundir.read(make_run(tmp_path / "run")).rows
    loss, accuracy = drawn(plots.curves(rows, unit="nats")).axes
    assert loss.get_ylabel() == "loss (nats)" and line_labels(loss) == ["training", "validation"]
    assert line_labels(accuracy) == ["training", "validation", "validation, balanced"]
    training, validation = loss.get_lines()
    np.testing.assert_allclose(training.get_ydata(), [1, 0.5, 1 / 3, 0.25])
    assert list(validation.get_xdata()) == [20, 40]
    assert validation.get_linewidth() > training.get_linewidth()
    assert validation.get_marker() != training.get_marker()
    looks = {(x.get_linestyle(), x.get_marker(), x.get_linewidth()) for x in accuracy.get_lines()}
    assert len(looks) == 3  # told apart without colour


def test_curves_survive_gaps_and_single_points():
    rows = [{"step": i, "loss": None if i % 2 else 1.0 + i} for i in range(1, 8)]
    rows[3]["loss"] = math.inf
    loss, accuracy = drawn(plots.curves(rows)).axes
    (line,) = loss.get_lines()
    assert line.get_label() == "training (5 not finite)" and line.get_marker() != "None"
    assert np.isfinite(line.get_ydata()).sum() == 2
    assert [text.get_text() for text in accuracy.texts] == ["nothing to show yet"]
    drawn(plots.curves([]))
    (line,) = drawn(plots.curves([{"step": 3, "loss": 1.0}])).axes[0].get_lines()
    assert line.get_marker() != "None"
    spiked = [{"step": i, "loss": 1e4 if i == 3 else 1.0} for i in range(9)]
    assert plots.curves(spiked).axes[0].get_yscale() == "log"


def test_an_empty_group_is_a_word_not_a_bar():
    result = {"kind": "image", "train": summary(1.0), "test": summary(0.8, 0.0)}
    (axis,) = drawn(plots.groups(result, {"many": 1, "medium": 0, "few": 3})).axes
    assert len(axis.patches) == 4  # two splits, many and few
    texts = [text.get_text() for text in axis.texts]
    assert texts.count("none") == 2 and "0.0" in texts and "90.0" in texts
    assert [t.get_text() for t in axis.get_xticklabels()] == [
        "many\n1 class",
        "medium\n0 classes",
        "few\n3 classes",
    ]
    assert len({bar.get_hatch() for bar in axis.patches}) == 2
    (axis,) = drawn(plots.groups(result)).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["many", "medium", "few"]


def test_compare_draws_every_run_at_its_cost(tmp_path):
    runs = runs_of(tmp_path, a=({}, {"test": 0.8}), b=({}, {"test": None, "step_s": 0.2}))
    history, costs = drawn(plots.compare(compare.points(runs))).axes
    assert line_labels(history) == ["a", "b"]
    points = [(*x.get_xdata(), *x.get_ydata()) for x in costs.get_lines()]
    assert points == [pytest.approx((100, 70)), pytest.approx((200, 50))]
    fills = [line.get_markerfacecolor() for line in costs.get_lines()]
    assert fills[1] == "white" != fills[0] and "not finished" in costs.get_xlabel()
    markers = [line.get_marker() for line in (*history.get_lines(), *costs.get_lines())]
    assert markers[:2] == markers[2:] and markers[0] != markers[1]
    assert "balanced accuracy" in history.get_ylabel()


def test_compare_measures_what_the_runs_share(tmp_path):
    runs = runs_of(tmp_path, c=({}, {"text": True, "test": 1.5}), d=({}, {"steps": (10,)}))
    history, costs = drawn(plots.compare(compare.points(runs[:1]))).axes
    assert "nats per character" in history.get_ylabel()
    assert list(costs.get_lines()[0].get_ydata()) == [1.5]
    history, costs = drawn(plots.compare(compare.points(runs))).axes
    assert line_labels(history) == ["c", "d (training)"] and "%" in costs.get_ylabel()
    assert "not measured yet: d" in costs.get_xlabel()


def test_names_of_points_cover_nothing():
    names = [f"run {i}" for i in range(12)]
    rows = [{"step": 10, "val_balanced_accuracy": 0.5}]
    runs = [
        {"name": name, "text": False, "rows": rows, "step_ms": 5.0 + i // 6}
        | {"test": {"balanced_accuracy": 0.5 + i // 6 / 100}}  # six runs share a point
        for i, name in enumerate(names)
    ]
    figure = drawn(plots.compare(runs))
    texts = figure.axes[1].texts
    assert [text.get_text() for text in texts] and {t.get_text() for t in texts} == set(names)
    renderer = figure.canvas.get_renderer()
    # Of the text alone: the extent of an annotation includes its line.
    boxes = [Text.get_window_extent(text, renderer) for text in texts]
    panel = figure.axes[1].get_window_extent(renderer)
    for i, box in enumerate(boxes):
        assert panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 <= panel.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.fixture(scope="module")
def planned():
    def loss(ws, x):
        for w in ws:
            x = jax.numpy.tanh(x @ w)
        return (x**2).mean()

    ws, x = [np.eye(16, dtype=np.float32)] * 8, np.ones((512, 16), np.float32)
    return jt.remat.plan(loss, ws, x, budget_bytes=0.6, wrt="temp"), loss


def test_a_plan_is_drawn_over_time_and_against_what_it_costs(planned):
    plan, _ = planned
    expected = np.array([[plan.peak, 0.3], [plan.baseline, 0.0]])
    time, trade = drawn(plot.plan(dataclasses.replace(plan, frontier=expected))).axes
    assert line_labels(time) == ["unplanned", "planned", "budget"]
    for line, alive in zip(time.get_lines(), plan.timeline, strict=False):
        np.testing.assert_allclose(line.get_ydata(), alive / 2**20)
        assert line.get_xdata()[0] == 0 and line.get_xdata()[-1] == 1
    assert "MiB" in time.get_ylabel() and "temporaries (MiB)" in trade.get_xlabel()
    assert line_labels(trade) == ["expected", "budget"]
    points = {c.get_label(): c.get_offsets() for c in trade.collections}
    np.testing.assert_allclose(points["tried"], np.array(plan.tried) * [2.0**-20, 100])
    np.testing.assert_allclose(points["planned"], [[plan.peak / 2**20, 100 * plan.extra_flops]])
    np.testing.assert_allclose(points["unplanned"], [[plan.baseline / 2**20, 0]])
    assert trade.get_lines()[1].get_xdata()[0] == plan.budget / 2**20


def test_a_plan_that_was_read_is_drawn_without_its_timeline(planned):
    plan, loss = planned
    again = jt.remat.plan_from_json(plan.to_json(), loss)
    time, trade = drawn(plot.plan(again)).axes
    assert "this plan was read" in time.texts[0].get_text() and not time.get_lines()
    assert {c.get_label() for c in trade.collections} == {"unplanned", "planned"}


def test_a_large_plan_is_drawn_in_gib(planned):
    time, trade = plot.plan(dataclasses.replace(planned[0], budget=3 * 2**30)).axes
    assert "GiB" in time.get_ylabel() and "GiB" in trade.get_xlabel()
    assert any(line.get_xdata()[0] == 3 for line in trade.get_lines())


def test_policies_are_points_beside_a_plan(planned):
    plan, loss = planned
    report = plan.unplanned._replace(temp=2**20, peak=2**21, flops=2 * plan.unplanned.flops)
    policies = {"minimal": report, "full": report._replace(temp=0)}
    for wrt, mib in (("temp", 1), ("peak", 2)):
        figure = drawn(plot.plan(dataclasses.replace(plan, wrt=wrt), policies=policies))
        points = {c.get_label(): c.get_offsets() for c in figure.axes[1].collections}
        np.testing.assert_allclose(points["minimal"], [[mib, 100]])
        assert {"minimal", "full", "planned"} <= points.keys()
    shapes = [c.get_paths()[0].vertices.shape for c in figure.axes[1].collections[-2:]]
    assert shapes[0] != shapes[1]
    again = jt.remat.plan_from_json(plan.to_json(), loss)
    trade = drawn(plot.plan(again, policies=policies)).axes[1]
    points = {c.get_label(): c.get_offsets() for c in trade.collections}
    np.testing.assert_allclose(points["minimal"], [[1, 100]], rtol=1e-4)
