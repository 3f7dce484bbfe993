"""Every notebook runs from top to bottom in a fresh kernel, and is committed as it should be."""

import base64
import os
import pathlib
import re
import types

import jaxtricks as jt
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = (
    "00_quickstart",
    "01_echo",
    "02_amp",
    "03_memopt",
    "04_weightstd",
    "05_agc",
    "06_remat",
    "07_ebn",
    "08_cyclical",
    "09_reparam",
    "10_longtail",
    "11_ablation",
)
QUICK = {"01_echo"}  # these run in `make test` too
REPOSITORY = jt.REPO_URL.removeprefix("https://github.com/")
HEADINGS = (
    "The idea in one figure",
    "In your own loop",
    "With and without",
    "Settings to start from",
    "Exercise",
    "References",
)
FAST = 'FAST = bool(int(os.environ.get("FAST", "0")))'


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_picture(output):
    return output.output_type == "display_data" and "image/png" in output.data


def headings(notebook):
    """(heading, ids of the code cells below it), in the order of the notebook."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found += [(line[3:], []) for line in cell.source.splitlines() if line[:3] == "## "]
        elif found:
            found[-1][1].append(cell.id)
    return found


def figure_cell(notebook):
    """The cell with the committed output."""
    cells = [cell for cell in code(notebook) if cell.outputs]
    assert len(cells) == 1, [cell.id for cell in cells]
    return cells[0]


def named(path, *, slow=False):
    marks = [pytest.mark.slow] if slow and path.stem not in QUICK else []
    return pytest.param(path, id=path.stem, marks=marks)


every = pytest.mark.parametrize("path", [named(path) for path in NOTEBOOKS])
every_run = pytest.mark.parametrize("path", [named(path, slow=True) for path in NOTEBOOKS])


def test_all_twelve_are_there():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES
    assert set(NAMES) >= QUICK


@every_run
def test_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))  # one device, as people have
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = read(path)
    figure = figure_cell(notebook).id
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert all(cell.execution_count for cell in code(notebook))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    (shown,) = next(cell.outputs for cell in code(notebook) if cell.id == figure)
    assert is_picture(shown)


@every
def test_is_valid_and_its_ids_are_words(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    # Random ids, such as "3f2a9c1e", change whenever a tool writes the file.
    assert not [name for name in ids if not re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name)]
    assert not [name for name in ids if re.fullmatch(r"[0-9a-f]{8}", name)]


@every
def test_its_names_of_the_library_exist(path):
    text = "\n".join(cell.source for cell in code(read(path)))
    for room, name in set(re.findall(r"\bjt\.(\w+)\.(\w+)", text)):
        assert hasattr(getattr(jt, room), name), f"jt.{room}.{name}"


@every
def test_outputs_are_stripped_except_the_figure_of_the_idea(path):
    notebook = read(path)
    (output,) = figure_cell(notebook).outputs
    assert is_picture(output)
    assert len(base64.b64decode(output.data["image/png"])) <= 60_000
    assert not [cell for cell in code(notebook) if cell.execution_count is not None]
    assert figure_cell(notebook).id in dict(headings(notebook))["The idea in one figure"]


@every
def test_begins_with_title_badge_install_and_versions(path):
    notebook = read(path)
    title, (install, versions) = notebook.cells[0], code(notebook)[:2]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert f"/github/{REPOSITORY}/blob/main/notebooks/{path.name})" in title.source
    assert re.match(r"try:\n +import jaxtricks as jt\nexcept ImportError:\n", install.source)
    # Nothing but jaxtricks is asked for: a version of jax here would break Colab's TPU runtime.
    pip = re.findall(r"%pip .*", install.source)
    assert pip == [f'%pip install -q "jaxtricks @ git+{jt.REPO_URL}"']
    said = ("jax.__version__", "flax.__version__", "optax.__version__", "jt.__version__")
    for text in (*said, "jax.devices()", FAST):
        assert text in versions.source, text


@every
def test_has_its_parts_in_order(path):
    found = [heading for heading, _ in headings(read(path))]
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
    assert found[-1] == "References"


@every
def test_fast_means_smaller(path):
    later = "\n".join(cell.source for cell in code(read(path))[2:])
    assert re.search(r"\bif FAST else\b", later)


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
