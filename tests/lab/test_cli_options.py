"""Options: whatever their values, a command gets settings that can be meant, or one sentence is printed."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from jaxtricks import KEYS
from jaxtricks.lab import cli
from jaxtricks.lab import cli as options
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import plan, train
from jaxtricks.lab.config import Train

from tests.lab.test_cli import SMALL_TEXT, fails, make_images

# What every command needs beside the option in question.
NEEDED = {"plan": ["--budget", "0.5"]}
VALUES = [
    "", " ", "0", "-0", "1", "-1", "2", "7", "0.5", "-0.5", "1.5", "-1e5", "1e400", "-1e400", "nan", "-nan",
    "inf", "-inf", str(2**31), str(2**32), str(2**63), str(-(2**63)), str(2**64), "9" * 30, "9" * 5000,
    "1e300", "1e-300", "0x10", "1_000", "٣", "²", "true", "None", "auto", "x", "x" * 5000, "a b", "a,b",
    "data=2", "data=", "=", "data=" + "9" * 5000, "host:80", "host:" + "9" * 20, ":", "4GiB", "0B",
    "1e999GiB", "-1GiB", "4 buckets", ".", "..", "/", "/dev/null", "/dev/stdin", "/proc/x", "/nonexistent/x",
    "~", "*", "a\0b", "\udcff", "\x1b[2J", "é", "😀", "'", '"', "%s", "%(default)s", "{}", "<x>", "agc",
    "resnet",
]  # fmt: skip


def fields_of(name):
    """(option, field) of a command; positional ones have no option."""
    cls = cli.COMMANDS[name]
    groups = [cls, *options._groups(cls).values()]
    for field, _ in (pair for group in groups for pair in options._fields(group)):
        positional = field.metadata.get("positional")
        option = "--" + field.metadata.get("name", field.name).replace("_", "-")
        yield None if positional else option, field.name


def outcome(args, capsys):
    """None if the command was run, else the one sentence that it ended with."""
    code = 0
    try:
        cli.main(args)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    if not code:
        assert not said, args
        return None
    assert code == 2 and said.startswith("jaxtricks: ") and said.count("\n") == 1, (args, said)
    assert said[:-1].isprintable() and len(said) < 1500, (args, said)
    return said


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_any_value_of_any_option_is_settings_or_a_sentence(name, monkeypatch, capsys, tmp_path):
    """Every option of every command with every value, in both forms."""
    ran = []
    monkeypatch.setattr(cli, "run", lambda cfg, command: ran.append(cfg))
    monkeypatch.chdir(tmp_path)
    tried = 0
    for option, _ in fields_of(name):
        for value in VALUES:
            for words in [[value]] if option is None else [[option, value], [f"{option}={value}"]]:
                said = outcome([name, *NEEDED.get(name, []), *words], capsys)
                tried += 1
                if said and option and name not in ("compare", "fuse"):
                    # Of two options that contradict each other, either may be named.
                    assert re.search("--|unknown trick", said), (words, said)
    assert not list(tmp_path.iterdir())
    for cfg in ran:
        for value in dataclasses.asdict(cfg).values():
            assert not isinstance(value, int) or abs(value) < 2**31, cfg
            assert not isinstance(value, float) or np.isfinite(value), cfg
    assert tried > 60 and (ran or name in ("compare", "fuse", "explain"))


def test_any_pair_of_options_is_settings_or_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "run", lambda cfg, command: None)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        name = str(rng.choice(list(cli.COMMANDS)))
        named = [option for option, _ in fields_of(name) if option]
        words = [str(w) for _ in range(3)
                 for w in (rng.choice([*named, "--nonsense", "word"]), rng.choice(VALUES))]  # fmt: skip
        outcome([name, *NEEDED.get(name, []), *words[: rng.integers(1, 7)]], capsys)


# Deeper: what passes is carried out, as far as training's first step.

DEEP = {
    "--seed": ["0", "1", str(2**31 - 1)],
    "--data": ["digits", ".", "..", "nothing", "x" * 5000, "\udcff", "a:b", "a.b:c", "/dev/null", "file.txt",
               "pictures", "pictures.zip", "/proc/self/mem", "~"],
    "--root": ["pictures", ".", "file.txt"],
    "--size": ["1", "2", "300"],
    "--validation": ["0", "0.5", "1e-300", "0.79"],
    "--test": ["1e-300", "0.5", "0.89"],
    "--out": [".", "..", "/", "/dev/null", "/proc/x", "x" * 300, "x/" * 3000, "\udcff", "é", "a b",
              "file.txt", "file.txt/x", "pictures", "pictures/cat/run"],
    "--widths": ["1", "3"],
    "--batch": ["1", "2", "100"],
    "--imbalance": ["1.0001", "100", "1e300"],
    "--learning-rate": ["1e-300", "1e300", "5e-324"],
    "--weight-decay": ["1e-300", "1e300"],
    "--label-smoothing": ["0.999", "1e-300"],
    "--ema": ["0.999999", "1e-300"],
    "--sampling": ["square-root", "balanced", "progressive"],
    "--remat-budget": ["1", "0.0001", "1.", "4tib", "1e-1"],
    "--mesh": ["data=1", "model=1", "data=999999", "data=1,model=1"],
    "--wandb": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("command", ["train", "lr-find"])
def test_what_passes_can_be_prepared(command, monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise train.UserError("prepared")

    monkeypatch.setattr(step_lib, "prepare", stop)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    make_images(tmp_path / "pictures", {"cat": 6, "dog": 6})
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for path in (tmp_path / "pictures").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    pathlib.Path("file.txt").write_text("short")
    said = {}
    for option, values in DEEP.items():
        for value in values:
            said[option, value] = outcome([command, "--widths", "4", option, value], capsys)
    assert all(said.values())
    prepared = sum("prepared" in text for text in said.values())
    assert prepared > 30, said
    (_, *strange) = sorted(p.name for p in tmp_path.iterdir())
    assert strange == ["pictures", "pictures.zip"] or command == "lr-find"


# What is said of mistakes.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("train", "--moddel", "vgg"), ("unknown option '--moddel'", "did you mean --model?")),
        (("train", "--model", "vgg"), ("--model is 'vgg'", "resnet, nfnet, repvgg or transformer")),
        (("train", "--learning-rate", "abc"), ("--learning-rate is 'abc'", "a number")),
        (("train", "--echo-factor", "foo"), ("--echo-factor is 'foo'", "a number or auto")),
        (("train", "--echo-factor", "1e9"), ("--echo-factor", "at most 1000")),
        (("train", "--steps", "1.5"), ("--steps is '1.5'", "a whole number")),
        (("train", "--steps"), ("--steps needs a value",)),
        (("train", "--agc=yes"), ("--agc", "takes no value")),
        (("train", "word"), ("'word' is not an option", "--help")),
        (("train", "--seed", "-1"), ("--seed", "at least 0", "-1")),
        (("train", "--weight-decay", "inf"), ("--weight-decay", "inf")),
        (("train", "--learning-rate", "inf"), ("--learning-rate", "finite", "inf")),
        (("train", "--learning-rate", "0"), ("--learning-rate must be positive",)),
        (("train", "--imbalance", "inf"), ("--imbalance", "finite", "inf")),
        (("lr-find", "--hi", "inf"), ("--hi inf", "finite")),
        (("plan", "--budget", "1e400"), ("--budget is '1e400'", "4GiB", "0.5")),
        (("plan", "--budget", "-1"), ("--budget is '-1'",)),
        (("train", "--remat-budget", "foo"), ("--remat-budget is 'foo'", "4GiB", "fraction")),
        (("fuse",), ("fuse needs a run directory",)),
        (("explain",), ("explain needs a trick", "longtail")),
        (("explain", "again"), ("unknown trick 'again'", "longtail")),
        (("explain", "ACG"), ("unknown trick 'acg'", "did you mean agc?")),
        (("explain", "adafactor"), ("did you mean memopt?", "longtail")),
        (("explain", "Batch-Norm"), ("did you mean ebn?", "longtail")),
        (("explain", "agc", "extra"), ("explain takes one KEY: drop 'extra'",)),
        (("fuse", "a", "b"), ("fuse takes one RUN: drop 'b'",)),
        (("ablate", "--foo"), ("unknown option '--foo': see jaxtricks ablate --help",)),
        (("ablate", "--roto"), ("did you mean --root?",)),
        (("--verison",), ("did you mean --version?",)),
        (("version",), ("did you mean --version?",)),
        (("-V",), ("did you mean --version?",)),
        (("help",), ("did you mean --help?",)),
        (("trian",), ("unknown command 'trian'", "did you mean train?")),
        (("train", "--data", ""), ("--data is empty",)),
        (("train", "--out", ""), ("--out is empty",)),
        (("lr-find", "--check-data"), ("--check-data is an option of train",)),
        (("plan", "--budget", "1", "--resume"), ("--resume is an option of train",)),
    ],
)
def test_mistakes_get_one_sentence_before_anything_is_read(capsys, monkeypatch, args, words):
    monkeypatch.setattr(cli, "run", None)
    text = fails(capsys, *args)
    assert all(word in text for word in words), text


def test_options_may_be_spelled_in_more_than_one_way():
    cfg = cli.parse(["train", "--learning_rate", "0.5", "--no-agc", "--echo-factor=auto", "--agc"])
    assert cfg.learning_rate == 0.5 and cfg.echo_factor == "auto" and cfg.tricks.on == ("agc",)
    cfg = cli.parse(["ablate", "--tricks", "agc", "echo", "--no-search", "--widths", "4", "8"])
    assert cfg.tricks == ("agc", "echo") and not cfg.search and cfg.widths == (4, 8)
    assert cli.parse(["compare", "a", "b", "--picture", "c"]).runs == ("a", "b")
    assert cli.parse(["plan", "--budget", "0.5"]).remat_budget == "0.5"
    assert cli.parse(["train"]) == Train()


@pytest.mark.parametrize("key", ["agc", "AGC", "Agc"])
def test_explain_knows_no_case(capsys, key):
    cli.main(["explain", key])
    assert capsys.readouterr().out.startswith("Adaptive gradient clipping")


# Help and versions.


def help_of(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_shows_what_the_command_uses_and_nothing_else(capsys, name):
    text = help_of(capsys, name)
    unused = getattr(cli.COMMANDS[name], "UNUSED", frozenset())
    for option, field in fields_of(name):
        word = field.upper() if option is None else option
        assert bool(re.search(rf"{word}\b(?!-)", text)) == (field not in unused), option
    assert "SUPPRESS" not in text and "%" not in text.replace("100 %", "")
    if name in ("plan", "lr-find"):
        assert not {"--resume", "--check-data", "--wandb", "--save-every"} & set(text.split())
        assert {"--model", "--batch", *(f"--{key}" for key in KEYS if key != "echo")} <= {
            word.strip(",") for word in text.split()
        }


def test_version_is_printed_at_once_and_without_jax():
    code = (
        "import sys; from jaxtricks.lab import cli; cli.main(['--version']); "
        "assert 'jax' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert time.perf_counter() - start < 10
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["jaxtricks", "python", "jax", "jaxlib", "flax", "optax"]


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from jaxtricks.lab import cli\ncli.main(['explain', 'memopt'])"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.returncode == 141 and not done.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_out_of_memory_is_a_sentence(capsys, monkeypatch, error):
    def run(cfg, command):
        raise error

    monkeypatch.setattr(cli, "run", run)
    assert "out of memory: lower --batch" in fails(capsys, "train")


def test_an_error_that_is_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "run", lambda cfg, command: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


# Before data is read.


def test_what_needs_no_data_is_said_before_it_is_read(capsys, monkeypatch, tmp_path):
    """Places to write, kinds of data and packages, of every command that writes."""

    def never(*args, **kwargs):
        raise AssertionError("read")

    for module in (train.data_lib, plan.data_lib):
        monkeypatch.setattr(module, "load", never)
    monkeypatch.setattr(step_lib, "TrainStep", never)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "notes.txt").write_text("mine")
    out = str(tmp_path)
    text = str(tmp_path / "notes.txt")
    for args in (
        ("train",), ("lr-find",), ("plan", "--budget", "0.5"), ("ablate",),
    ):  # fmt: skip
        said = fails(capsys, *args, "--out", out)
        assert "is not empty and holds no run of jaxtricks: give another" in said
        assert "can't write /proc/x" in fails(capsys, *args, "--out", "/proc/x")
    for command in ("train", "lr-find"):
        said = fails(capsys, command, "--data", text, "--out", str(tmp_path / "run"))
        assert "use --model transformer, give images, or --root DIR" in said
        args = (command, "--model", "transformer", *SMALL_TEXT, "--data", out)
        assert "is no text" in fails(capsys, *args, "--out", str(tmp_path.parent / "run"))
    assert "--root DIR" in fails(capsys, "ablate", "--data", text, "--out", str(tmp_path / "run"))
    for args in (("train",), ("lr-find",), ("plan", "--budget", "0.5")):
        said = fails(capsys, *args, "--mesh", "data=16", "--out", str(tmp_path / "run"))
        assert "--mesh data=16" in said
    assert "wandb" in fails(capsys, "train", "--wandb", "x", "--out", str(tmp_path / "run"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
