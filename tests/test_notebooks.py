"""Every notebook runs from top to bottom in a fresh kernel, and is committed as it should be."""

import os
import pathlib
import types

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import jaxtricks as jt

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"03_memopt.ipynb"}


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def named(path, *, slow=False):
    marks = [pytest.mark.slow] if slow and path.name not in QUICK else []
    return pytest.param(path, id=path.stem, marks=marks)


every = pytest.mark.parametrize("path", [named(path) for path in NOTEBOOKS])
every_run = pytest.mark.parametrize("path", [named(path, slow=True) for path in NOTEBOOKS])


def test_there_are_notebooks():
    assert {path.name for path in NOTEBOOKS} >= QUICK


@every_run
def test_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))  # one device, as people have
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = read(path)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert all(cell.execution_count for cell in code(notebook))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@every
def test_is_valid(path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert not [name for name in ids if len(name) == 8 and name.isalnum() and not name.isalpha()]


@every
def test_outputs_are_stripped_except_one_figure(path):
    cells = code(read(path))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) <= 1
    assert all("image/png" in output.data for output in outputs)
    assert not [cell for cell in cells if cell.execution_count is not None]
    assert path.stat().st_size < 200_000


@every
def test_badge_first(path):
    first = read(path).cells[0]
    repository = jt.REPO_URL.removeprefix("https://github.com/")
    assert first.cell_type == "markdown"
    assert f"/github/{repository}/blob/main/notebooks/{path.name})" in first.source


def test_memopt_without_the_results_plots_the_readers_curves(tmp_path):
    import json

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source = {cell.id: cell.source for cell in read(ROOT / "notebooks/03_memopt.ipynb").cells}
    draw = source["compare-plot"].split("\n\n\n")[0]
    package = types.SimpleNamespace(__file__=str(tmp_path / "jaxtricks/__init__.py"))
    names = {"jt": package, "json": json, "pathlib": pathlib, "plt": plt, "np": np}
    names |= {"curves": {"mine": np.arange(60.0)}, "STEPS": 60}
    plt.close("all")
    with matplotlib.rc_context():
        exec(draw + "\n\n" + source["full"], names)
    lines = names["ax"].get_lines()
    plt.close("all")
    assert [line.get_label() for line in lines] == ["mine"]
