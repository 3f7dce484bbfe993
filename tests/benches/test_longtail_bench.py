"""`python -m benchmarks.longtail`: every method trains, the table pairs by seed, bad settings are named."""

import json

import pytest
from benchmarks.longtail import bench
from benchmarks.longtail.__main__ import main
from benchmarks.longtail.bench import METHODS, LongtailBench
from benchmarks.longtail.methods import FROM_BASE, TRAINED
from jaxtricks.lab import cli
from jaxtricks.lab.config import UserError

SMALL = ("--steps", "3", "--seeds", "1", "--batch", "16", "--widths", "4", "--imbalance", "5")


def test_every_method_is_there_once():
    assert sorted([*TRAINED, *FROM_BASE]) == sorted(METHODS)


@pytest.mark.slow
def test_all_methods_run(tmp_path):
    main([*SMALL, "--out", str(tmp_path / "run")])
    rows = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["method"] for row in rows] == list(METHODS)


@pytest.mark.slow
def test_a_run_writes_its_table(tmp_path):
    names = ("balanced_softmax", "post_hoc", "crt", "tau_norm")
    main([*SMALL, "--out", str(tmp_path / "run"), "--methods", *names])
    rows = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["method"] for row in rows] == ["cross_entropy", *names]
    assert all(0 <= row["balanced_accuracy"] <= 1 for row in rows)
    text = (tmp_path / "run/report.md").read_text()
    assert "benchmarks.longtail" in text and all(name in text for name in names)


def test_the_second_stages_start_from_the_trained_network():
    """post_hoc moves predictions of the same logits: with balanced counts it changes nothing."""
    cfg = LongtailBench(steps=2, seeds=1, batch=16, widths=(4,), imbalance=1.0)
    data = bench.data_lib.load("digits", seed=0)
    found = dict(bench.of_seed(cfg, ["cross_entropy", "post_hoc"], data, 0))
    assert (
        abs(found["post_hoc"]["balanced_accuracy"] - found["cross_entropy"]["balanced_accuracy"])
        < 0.05
    )


def test_differences_are_paired_by_seed():
    rows = [
        {"method": m, "seed": s, "balanced_accuracy": a, "many": a, "medium": a, "few": a}
        for s, (low, high) in enumerate([(0.1, 0.2), (0.5, 0.6), (0.3, 0.4)])
        for m, a in (("cross_entropy", low), ("vs", high))
    ]
    lines = bench.table(rows).rows
    assert lines[0][:2] == ("cross_entropy", 3) and lines[0][-2:] == ("-", "-")
    assert lines[1][2] == "40.0 +- 20.0" and lines[1][-2] == "+10.0 +- 0.0"
    lines = bench.table([row for row in rows if row["seed"] == 0]).rows
    assert lines[0][2] == "10.0 +- -" and lines[1][-2] == "+10.0 +- -"


@pytest.mark.parametrize(
    "args, word",
    [
        (("--methods", "magic"), "magic"),
        (("--seeds", "0"), "--seeds"),
        (("--imbalance", "0.5"), "--imb"),
    ],
)
def test_mistakes_are_named(args, word):
    with pytest.raises(UserError, match=word):
        cli.read(LongtailBench, "x", args).check()


def test_one_that_is_stopped_reports_what_is_done(tmp_path, monkeypatch, capsys):
    def of_seed(cfg, names, data, seed, trainers):
        figures = dict.fromkeys(("balanced_accuracy", "many", "medium", "few", "ece"), 0.25)
        yield "cross_entropy", figures
        if seed:
            raise KeyboardInterrupt
        yield "vs", figures

    monkeypatch.setattr(bench, "of_seed", of_seed)
    args = ["--methods", "vs", "--seeds", "2", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 130 and "stopped: the report has" in capsys.readouterr().out
    text = (tmp_path / "run/report.md").read_text()
    assert "25.0 +- 0.0" in text and "25.0 +- -" in text and "+0.0 +- -" in text
    assert "{'" not in text and "-0.0" not in text
