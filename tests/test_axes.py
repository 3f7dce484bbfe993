"""The vocabulary of axes: rules by path, inference, and what is refused."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxtricks import axes


def shape(*n):
    return jax.ShapeDtypeStruct(n, jnp.float32)


@pytest.mark.parametrize(
    ("path", "dims", "roles"),
    [
        ("Dense_0/kernel", (3, 4), ("in", "out")),
        ("a/Conv_2/kernel", (3, 3, 4, 5), ("in", "in", "in", "out")),
        ("Conv_2/kernel", (3, 4, 5), ("in", "in", "out")),
        ("WSConv_0/kernel", (3, 3, 4, 5), ("in", "in", "in", "out")),
        ("attn/query/kernel", (8, 2, 4), ("in", "out", "out")),
        ("attn/out/kernel", (2, 4, 8), ("in", "in", "out")),
        ("Embed_0/embedding", (100, 8), ("in", "out")),
        ("norm/scale", (8,), ("none",)),
        ("norm/bias", (8,), ("none",)),
        # What a name does not explain is left to the transform, never guessed.
        ("Dense_0/kernel", (2, 3, 4), None),
        ("norm/scale", (2, 8), None),
        ("kernel", (3, 4), None),
        ("Denser/kernel", (3, 4), None),
        ("mystery/w", (3, 4), None),
    ],
)
def test_infer_decides_only_what_a_name_fixes(path, dims, roles):
    assert axes.infer(path, dims) == roles


def test_by_path_first_match_wins_and_leading_axes_are_batch():
    rule = axes.by_path({r".*/out/kernel": ("in", "in", "out"), r".*/kernel": ("in", "out")})
    assert rule("a/out/kernel", (2, 3, 4)) == ("in", "in", "out")
    assert rule("a/kernel", (7, 5, 2, 3)) == ("batch", "batch", "in", "out")
    assert rule("a/kernel/x", (2, 3)) is None  # the whole path must match
    with pytest.raises(ValueError, match="'a/kernel'"):
        rule("a/kernel", (3,))


def test_strict_rules_name_what_does_not_fit():
    params = {"a": {"kernel": shape(2, 3)}, "b": {"bias": shape(3)}}
    unused = axes.by_path({"a/kernel": ("in", "out"), "b/bias": ("none",), "c": ("none",)})
    with pytest.raises(ValueError, match="'c' matches no parameter"):
        axes.leaf_roles(unused, params)
    missing = axes.by_path({"a/kernel": ("in", "out")})
    with pytest.raises(ValueError, match="'b/bias'"):
        axes.leaf_roles(missing, params)
    loose = axes.by_path({"a/kernel": ("in", "out"), "c": ("none",)}, strict=False)
    assert axes.leaf_roles(loose, params) == [("in", "out"), None]
    masked = {"a": params["a"], "b": {"bias": optax.MaskedNode()}}
    assert axes.leaf_roles(unused, masked) == [("in", "out")]


def test_a_tree_of_roles_may_speak_of_what_is_not_there():
    roles = {"a": ("in", "out"), "b": ("none",), "c": None}
    params = {"a": shape(2, 3), "b": None, "c": shape(4)}
    assert axes.leaf_roles(roles, params) == [("in", "out"), None]
    params = {"a": shape(2, 3), "b": optax.MaskedNode(), "c": shape(4)}
    assert axes.leaf_roles(roles, params) == [("in", "out"), None]


def test_nothing_given_is_nothing_said():
    assert axes.leaf_roles(None, {"a": shape(2), "b": None}) == [None]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (lambda path, shape: ("in",), "one per axis"),
        (lambda path, shape: ("row", "col"), "'row'"),
        (lambda path, shape: "in", "tuple"),
    ],
)
def test_wrong_roles_are_refused(rule, says):
    with pytest.raises(ValueError, match=says):
        axes.leaf_roles(rule, {"w": shape(2, 3)})


def test_by_path_refuses_unknown_roles_and_broken_expressions():
    with pytest.raises(ValueError, match="use a tuple of"):
        axes.by_path({"w": ("fan_in",)})
    with pytest.raises(ValueError, match="no regular expression"):
        axes.by_path({"(": ("in",)})


def test_exact_knows_its_paths_and_no_others():
    rule = axes.exact({"a/kernel": ("in", "out")})
    assert rule("a/kernel", (4, 2, 3)) == ("batch", "in", "out")
    assert rule("b/kernel", (2, 3)) is None


def test_is_kernel():
    assert axes.is_kernel("a/kernel", (2, 3))
    assert axes.is_kernel("embedding", (2, 3))
    assert not axes.is_kernel("a/kernel", (3,))
    assert not axes.is_kernel("stack/bias", (5, 3))
    assert not axes.is_kernel("bias/scale", (5, 3))


def test_describe_is_a_table():
    text = str(axes.describe({"Dense_0": {"kernel": shape(2, 3)}, "x": shape()}, axes.infer))
    assert "Dense_0/kernel" in text
    assert "2x3" in text
    assert "in out" in text
    assert "by rank and size" in text


def test_positions():
    assert axes.positions(("batch", "in", "out", "in"), "in", "batch") == (0, 1, 3)
