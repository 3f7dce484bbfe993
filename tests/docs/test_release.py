"""What is shipped: a wheel that moves nothing, and whose core works alone."""

import email
import json
import pathlib
import subprocess
import sys
import venv
import zipfile

import jaxtricks as jt
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CORE = {"chex", "flax", "jax", "jaxtyping", "numpy", "optax"}


def run(*command, code=0):
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_library_and_asks_for_six_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert "jaxtricks/py.typed" in names and "jaxtricks/lab/cli.py" in names
    assert {n.split("/")[0] for n in names} == {"jaxtricks", metadata.split("/")[0]}
    required = email.message_from_string(text).get_all("Requires-Dist") or []
    core = [r for r in required if "extra ==" not in r]
    assert {r.split(">")[0].split("=")[0].strip() for r in core} == CORE


def test_installing_it_here_moves_nothing(wheel):
    # What the first cell of the notebooks does: everything that it needs is there already, and stays.
    report = run(
        *(sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--force-reinstall"),
        *("--no-deps", "--report", "-", wheel),
    )
    assert [x["metadata"]["name"] for x in json.loads(report.stdout)["install"]] == ["jaxtricks"]
    # With its dependencies looked at, but nothing else asked for.
    report = run(
        *(sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--report", "-", wheel)
    )
    moved = {x["metadata"]["name"] for x in json.loads(report.stdout)["install"]}
    assert moved <= {"jaxtricks"}


BLOCKED = """
import sys
for name in ("grain", "rich", "matplotlib", "orbax", "sklearn"):
    sys.modules[name] = None  # an import of it fails
from jaxtricks.lab import cli
cli.main(sys.argv[1:])
"""


def test_the_core_explains_and_names_the_extra():
    card = run(sys.executable, "-c", BLOCKED, "explain", "agc").stdout
    assert card.startswith("Adaptive gradient clipping")
    assert "lr-find" in run(sys.executable, "-c", BLOCKED, "--help").stdout
    assert "--learning-rate" in run(sys.executable, "-c", BLOCKED, "train", "--help").stdout
    for args in (("train",), ("ablate", "--seeds", "1")):
        said = run(sys.executable, "-c", BLOCKED, *args, code=2).stderr
        assert "pip install 'jaxtricks[lab]'" in said and said.count("\n") == 1


def install_cell(wheel):
    """The first code cell of the notebooks as Python, with the wheel in place of the repository."""
    cells = nbformat.read(ROOT / "notebooks/00_quickstart.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if cell.cell_type == "code")
    magic = f'%pip install -q "jaxtricks @ git+{jt.REPO_URL}"'
    assert magic in source
    arguments = ["-m", "pip", "install", "-q", f"jaxtricks @ {wheel.as_uri()}"]
    command = f"import subprocess, sys; subprocess.check_call([sys.executable, *{arguments}])"
    return source.replace(magic, command)


@pytest.mark.slow
def test_the_wheel_alone_in_a_new_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    stack = "newest" if sys.version_info < (3, 13) else "colab"
    constraints = ROOT / "constraints" / f"{stack}.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, "jax", "flax", "optax")
    before = run(python, "-m", "pip", "freeze").stdout.splitlines()
    run(python, "-I", "-c", install_cell(wheel))  # -I: the wheel, not this folder
    after = run(python, "-m", "pip", "freeze").stdout.splitlines()
    kept = ("jax==", "jaxlib==", "flax==", "optax==", "numpy==")
    assert [x for x in after if x.startswith(kept)] == [x for x in before if x.startswith(kept)]
    assert run(tmp_path / "env/bin/jaxtricks", "explain", "agc").stdout
    said = run(tmp_path / "env/bin/jaxtricks", "train", code=2).stderr
    assert "pip install 'jaxtricks[lab]'" in said
    use = "import jaxtricks as jt; jt.agc.adaptive_grad_clip(); jt.nnx.WSConv; jt.linen"
    run(python, "-I", "-c", use)
