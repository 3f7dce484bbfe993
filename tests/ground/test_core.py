"""Paths, nodes, tables, jaxprs: the parts below the rooms."""

import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtricks import _jaxpr, _table, _tree


def test_importing_the_package_imports_no_jax():
    code = "import sys, jaxtricks; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(jt.KEYS) <= set(dir(jt))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jt.nonsense


def test_paths_are_keys_joined_and_a_final_value_dropped():
    tree = {"a": [{"kernel": jnp.ones(1)}, jnp.ones(2)], "value": {"value": jnp.ones(3)}, "n": None}
    paths = [path for path, _ in _tree.leaves_with_paths(tree)]
    assert paths == ["a/0/kernel", "a/1", "value"]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert [path for path, _ in _tree.leaves_with_paths(state)] == ["bias", "kernel"]


def test_nbytes_counts_shapes_keys_and_skips_none():
    tree = {
        "a": jnp.ones((2, 3), jnp.bfloat16),
        "b": None,
        "s": jax.ShapeDtypeStruct((4,), jnp.int8),
    }
    assert _tree.nbytes(tree) == 12 + 4
    assert _tree.nbytes(jax.random.key(0)) == 8


def test_node_is_a_frozen_pytree_with_static_fields():
    @_tree.node
    class Point:
        x: object
        unit: str = _tree.static(default="m")

        def __post_init__(self):
            if not hasattr(self.x, "shape"):
                raise ValueError("checked constructor")

    point = Point(jnp.arange(3.0))
    doubled = jax.tree.map(lambda x: 2 * x, point)
    assert doubled.unit == "m" and float(doubled.x[2]) == 4
    # Unflattening with objects that are no arrays must not run the check.
    assert jax.tree.map(lambda x: None, point).x is None
    assert jax.vmap(lambda p: p.x + 1)(point).shape == (3,)
    assert _tree.leaves_with_paths(point)[0][0] == "x"
    with pytest.raises(AttributeError):
        point.x = 3
    assert point == point and point != Point(point.x) and hash(point) == hash(point)


def test_metrics_are_collected_through_any_chain():
    class Reporting(NamedTuple):
        v: object

        def metrics(self):
            return {"room/v": self.v}

    state = ({"deep": (Reporting(jnp.float32(1)),)}, Reporting(jnp.float32(2)))
    assert jt.metrics(state) == {"room/v": 1, "room/v_1": 2}
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    assert jt.metrics(tx.init(jnp.ones(1)))["learning_rate"] == 0.5
    assert jt.metrics(optax.EmptyState()) == {}


def test_tables_align_and_print_bytes():
    table = _table.make(("name", "n"), [("a", 1), ("long", 1234.5678), ("none", None)], ["note"])
    lines = str(table).splitlines()
    assert lines[2].endswith("1") and lines[3].endswith("1235") and lines[-1] == "note"
    assert table.markdown().startswith("| name | n |\n| --- | --- |")
    texts = [_table.format_bytes(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)]
    assert texts == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5120.0 GiB"]


def test_jaxpr_walk_sees_bodies_and_consts():
    w = jnp.ones((3, 3))

    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=4)[0]

    counts = _jaxpr.census(fn, jnp.ones(3))
    assert counts["dot_general", "float32"] == 1 and counts["tanh", "float32"] == 1
    closed, structure = _jaxpr.trace(fn, jnp.ones(3))
    (out,) = _jaxpr.as_fun(closed.jaxpr)(closed.consts, jnp.ones(3))
    np.testing.assert_allclose(jax.tree.unflatten(structure, [out]), fn(jnp.ones(3)), rtol=1e-6)


def test_the_floors_are_what_colab_ships():
    pins = pathlib.Path(__file__).parents[2] / "constraints" / "colab.txt"
    text = pins.read_text()
    project = (pins.parent.parent / "pyproject.toml").read_text()
    for name in ("jax", "flax", "optax"):
        floor = project.split(f'"{name}>=')[1].split('"')[0]
        assert f"\n{name}=={floor}\n" in text
    assert "//" not in text and "@" not in text  # no address of a registry
