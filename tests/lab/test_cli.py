"""The command line: help, cards, and one sentence with exit code 2 for a user's mistake."""

import json
import re
import subprocess
import sys
import zipfile

import jaxtricks as jt
import numpy as np
import pytest
from jaxtricks.lab import cli
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import lr_find, plan
from jaxtricks.remat import _trial
from PIL import Image

HEADS = (
    "What.",
    "Use.",
    "Settings to start from.",
    "When it helps and when not.",
    "Cost.",
    "Composes with.",
    "Differences from the paper and from optax/flax.",
    "References.",
)

LARGEST = ("plan", "--batch", "max", "--budget", "1GB")


def fails(capsys, *args):
    """The one sentence that a bad command line prints."""
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text
    return text


def make_images(folder, counts, size=(8, 8)):
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
            image.save(folder / name / f"{i}.png")
    return folder


def test_help_and_parsing_import_no_jax():
    code = (
        "import sys; from jaxtricks.lab import cli; cli.main(['--help']); "
        "cli.parse(['train', '--agc', '--steps', '3']); assert 'jax' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(name in out.stdout for name in ("train", "ablate", "explain"))


def test_tricks_are_flags():
    cfg = cli.parse(["train", "--agc", "--echo", "--imbalance", "10"])
    assert cfg.tricks.on == ("echo", "agc") and cfg.imbalance == 10


@pytest.mark.parametrize("key", jt.KEYS)
def test_every_room_has_a_card(key):
    card = cli.card(key)
    positions = [card.find(f"\n{head}") for head in HEADS]
    assert all(p > 0 for p in positions) and positions == sorted(positions), positions
    assert "arXiv" in card


def test_explain_prints_the_card(capsys):
    cli.main(["explain", "remat"])
    assert capsys.readouterr().out.startswith("remat:")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nonsense",), ("'nonsense'", "train")),
        (("train", "--nonsense"), ("'--nonsense'", "--help")),
        (("explain", "nonsense"), ("'nonsense'", "longtail")),
        (("ablate", "--tricks", "agc", "nonsense"), ("'nonsense'", "longtail")),
        (("train", "--imbalance", "0"), ("--imbalance", "at least 1")),
        (("train", "--imbalance", "nan"), ("--imbalance", "at least 1")),
        (("train", "--steps", "0"), ("--steps", "at least 1")),
        (("train", "--mesh", "data=3"), ("64", "3 devices")),
        (("train", "--mesh", "data=2,pipe=2"), ("data=2,pipe=2", "data=4,model=2")),
        (("train", "--mesh", "data=0"), ("--mesh data=0",)),
        (("train", "--coordinator", "10.0.0.1"), ("--coordinator 10.0.0.1", "HOST:PORT")),
        (("train", "--coordinator", "a:1", "--processes", "2"), ("--process from 0 to N - 1",)),
        (("train", "--process", "1"), ("--coordinator HOST:PORT",)),
        (("lr-find", "--coordinator", "auto"), ("lr-find", "one process")),
        (("train", "--learning-rate", "0"), ("--learning-rate", "positive")),
        (("train", "--accumulate", "3"), ("64", "3 micro-batches", "multiple")),
        (("train", "--ema", "1"), ("--ema", "less than 1")),
        (("train", "--test", "0"), ("--test", "above 0")),
        (("train", "--test", "0.5", "--validation", "0.5"), ("--validation and --test", "lower")),
        (("train", "--model", "transformer", "--ebn"), ("--ebn", "transformer", "drop it")),
        (("train", "--model", "nfnet", "--weightstd"), ("--weightstd", "already", "drop it")),
        (("train", "--model", "repvgg", "--reparam"), ("--reparam", "already", "drop it")),
        (("train", "--model", "transformer", "--heads", "3"), ("128", "3 --heads", "multiple")),
        (("train", "--model", "transformer", "--data", "digits"), ("digits", "topics")),
        (("train", "--data", "topics"), ("--model resnet", "topics", "transformer")),
        (("lr-find", "--lo", "1", "--hi", "0.1"), ("--lo 1", "0 < lo < hi")),
        (("lr-find", "--rates", "1"), ("--rates", "at least 2")),
        (("compare",), ("compare", "run directories")),
        (("compare", "/nowhere"), ("/nowhere", "no run")),
        (("ablate", "--seeds", "0"), ("--seeds", "at least 1")),
        (("ablate", "--tricks"), ("--tricks", "empty")),
        (("plan",), ("--budget", "4GiB")),
        (("plan", "--budget", "4 buckets"), ("--budget", "4 buckets", "4GiB")),
        (("plan", "--budget", "0"), ("--budget", "above 0")),
        (("plan", "--budget", "0.5", "--topology", "v5e"), ("topology", "v5e:2x2")),
        (("plan", "--budget", "0.5", "--topology", "v5e:2x2", "--mesh", "data=2"), ("--mesh",)),
        (("plan", "--budget", "0.5", "--channels", "0"), ("--channels", "at least 1")),
        (("plan", "--batch", "max", "--budget", "0.5"), ("--budget 0.5", "fraction", "4GiB")),
        (("plan", "--batch", "max", "--budget", "1.0"), ("--budget 1.0", "fraction", "4GiB")),
        (("plan", "--batch", "most", "--budget", "1GB"), ("--batch is 'most'", "number or max")),
        (("plan", "--batch", "0", "--budget", "1GB"), ("--batch", "at least 1")),
        ((*LARGEST, "--batch-step", "0"), ("--batch-step", "at least 1")),
        ((*LARGEST, "--batch-step", "2.5"), ("--batch-step is '2.5'", "whole number")),
        ((*LARGEST, "--accumulate", "3000000"), ("3000000", "--batch-step or --accumulate")),
        ((*LARGEST, "--batch-step", str(2**20), "--mesh", "data=3"), ("3145728", "lower")),
        ((*LARGEST, "--max-extra", "nan"), ("--max-extra", "finite")),
        ((*LARGEST, "--max-extra", "-1"), ("--max-extra", "at least 0")),
        ((*LARGEST, "--host-bandwidth", "-1"), ("--host-bandwidth", "at least 0")),
        ((*LARGEST, "--host-bandwidth", "inf"), ("--host-bandwidth", "finite")),
        ((*LARGEST, "--topology", "v5e"), ("topology", "v5e:2x2")),
        ((*LARGEST, "--topology", "v5e:2x2", "--mesh", "data=2"), ("--mesh",)),
        ((*LARGEST, "--cache", "/dev/null"), ("--cache /dev/null is a file", "folder")),
        ((*LARGEST, "--cache", "/proc/x"), ("can't write /proc/x", "--cache")),
        ((*LARGEST, "--ebn", "--model", "transformer"), ("--ebn", "drop it")),
        (("train", "--batch", "max"), ("--batch is 'max'", "a whole number")),
        (("train", "--remat-budget", "much"), ("--remat-budget", "much", "4GiB")),
    ],
)
def test_mistakes_get_one_sentence(capsys, args, words):
    text = fails(capsys, *args)
    assert all(word in text for word in words), text


def test_bad_data_leaves_no_run_behind(capsys, tmp_path):
    out = tmp_path / "run"

    def train(data):
        return fails(capsys, "train", "--data", str(data), "--out", str(out))

    assert "not there" in train(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no images" in train(tmp_path / "empty")
    hollow = make_images(tmp_path / "hollow", {"cat": 5, "dog": 0})
    assert "'dog'" in train(hollow)
    split = make_images(tmp_path / "split/train", {"cat": 5, "dog": 5}).parent
    make_images(split / "test", {"cat": 2})
    text = train(split)
    assert "'dog'" in text and "test" in text
    with zipfile.ZipFile(tmp_path / "hollow.zip", "w") as archive:
        archive.writestr("cat/0.png", (hollow / "cat/0.png").read_bytes())
        archive.mkdir("dog") if hasattr(archive, "mkdir") else archive.writestr("dog/", "")
    assert "'dog'" in train(tmp_path / "hollow.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    assert "neither a folder nor a zip" in train(tmp_path / "broken.zip")
    broken = make_images(tmp_path / "broken", {"cat": 5, "dog": 5})
    (broken / "cat" / "0.png").write_bytes(b"no image")
    assert "can't be read" in train(broken)
    assert not out.exists()


def tiny(data, out, *more):
    """Arguments of a run of two steps."""
    args = ("train", "--data", str(data), "--out", str(out), "--batch", "8", "--widths", "4")
    return [*args, "--steps", "2", *more]


def test_images_of_two_sizes_are_resized_and_said_so(capsys, tmp_path):
    data = make_images(tmp_path / "data", {"cat": 5})
    make_images(data, {"dog": 5}, size=(9, 9))
    cli.main(tiny(data, tmp_path / "run"))
    out = capsys.readouterr().out
    assert "resized to 8x8" in out and "9x9" in out and "5 of the 10 images" in out


def test_a_truncated_file_is_named_and_left_out_on_request(capsys, tmp_path):
    data = make_images(tmp_path / "data", {"cat": 8, "dog": 8}, size=(20, 30))
    Image.open(data / "cat/1.png").save(data / "cat/other.jpg")
    raw = (data / "dog/3.png").read_bytes()
    (data / "dog/3.png").write_bytes(raw[: len(raw) // 2])
    text = fails(capsys, *tiny(data, tmp_path / "run"))
    assert "dog/3.png" in text and "remove it" in text and "--skip-unreadable" in text
    assert not (tmp_path / "run").exists()
    text = fails(capsys, *tiny(data, tmp_path / "run", "--check-data"))
    assert "1 of 17 files" in text and not (tmp_path / "run").exists()
    cli.main(tiny(data, tmp_path / "run", "--skip-unreadable"))
    assert "dog/3.png" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/result.json").read_text())["test"]["loss"] > 0
    (data / "dog/3.png").write_bytes(raw)
    cli.main(tiny(data, tmp_path / "run", "--check-data"))
    assert "17" in capsys.readouterr().out


def test_npz_and_functions_of_the_user_train(capsys, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 6, 6), np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def source():\n"
        "    arrays = np.load('set.npz')\n"
        "    return list(zip(arrays['images'], arrays['labels']))\n"
    )
    monkeypatch.chdir(tmp_path)
    results = []
    for name in ("set.npz", "mine:source"):
        cli.main(tiny(name, tmp_path / f"run{len(results)}"))
        results.append(json.loads((tmp_path / f"run{len(results)}/result.json").read_text()))
    assert results[0]["test"] == results[1]["test"]


def test_the_report_of_a_run_and_a_comparison(capsys, tmp_path):
    for seed in ("0", "1"):
        cli.main(tiny("digits", tmp_path / seed, "--seed", seed, "--log-every", "1"))
    for name in ("report.md", "curves.png", "groups.png", "config.json"):
        assert (tmp_path / "0" / name).stat().st_size > 500
    capsys.readouterr()
    picture = tmp_path / "compare.png"
    cli.main(["compare", str(tmp_path / "0"), str(tmp_path / "1"), "--picture", str(picture)])
    assert "seed" in capsys.readouterr().out and picture.stat().st_size > 10_000
    text = fails(capsys, "compare", str(tmp_path))
    assert str(tmp_path) in text and "no run" in text
    text = fails(capsys, "compare", str(tmp_path / "0"), "--picture", "/proc/nothing/a.png")
    assert "can't write /proc/nothing/a.png" in text and "--out" not in text
    text = fails(capsys, "compare", str(tmp_path / "0"), "--picture", str(tmp_path / "x.foo"))
    assert "'foo' is not supported" in text and "--picture that ends in .png" in text


def test_lr_find_suggests_and_draws(capsys, tmp_path):
    out = tmp_path / "find"
    args = [
        "lr-find",
        "--widths",
        "4",
        "--batch",
        "16",
        "--rates",
        "30",
        "--lo",
        "1e-4",
        "--hi",
        "3",
    ]
    cli.main([*args, "--out", str(out), "--agc", "--memopt"])
    said = capsys.readouterr().out
    assert "suggested --learning-rate" in said and "at or below" in said
    assert "above the suggestion" not in (out / "report.md").read_text()
    found = json.loads((out / "range.json").read_text())
    assert 1e-4 < found["suggestion"] < 3 and len(found["lrs"]) == len(found["losses"]) <= 30
    assert (out / "lr_range.png").stat().st_size > 5_000 and (out / "report.md").exists()


@pytest.mark.parametrize(
    ("smoothed", "suggestion", "words"),
    [
        (
            [2, 1, 0.5, 0.7, 3],
            1e-3,
            "at or below the suggestion: the smoothed loss was lowest at 0.01, and",
        ),
        (
            [2, 1, 0.5, 0.4, 0.3],
            1e-3,
            "at or below the suggestion: the loss still fell at 1, so a sweep",
        ),
        (
            [2, 1, 0.5, 0.7, 3],
            0.1,
            "the peak of a schedule below 0.01, where the smoothed loss was lowest.",
        ),
        ([2, 3, np.nan, 3, 3], np.nan, "Nothing is known"),
        ([np.nan, 1, 0.5, np.nan, np.nan], 1e-3, "lowest at 0.01"),
    ],
)
def test_advice_is_of_the_case_at_hand(smoothed, suggestion, words):
    lrs = np.array([1e-4, 1e-3, 1e-2, 0.1, 1.0])
    curve = np.array(smoothed)
    found = jt.cyclical.RangeTest(lrs=lrs, losses=curve, smoothed=curve, suggestion=suggestion)
    assert words in lr_find.advice(found)
    assert lr_find.advice(found) in lr_find.markdown(found, "digits", "")


def test_a_directory_that_cannot_be_written(capsys):
    text = fails(capsys, "train", "--out", "/proc/nothing/run", "--widths", "4")
    assert "can't write /proc/nothing/run" in text and "--out" in text


SMALL_TEXT = (
    "--context",
    "16",
    "--features",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--batch",
    "8",
)


def test_plan_prints_and_writes_a_plan(capsys, tmp_path):
    args = ["plan", "--model", "transformer", *SMALL_TEXT, "--budget", "0.95", "--wrt", "temp"]
    args += ["--max-compiles", "2"]
    cli.main([*args, "--classes", "50", "--out", str(tmp_path / "plan")])
    out = capsys.readouterr().out
    assert "8 windows of 16 characters, 50 classes" in out and "FLOPs" in out
    cfg = cli.parse([*args, "--classes", "50"])
    program = step_lib.TrainStep(cfg, plan.described(cfg))
    text = (tmp_path / "plan/plan.json").read_text()
    found = jt.remat.plan_from_json(text, program.loss)
    assert found.wrt == "temp" and found.peak <= found.budget == int(0.95 * found.baseline)
    # What was written is the plan of this program: its stages are compared in the trace.
    batch = program.example_batch()
    inputs = program.inputs(program.init(0, np.ones(50)), batch)
    (loss, _), (wanted, _) = found.fn(*inputs), program.loss(*inputs)
    # Not bit by bit: XLA compiles the calls within the loss, which the plan writes out.
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert (tmp_path / "plan/plan.png").stat().st_size > 5_000


def test_plan_hands_its_options_on(capsys, monkeypatch):
    args = ["--widths", "4", "--batch-step", "6", "--accumulate", "2", "--mesh", "data=2", "--echo"]
    args += ["--max-extra", "0.25", "--host-bandwidth", "1e9", "--cache", "folder"]
    told = {}

    def refuse(loss, *args, within, **settings):
        told.update(settings)
        _, batch = within(loss, batch=12)[1]
        told["shapes"] = args[2].shape, batch["image"].shape, batch["label"].sharding.num_devices
        raise jt.remat.BudgetInfeasible(1, 2, 0, "peak")

    monkeypatch.setattr(jt.remat, "plan", refuse)
    assert "--budget is 1 B" in fails(capsys, *LARGEST, *args)
    # The search starts from the multiple of 6 images, and of 4 in micro-batches, below 64: 60 in two.
    assert told.pop("shapes") == ((30, 32, 32, 3), (12, 32, 32, 3), 2)
    wanted = {"batch": "max", "batch_step": 6, "batch_argnums": (2, 3), "max_extra_flops": 0.25}
    wanted |= {"host_bandwidth": 1e9, "cache": "folder", "budget_bytes": "1GB"}
    assert wanted.items() <= told.items()
    told.clear()
    fails(capsys, "plan", "--widths", "4", "--batch", "6", "--budget", "0.5")
    assert told["budget_bytes"] == 0.5 and told["cache"] is None and "batch" not in told


@pytest.mark.slow
def test_plan_finds_the_largest_batch_of_several_devices_and_micro_batches(capsys, tmp_path):
    args = ["plan", "--batch", "max", "--model", "transformer", *SMALL_TEXT[:-2], "--classes", "50"]
    args += ["--budget", "400KiB", "--batch-step", "6", "--accumulate", "2", "--mesh", "data=2"]
    args += ["--wrt", "temp", "--cache", str(tmp_path / "cache")]
    cfg = cli.parse(args)
    assert cfg.multiple == 12 and cfg.start.batch == 60
    cli.main([*args, "--out", str(tmp_path / "plan")])
    out = capsys.readouterr().out
    assert "transformer, windows of 16 characters, 50 classes" in out
    program = step_lib.TrainStep(cfg.start, plan.described(cfg))
    text = (tmp_path / "plan/plan.json").read_text()
    found = jt.remat.plan_from_json(text, program.loss)
    assert found.peak <= found.budget == 400 * 2**10
    assert found.batch % 6 == 0 and len(found.sizes) > 1
    (last,) = (line for line in out.splitlines() if line.startswith("largest batch:"))
    assert f"largest batch: {2 * found.batch} (2 micro-batches of {found.batch}), temp" in last
    assert f"{found.extra_flops:+.1%} FLOPs, {found.flops / found.batch:.3e} FLOPs per" in last
    for batch, *_, fits in found.sizes:
        assert re.search(rf"^ *{2 * batch} .* {'yes' if fits else 'no'}$", out, re.MULTILINE)
    # The step of that batch with that loss is what was measured.
    step = program.with_micro_batch(found.batch).with_loss(found.fn)
    shapes = step.shapes, step.batch_shapes()
    assert shapes[1]["text"].shape == (found.batch, 17)
    assert jt.remat.memory_analysis(step.jitted(), *shapes).temp == found.peak
    # The same again is read, not planned.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trial, "compiled", None)
        cli.main(args)
    again = capsys.readouterr().out.splitlines()
    assert again == out.splitlines()[:-1]


@pytest.mark.slow
def test_a_budget_out_of_reach_leaves_nothing_behind(capsys, tmp_path):
    out = tmp_path / "run"
    args = ["--model", "transformer", *SMALL_TEXT, "--out", str(out)]
    text = fails(capsys, "plan", *args, "--budget", "1000", "--max-compiles", "1")
    assert "--budget is 1000 B" in text and "smallest peak reached" in text
    fails(capsys, "train", *args, "--remat-budget", "much")
    assert not out.exists()


def test_an_existing_run_is_never_overwritten(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("train", "ablate"):
        text = fails(capsys, command, "--out", str(tmp_path))
        assert str(tmp_path) in text and "--out" in text
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_too_many_devices_leave_no_run_behind(capsys, tmp_path):
    out = tmp_path / "run"
    assert "--mesh data=16" in fails(capsys, "train", "--mesh", "data=16", "--out", str(out))
    assert not out.exists()


def test_a_file_is_no_run_directory(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(capsys, "train", "--out", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_train_on_a_folder_of_images(capsys, tmp_path):
    data = make_images(tmp_path / "data", {"cat": 12, "dog": 9, "10": 6})
    args = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "4"]
    cli.main([*args, "--batch", "8", "--widths", "4", "--log-every", "2", "--longtail", "--echo"])
    out = capsys.readouterr().out
    assert "counts" in out and "balanced" in out and "test" in out
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4]
    assert not any("time" in key or "second" in key for x in lines for key in x)
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert about["config"]["tricks"]["echo"] and about["command"].startswith("jaxtricks train")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert 0 <= result["test"]["balanced_accuracy"] <= 1
