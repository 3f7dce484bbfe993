"""The table of peers: what a row says, and the parts of the README that commands write."""

import json
import pathlib

import pytest
from benchmarks import peers, readme
from jaxtricks.lab.commands import ablate


def test_a_part_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb \\1\n")
    readme.replace("x", "new \\g<0>\n", path)
    assert path.read_text() == "a\n<!-- x: begin -->\nnew \\g<0>\n<!-- x: end -->\nb \\1\n"
    assert readme.part("x", path) == "new \\g<0>"


@pytest.mark.parametrize("text", ["nothing here", 2 * "<!-- x: begin -->\nold\n<!-- x: end -->\n"])
def test_a_part_that_is_not_there_once_is_an_error_and_nothing_is_written(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="parts 'x': it needs one"):
        readme.replace("x", "new", path)
    assert path.read_text() == text


def test_a_row_has_ratios_of_ours_to_the_peer():
    calls = []
    ours = peers.Program(lambda: calls.append("ours"), 50.0)
    peer = peers.Program(lambda: calls.append("peer"), 200.0)
    found = peers.row(peers.Pair("a", "b", (ours, peer), "state", "update"), rounds=3)
    assert found[:2] == ("a", "b") and found[4:] == ("0.25", "state", "update")
    assert all(float(x) > 0 for x in found[2:4])
    assert calls == ["ours", "peer"] * 5  # two to warm up


def test_a_peer_that_fails_is_a_row_too():
    pair = peers.Pair("a", "b", (peers.Program(), peers.Program(failed="TypeError: x")), "", "")
    assert peers.row(pair, rounds=3) == ("a", "b", "TypeError: x", "-", "-", "", "")


def test_the_readme_has_every_group_of_peers():
    text = readme.part("peers")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][0] == "| ours" and len(rows) >= 17
    named = {row[1].split()[0] for row in rows[1:]}
    assert {"optax.adafactor", "optax.sm3", "adamw", "nnx.BatchNorm", "linen.remat"} <= named
    assert {"jax.checkpoint", "jmp", "grampax", "jaxamp"} <= named
    assert "rounds in turn" in text and "jax " in text and "cores" in text


def test_the_ablation_of_photographs_is_the_recorded_one():
    folder = pathlib.Path(peers.__file__).parent / "results"
    rows = json.loads((folder / "ablation_cifar.json").read_text())
    table = ablate.table(rows).markdown()
    assert readme.part("ablation-cifar") == table
    assert table in (folder / "ablation_cifar.md").read_text()
