"""What the README shows runs."""

import pathlib
import re

import jax
import jax.numpy as jnp

import jaxtricks as jt

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_trains():
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(code, scope)
    x = jnp.linspace(-1, 1, 16 * 8).reshape(16, 8)
    y = x.sum(axis=1, keepdims=True)
    losses = []
    for _ in range(100):
        loss, metrics = scope["step"](scope["model"], scope["optimizer"], x, y)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert set(metrics) == {"agc/clipped_fraction", "agc/max_ratio"}
    assert all(isinstance(value, jax.Array) for value in metrics.values())


def test_the_table_has_the_ten_keys():
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == list(jt.KEYS)
    assert "Not on PyPI yet" in README and "make demo" in README and "make test" in README
