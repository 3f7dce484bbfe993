"""The vocabulary of axes: rules by path, inference, and what is refused."""

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import agc, memopt
from jaxtricks import roles as roles_lib


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
        ("lora/lora_a", (8, 2), ("in", "out")),
        ("lora_b", (2, 8), ("in", "out")),
        ("cell/hi/kernel", (4, 4), ("in", "out")),
        ("cell/if_/kernel", (3, 4), ("in", "out")),
        ("cell/dense_h/kernel", (4, 12), ("in", "out")),
        # What a name does not explain is left to the transform, never guessed.
        ("Dense_0/kernel", (2, 3, 4), None),
        ("norm/scale", (2, 8), None),
        ("kernel", (3, 4), None),
        ("Denser/kernel", (3, 4), None),
        ("mystery/w", (3, 4), None),
        ("cell/hi/kernel", (5, 4, 4), None),
        ("cell/ih/kernel", (3, 3, 4, 16), None),
        ("lora_a", (5, 8, 2), None),
        ("Conv_0/kernel", (3, 3, 3, 4, 5), None),  # 3-D, or 2-D and stacked?
        ("Embed_0/embedding", (5, 100, 8), None),
        ("VmapConv_0/Conv_0/kernel", (3, 3, 4, 5), None),
        ("ScanBlock_0/query/kernel", (3, 8, 8), None),
    ],
)
def test_infer_decides_only_what_a_name_fixes(path, dims, roles):
    assert roles_lib.infer(path, dims) == roles


def test_by_path_first_match_wins_and_leading_axes_are_batch():
    rule = roles_lib.by_path({r".*/out/kernel": ("in", "in", "out"), r".*/kernel": ("in", "out")})
    assert rule("a/out/kernel", (2, 3, 4)) == ("in", "in", "out")
    assert rule("a/kernel", (7, 5, 2, 3)) == ("batch", "batch", "in", "out")
    assert rule("a/kernel/x", (2, 3)) is None  # the whole path must match
    with pytest.raises(ValueError, match="'a/kernel'"):
        rule("a/kernel", (3,))


def test_strict_rules_name_what_does_not_fit():
    params = {"a": {"kernel": shape(2, 3)}, "b": {"bias": shape(3)}}
    unused = roles_lib.by_path({"a/kernel": ("in", "out"), "b/bias": ("none",), "c": ("none",)})
    with pytest.raises(ValueError, match="'c' matches no parameter"):
        roles_lib.leaf_roles(unused, params)
    missing = roles_lib.by_path({"a/kernel": ("in", "out")})
    with pytest.raises(ValueError, match="'b/bias'"):
        roles_lib.leaf_roles(missing, params)
    loose = roles_lib.by_path({"a/kernel": ("in", "out"), "c": ("none",)}, strict=False)
    assert roles_lib.leaf_roles(loose, params) == [("in", "out"), None]
    late = {".*": ("none",), "a/kernel": ("in", "out")}
    with pytest.raises(ValueError, match=r"'a/kernel' is never used, since '\.\*' comes first"):
        roles_lib.leaf_roles(roles_lib.by_path(late), params)
    partly = {"a/.*": ("in", "out"), "(a|b)/.*": ("none",)}  # the second is of use for b
    assert roles_lib.leaf_roles(roles_lib.by_path(partly), params) == [("in", "out"), ("none",)]
    many = roles_lib.by_path({".*": ("in", "in", "out")})
    with pytest.raises(ValueError, match=r"'a/kernel' has shape \(2, 3\).*give one role per axis"):
        roles_lib.leaf_roles(many, params)
    masked = {"a": params["a"], "b": {"bias": optax.MaskedNode()}}
    assert roles_lib.leaf_roles(unused, masked) == [("in", "out")]


def test_a_tree_of_roles_may_speak_of_what_is_not_there():
    roles = {"a": ("in", "out"), "b": ("none",), "c": None}
    params = {"a": shape(2, 3), "b": None, "c": shape(4)}
    assert roles_lib.leaf_roles(roles, params) == [("in", "out"), None]
    params = {"a": shape(2, 3), "b": optax.MaskedNode(), "c": shape(4)}
    assert roles_lib.leaf_roles(roles, params) == [("in", "out"), None]


def test_nothing_given_is_nothing_said():
    assert roles_lib.leaf_roles(None, {"a": shape(2), "b": None}) == [None]


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
        roles_lib.leaf_roles(rule, {"w": shape(2, 3)})


def test_by_path_refuses_unknown_roles_and_broken_expressions():
    with pytest.raises(ValueError, match="use a tuple of"):
        roles_lib.by_path({"w": ("fan_in",)})
    with pytest.raises(ValueError, match="not a regular expression"):
        roles_lib.by_path({"(": ("in",)})


def test_exact_knows_its_paths_and_no_others():
    rule = roles_lib.exact({"a/kernel": ("in", "out")})
    assert rule("a/kernel", (4, 2, 3)) == ("batch", "in", "out")
    assert rule("b/kernel", (2, 3)) is None


def test_is_kernel():
    assert roles_lib.is_kernel("a/kernel", (2, 3))
    assert roles_lib.is_kernel("embedding", (2, 3))
    assert not roles_lib.is_kernel("a/kernel", (3,))
    assert not roles_lib.is_kernel("stack/bias", (5, 3))
    assert not roles_lib.is_kernel("bias/scale", (5, 3))


def test_exact_marks_what_is_assumed():
    rule = roles_lib.exact({"a": ("batch", "in"), "b": ("none",)}, assumed=["a", "gone"])
    table = roles_lib.describe({"a": shape(2, 2), "b": shape(2)}, rule)
    assert [row[2] for row in table.rows] == ["batch in (assumed)", "none"]
    assert len(table.notes) == 1 and table.notes[0].startswith("1 of 2 leaves (assumed)")


def test_describe_is_a_table():
    params = {
        "Dense_0": {"kernel": shape(2, 3)},
        "absent": None,
        "complex": jnp.ones(2, jnp.complex64),
        "key": jax.random.split(jax.random.key(0), 3),
        "none": optax.MaskedNode(),
        "number": 3.0,
        "steps": np.zeros((2, 2), np.int32),
        "x": shape(),
    }
    table = roles_lib.describe(params, roles_lib.infer)
    assert table.rows == (
        ("Dense_0/kernel", "2x3", "in out"),
        ("complex", "2", "by rank and size"),
        ("key", "3", "by rank and size"),
        ("number", "scalar", "scalar"),
        ("steps", "2x2", "by rank and size"),
        ("x", "scalar", "scalar"),
    )
    (note,) = table.notes
    assert note.startswith("3 of 6 leaves: by rank and size") and "jt.linen.roles" in note
    assert note in str(table)
    assert not roles_lib.describe(
        {"Dense_0": params["Dense_0"], "x": shape()}, roles_lib.infer
    ).notes


@pytest.mark.parametrize("rule", [None, lambda path, shape: None, {"a": None, "b": None}])
def test_describe_counts_every_leaf_that_nothing_decides(rule):
    table = roles_lib.describe({"a": shape(2, 3), "b": shape(3)}, rule)
    assert [row[2] for row in table.rows] == ["by rank and size"] * 2
    assert table.notes[0].startswith("2 of 2")


def test_describe_of_a_models_roles_is_silent_about_vectors_and_does_not_name_itself():
    rule = roles_lib.exact({"a/kernel": ("in", "out")})
    params = {"a": {"kernel": shape(2, 3)}, "scale": shape(3)}
    assert not roles_lib.describe(params, rule).notes
    (note,) = roles_lib.describe({**params, "own": shape(2, 3)}, rule).notes
    assert note.startswith("1 of 3") and "by_path" in note and "jt.nnx.roles" not in note


class Model(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.stem(x)


TRANSFORMS = {
    "agc": lambda axes: agc.adaptive_grad_clip(roles=axes),
    "adafactor": lambda axes: memopt.adafactor(roles=axes),
    "sm3": lambda axes: memopt.sm3(0.1, roles=axes),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_roles_of_another_model_raise_and_name_the_nearest_path(make):
    rule = jt.nnx.roles(Model(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'body/kernel'.*'stem/kernel'"):
        make(rule).init({"body": {"kernel": jnp.ones((256, 256))}})
    # A part of the model's parameters is right, and so are more of one's own.
    make(rule).init({"stem": {"kernel": jnp.ones((4, 4))}})
    make(rule).init({"stem": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "own": jnp.ones(3)})
    make(rule).init({"temperature": jnp.ones(()), "own": jnp.ones(3)})
    # Both at once are what a conversion leaves behind.
    with pytest.warns(UserWarning, match=r"'stem/conv/kernel'.*'stem/kernel'"):
        make(rule).init({"stem": {"conv": {"kernel": jnp.ones((4, 4))}, "bias": jnp.ones(4)}})


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_no_rule_is_named_and_never_printed(make):
    params = {"w": jnp.full((4, 4), 7.0)}
    for wrong in (
        "in",
        3,
        True,
        object,
        [1],
        {"v": ("in", "out")},
        {"w": params["w"]},
        {"w": "in"},
    ):
        with pytest.raises(ValueError, match="^roles: ") as caught:
            make(wrong).init(params)
        assert "7." not in str(caught.value) and "\n" not in str(caught.value)
    model = Model(nnx.Rngs(0))
    for wrong in (model, nn.Dense(3)):
        with pytest.raises(ValueError, match=r"is a model: pass its roles, jt\.nnx\.roles"):
            make(wrong).init(params)
    with pytest.raises(ValueError, match=r"describe\(params, roles\)"):
        roles_lib.describe(roles_lib.infer, params)


def test_describe_reads_states_and_boxes():
    boxed = nn.Dense(
        4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    )
    params = boxed.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    rule = roles_lib.by_path({"kernel": ("in", "out"), "bias": ("none",)})
    for tree in (params, state, nnx.to_pure_dict(state)):
        table = roles_lib.describe(tree, rule)
        assert table.rows == (("bias", "4", "none"), ("kernel", "3x4", "in out"))


def test_positions():
    assert roles_lib.positions(("batch", "in", "out", "in"), "in", "batch") == (0, 1, 3)


@pytest.mark.parametrize(
    ("dims", "axis_roles", "view"),
    [
        ((4, 3), ("in", "out"), ((), (0,), (1,))),
        ((4, 3), ("out", "in"), ((), (1,), (0,))),
        ((5, 4, 3), ("batch", "in", "out"), ((0,), (1,), (2,))),
        ((8, 2, 5), ("in", "out", "out"), ((), (0,), (1, 2))),
        ((3, 3, 4, 8), ("in", "in", "in", "out"), ((), (0, 1, 2), (3,))),
        ((4, 2, 5, 3), ("in", "none", "batch", "out"), ((1, 2), (0,), (3,))),
        ((5, 3), ("batch", "none"), None),
        ((4, 3), ("in", "in"), None),
        ((0, 3), ("in", "out"), None),
        ((), (), None),
        ((4, 3), None, None),
    ],
)
def test_matrix_view(dims, axis_roles, view):
    expected = None if view is None else roles_lib.MatrixView(*view)
    rule = lambda path, shape: axis_roles
    for params in ({"w": np.ones(dims), "gone": None}, {"w": shape(*dims), "gone": None}):
        assert roles_lib.matrix_view(params, rule) == {"w": expected, "gone": None}
    assert roles_lib.matrix_view(np.ones(dims), rule) == expected


def test_matrix_view_of_a_models_roles_and_under_masked():
    model = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    views = roles_lib.matrix_view(params, jt.nnx.roles(model))
    assert views["query"] == {"kernel": roles_lib.MatrixView((), (0,), (1, 2)), "bias": None}
    assert views["out"] == {"kernel": roles_lib.MatrixView((), (0, 1), (2,)), "bias": None}
    hidden = {"a": optax.MaskedNode(), "b": np.ones((4, 3))}
    rule = roles_lib.by_path({"a": ("in", "out"), "b": ("out", "in")})
    view = roles_lib.matrix_view(hidden, rule)
    assert view == {"a": optax.MaskedNode(), "b": roles_lib.MatrixView((), (1,), (0,))}


def test_exclude_matches_whole_paths_and_modules():
    path_filter = roles_lib.exclude("head", r"block/\d/norm/scale")
    paths = ("head/kernel", "overhead/kernel", "block/0/norm/scale", "x/head/bias")
    assert [path_filter(path) for path in paths] == [False, True, False, True]
    with pytest.raises(ValueError, match="not a regular expression"):
        roles_lib.exclude("(")
