"""The command line: help, cards, and one sentence with exit code 2 for a user's mistake."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import jaxtricks as jt
from jaxtricks import cli

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
        "import sys; from jaxtricks import cli; cli.main(['--help']); "
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
        (("train", "--nonsense"), ("'--nonsense'", "longtail")),
        (("explain", "nonsense"), ("'nonsense'", "longtail")),
        (("ablate", "--tricks", "agc", "nonsense"), ("'nonsense'", "longtail")),
        (("train", "--imbalance", "0"), ("--imbalance", "at least 1")),
        (("train", "--imbalance", "nan"), ("--imbalance", "at least 1")),
        (("train", "--steps", "0"), ("--steps", "at least 1")),
        (("train", "--devices", "3"), ("64", "3 devices")),
        (("train", "--learning-rate", "0"), ("--learning-rate", "positive")),
        (("ablate", "--seeds", "0"), ("--seeds", "at least 1")),
        (("ablate", "--tricks"), ("--tricks", "empty")),
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


def test_images_of_two_sizes_are_named(capsys, tmp_path):
    data = make_images(tmp_path / "data", {"cat": 5})
    make_images(data, {"dog": 5}, size=(9, 9))
    args = ("train", "--data", str(data), "--out", str(tmp_path / "run"), "--batch", "8")
    text = fails(capsys, *args, "--widths", "4", "--steps", "2")
    assert "dog" in text and "9x9" in text and "8x8" in text


def test_an_existing_run_is_never_overwritten(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("train", "ablate"):
        text = fails(capsys, command, "--out", str(tmp_path))
        assert str(tmp_path) in text and "--out" in text
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


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
