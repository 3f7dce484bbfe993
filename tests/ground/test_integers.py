"""Integers that are not Python's: NumPy's, and arrays without axes, do as the int they stand for."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from jaxtricks import remat


def test_any_integer_does_as_the_int():
    """In a process of its own, where nothing but the library checks types."""
    script = pathlib.Path(__file__).parents[1] / "integers.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["tried"] >= 80
    assert not counts["failed"]


def _loss(x, w):
    return jnp.sin(jnp.sin(x @ w) @ w).sum()


@pytest.mark.parametrize("argnums", [5, -3, (0, 2)])
def test_argnums_of_no_argument(argnums):
    with pytest.raises(ValueError, match=r"argnums=.*(5|-3|2).* is of no argument"):
        remat.plan(_loss, jnp.ones((4, 8)), jnp.eye(8), budget_bytes=0.5, argnums=argnums)


def test_argnums_count_from_the_end():
    last, second = (
        remat.plan(_loss, jnp.ones((64, 8)), jnp.eye(8), budget_bytes=1.0, argnums=n)
        for n in (-1, 1)
    )
    assert last.peak == second.peak and last.schedule == second.schedule
