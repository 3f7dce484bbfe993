"""The lab's training steps under the TPU's compiler, in processes of another interpreter: see conftest.py."""

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest
from benchmarks.common import StepCost

ROOT = pathlib.Path(__file__).parents[2]


def interpreter() -> str:
    """The one of TPU_PYTHON, which must work; else that of ./.venv-tpu, if there is one."""
    found = os.environ.get("TPU_PYTHON", "")
    if not found:
        found = str(ROOT / ".venv-tpu" / "bin" / "python")
        if not os.path.exists(found):
            pytest.skip(
                "needs libtpu: `make test-all` installs it, or name an interpreter in TPU_PYTHON"
            )
    return found


def compiled(script: str, timeout: int = 900) -> Any:
    """What the script prints, from a process that compiles for the TPU."""
    done = subprocess.run(
        [interpreter(), "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def costs(
    chips: str, model: str, names: tuple[str, ...] = (), topology: str = "v5e:2x2"
) -> dict[str, StepCost]:
    """`tpu_aot.one_chip(model, names)` or `tpu_aot.four_chips(model, names)`; names () are all."""
    found = f"aot.{chips}({model!r}, {names!r})"
    script = f"""
import json
from benchmarks import tpu, tpu_aot as aot
tpu.TOPOLOGY = {topology!r}
print(json.dumps({found}))
"""
    return {name: StepCost(*values) for name, values in compiled(script, timeout=3600).items()}
