"""What the README shows runs, in English and in Chinese."""

import pathlib
import re

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx

from tests import strangers

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", [README, CHINESE], ids=["English", "Chinese"])


def fences(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@each_page
def test_there_are_two_commands(page):
    commands = re.findall(r"^make (\w+)", fences(page, "bash")[0], re.MULTILINE)
    assert commands == ["demo", "test"]


@each_page
def test_what_is_linked_is_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert (ROOT / target).exists(), target


def test_the_chinese_page_trains_and_fuses(capsys):
    scope: dict = {}
    for code in fences(CHINESE):
        exec(code, scope)
    losses = np.asarray(scope["losses"])
    assert losses[-8:].mean() < 0.5 * losses[:8].mean()
    assert "layers/0" in capsys.readouterr().out
    images = scope["images"][:4]
    assert jnp.allclose(scope["plain"](images), scope["model"](images), atol=1e-5)


def test_the_example_trains():
    code, *_ = fences(README)
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


def test_a_model_is_converted_and_fused(capsys):
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    code = next(c for c in fences(README) if "convert" in c)
    before, after = code.split("plain, report", 1)
    model = strangers.trained(strangers.made(strangers.ResNet), images)
    scope = {"jt": jt, "nnx": nnx, "model": model, "images": images}
    exec(before, scope)
    strangers.trained(scope["model"], images, steps=1)
    exec("plain, report" + after, scope)
    assert "blocks/0/conv1" in capsys.readouterr().out
    assert jnp.allclose(scope["plain"](images), scope["model"](images), atol=1e-5)


def test_the_table_has_the_ten_keys():
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == list(jt.KEYS)
    assert "Not on PyPI yet" in README and "make demo" in README and "make test" in README


def test_a_loss_is_made_low(capsys):
    code = next(c for c in fences(README) if "autocast" in c)
    keys = jax.random.split(jax.random.key(0), 3)
    up, down, x = (jax.random.normal(k, (8, 8)) for k in keys)
    params = {"up": up, "bias": jnp.zeros((1, 8)), "down": down}
    scope = {"jt": jt, "jax": jax, "optax": optax, "params": params, "x": x, "y": jnp.arange(8)}
    exec(code, scope)
    assert "5 products in bfloat16, 0 in float32" in capsys.readouterr().out
    grads = scope["grad_fn"](params, x, scope["y"])
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.devices
def test_state_lies_where_the_parameters_lie(capsys):
    code = next(c for c in fences(README) if "make_mesh" in c)
    params = {"a": jnp.ones((16, 4)), "b": jnp.ones((8, 8))}
    scope = {"jt": jt, "jax": jax, "optax": optax, "params": params}
    exec(code, scope)
    assert "('data'" in capsys.readouterr().out
    rows = [x for x in jax.tree.leaves(scope["state"]) if x.shape in ((16,), (8,))]
    assert any(x.sharding.spec == jax.sharding.PartitionSpec("data") for x in rows)
