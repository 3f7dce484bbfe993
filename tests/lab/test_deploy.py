"""`jaxtricks fuse RUN`: the files are the model, and run without this library."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from jaxtricks.lab import cli
from jaxtricks.lab.commands import fuse
from jaxtricks.lab.config import Fuse, UserError
from safetensors.numpy import load_file

SMALL = ["--steps", "12", "--batch", "32", "--widths", "8", "16", "--save-every", "12"]

ALONE = """
import sys
import numpy as np
from jax import export
from safetensors.numpy import load_file
program = export.deserialize(open("model.stablehlo", "rb").read())
images = np.load("images.npy")
np.save("logits.npy", program.call(load_file("model.safetensors"), images))
assert not any(name.split(".")[0] in ("jaxtricks", "flax") for name in sys.modules)
"""


@pytest.fixture(
    scope="module", params=["resnet --reparam --ebn", "nfnet", "repvgg --remat --ema 0.5"]
)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    model, *tricks = request.param.split()
    cli.main(["train", "--model", model, *tricks, *SMALL, "--out", str(folder)])
    return folder


def test_files_are_the_model_and_need_nothing_of_ours(run, tmp_path, capsys):
    out = tmp_path / "deploy"
    cli.main(["fuse", str(run), "--out", str(out), "--batch", "16"])
    printed = capsys.readouterr().out
    assert "the model" in printed and "ms before" in printed and "load_file" in printed
    result = json.loads((out / "fuse.json").read_text())
    assert result["difference"] < 1e-4 and result["difference_of_files"] < 1e-4
    assert result["same_class"] == 1 and result["ms_before"] > 0 and not result["kept"]
    assert result["layers"] and all(row["ratio"] <= 1 for row in result["layers"])
    # Another number of images than it was compared on.
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.save(out / "images.npy", images)
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=out)
    weights = load_file(out / fuse.WEIGHTS)
    assert {name.rsplit("/", 1)[1] for name in weights} <= {"kernel", "bias", "skip_gain"}
    made = fuse.rundir.read(run)
    settings = fuse.settings_of(made)
    model = fuse.restored(settings, fuse.train.load(settings), run, lambda _: None)
    expected = model(fuse.to_float(images))
    np.testing.assert_allclose(np.load(out / "logits.npy"), expected, atol=1e-4)


def test_mistakes_are_sentences(run, tmp_path, capsys):
    for args, words in (
        (["fuse", str(tmp_path)], "is no run"),
        (["fuse", str(run), "--batch", "0"], "--batch must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_files_lie_outside_of_the_data(run, tmp_path, monkeypatch):
    """Where a later run would take them for a class."""
    (tmp_path / "data").mkdir()
    settings = dataclasses.replace(
        fuse.settings_of(fuse.rundir.read(run)), data=str(tmp_path / "data")
    )
    monkeypatch.setattr(fuse, "settings_of", lambda _: settings)
    with pytest.raises(UserError, match="--out .*/data/fz lies in --data"):
        fuse.run(Fuse(str(run), out=str(tmp_path / "data/fz")))
    assert not list((tmp_path / "data").iterdir())
