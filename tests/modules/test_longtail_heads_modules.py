"""The heads as layers of nnx and linen: golden arrays, twins, roles, running means, whole models."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import _tree, longtail
from jaxtricks.longtail import decoupling, heads

X = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)

NAMES = {
    "CosineHead": {"s": 9.0},
    "NormedHead": {},
    "LWSHead": {},
    "LWSHead, no bias": {"use_bias": False},
    "DisAlignHead": {"compat": "reference"},
    "DisAlignHead, no bias": {"use_bias": False},
    "CausalHead": {"heads": 4, "alpha": 1.5, "momentum": 0.8},
}
each = pytest.mark.parametrize("name", NAMES)


def close(a, b, rtol):
    def check(a, b):
        scale = max(np.abs(b).max(), 1e-30)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=rtol * scale)

    jax.tree.map(check, a, b)


def pair(name, ins=8, outs=5, **more):
    """((apply, params, state) of the nnx and of the linen module, both modules); equal parameters."""
    kind, how = name.split(",")[0], NAMES[name] | more
    model = getattr(jt.nnx, kind)(ins, outs, rngs=nnx.Rngs(0), **how)
    module = getattr(jt.linen, kind)(outs, **how)
    apply, params, state = jt.nnx.functional(model)
    variables = module.init(jax.random.key(0), jnp.ones((1, ins)))
    linen_apply, like, linen_state = jt.linen.functional(module, variables)
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)
    return (apply, params, state), (linen_apply, params, linen_state), (model, module)


@each
def test_the_linen_twin_computes_the_same(name):
    one, two, (model, module) = pair(name)
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda p: draw(size=p.shape).astype(np.float32), one[1])

    def run(apply, params, state):
        def loss(params, x):
            y, new = apply(params, state, x, train=True)
            return jnp.sum(jnp.sin(y)), (y, new)

        (_, (y, new)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, X)
        return y, grads, new, apply(params, new, X, train=False)[0]

    a, b = (jax.jit(functools.partial(run, of[0]))(params, of[2]) for of in (one, two))
    close((a[0], a[1], a[3]), (b[0], b[1], b[3]), 1e-6)
    close(a[2], b[2].get("batch_stats", {}), 1e-6)
    rule, other = jt.nnx.roles(model), jt.linen.roles(module, X)
    for path, leaf in _tree.leaves_with_paths(params):
        kernel = path.endswith("kernel")
        assert rule(path, leaf.shape) == other(path, leaf.shape)
        assert rule(path, leaf.shape) == (("in", "out") if kernel else ("none",))


def test_golden(golden):
    arrays, _ = golden("longtail_more")
    g = {k.removeprefix("heads/a__"): v for k, v in arrays.items() if k.startswith("heads/a__")}
    w, b, lin = g["W"].T.copy(), g["b"], g["disalign_conf_W"].T.copy()
    calibration = {
        "logit_scale": g["disalign_scale"][0],
        "logit_bias": g["disalign_bias"][0],
        "confidence_kernel": lin,
        "confidence_bias": g["disalign_conf_b"],
    }
    cases = [
        ("CosineHead", {}, "cosnorm_oltr", {"kernel": w}),
        ("NormedHead", {}, "normed_linear", {"kernel": w}),
        ("LWSHead", {}, "lws", {"kernel": w, "bias": b, "scale": g["lws_scales"]}),
        ("DisAlignHead", {}, "disalign", {"kernel": w, "bias": b, **calibration}),
        ("CausalHead", {"alpha": 1.5}, "causal_train_a1.5", {"kernel": w}),
        ("CausalHead", {"alpha": 1.5}, "causal_tde_a1.5", {"kernel": w}),
    ]
    for kind, how, setting, params in cases:
        model = getattr(jt.nnx, kind)(16, 10, rngs=nnx.Rngs(0), **how)
        apply, like, state = jt.nnx.functional(model)
        assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)
        state = {"mean": jnp.asarray(g["tde_embed"])} if state else {}
        train = "tde" not in setting

        def out(params, x, apply=apply, state=state, train=train):
            return apply(params, state, x, train=train)[0]

        y, back = jax.vjp(jax.jit(out), params, g["x"])
        close(y, g[f"{setting}__out"], 2e-6)
        by_params, by_x = back(jnp.asarray(g["cot"]))
        close(by_x, g[f"{setting}__grad_x"], 2e-6)
        if setting == "lws":
            close(by_params["scale"], g["lws__grad_scales"], 2e-6)
    # MiSLAS's layer scales the logits that it is given, here of a head without bias
    z, back = jax.vjp(lambda x, f: heads.lws(x @ w, f), g["x"], g["lws_scales"])
    close(z, g["mislas_lws__out"], 2e-6)
    close(
        back(jnp.asarray(g["cot"])),
        (g["mislas_lws__grad_x"], g["mislas_lws__grad_learned_norm"].reshape(10)),
        2e-6,
    )


def test_the_running_mean_has_the_direction_of_the_references():
    """m <- mu m + mean(x) of the reference; ours is (1 - mu) times that, in evaluation the same."""
    (apply, params, state), _, _ = pair("CausalHead")
    mu, total = NAMES["CausalHead"]["momentum"], np.zeros(8)
    draw = np.random.default_rng(2).normal
    step = jax.jit(functools.partial(apply, train=True))
    for _ in range(4):
        x = draw(size=(6, 8)).astype(np.float32) + 1
        total = mu * total + x.mean(0)
        y, state = step(params, state, x)
        close(y, heads.tde(x, params["kernel"], heads=4, alpha=1.5), 1e-6)
    close(state["mean"], (1 - mu) * total, 1e-6)
    y, after = apply(params, state, X, train=False)
    direction = total.astype(np.float32)
    close(y, heads.tde(X, params["kernel"], direction, heads=4, alpha=1.5), 2e-6)
    close(after, state, 0)
    assert np.any(np.abs(y - heads.tde(X, params["kernel"], heads=4)) > 1e-2)


def test_the_running_mean_over_a_mapped_axis():
    head = jt.nnx.CausalHead(8, 5, axis_name="i", rngs=nnx.Rngs(0))
    apply, params, state = jt.nnx.functional(head)
    alone, _, zero = jt.nnx.functional(jt.nnx.CausalHead(8, 5, rngs=nnx.Rngs(0)))
    run = jax.vmap(lambda x: apply(params, state, x, train=True)[1], axis_name="i")
    means = run(X)["mean"]
    close(means[0], means[2], 0)
    close(means[0], alone(params, zero, X, train=True)[1]["mean"], 1e-6)
    module = jt.linen.CausalHead(5, axis_name="i")
    variables = module.init(jax.random.key(0), X[0])  # outside of any mapped axis
    linen = jax.vmap(lambda x: module.apply(variables, x, mutable="batch_stats")[1], axis_name="i")
    close(linen(X)["batch_stats"]["mean"], means, 1e-6)


def test_mode_and_static_mistakes():
    head = jt.nnx.CausalHead(8, 5, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="CausalHead needs `use_running_average`"):
        head(X)
    head(X, use_running_average=True)
    assert np.all(np.asarray(head.mean[...]) == 0)
    with pytest.raises(ValueError, match="heads"):
        jt.nnx.CausalHead(8, 5, heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(Exception, match="compat"):
        jt.nnx.DisAlignHead(8, 5, compat="paper", rngs=nnx.Rngs(0))


@each
def test_dtypes(name):
    (apply, params, state), (linen_apply, _, linen_state), _ = pair(name)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x = jnp.asarray(X, jnp.bfloat16)
    wide, new = apply(low, state, x.astype(jnp.float32), train=True)
    y, new = apply(low, state, x, train=True)
    z, _ = linen_apply(low, linen_state, x, train=True)
    assert y.dtype == z.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(new))
    close(np.float32(y), np.float32(wide), 0.02)
    # bfloat16 products, float32 logits for the loss are one argument away
    (apply, params, state), _, _ = pair(name, dtype=jnp.float32)
    assert apply(low, state, x, train=True)[0].dtype == jnp.float32


def test_two_stages_with_an_lws_head():
    """The parameters of a plain model, with a scale, are those of the same model with an LWSHead."""

    class Net(nnx.Module):
        def __init__(self, head):
            self.trunk = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
            self.head = head(6, 5, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(nnx.relu(self.trunk(x)))

    first, params, state = jt.nnx.functional(Net(nnx.Linear))
    second, like, _ = jt.nnx.functional(Net(jt.nnx.LWSHead))
    scaled, mask = decoupling.lws(params, head="head")
    assert jax.tree.structure(scaled) == jax.tree.structure(like) == jax.tree.structure(mask)
    close(second(scaled, state, X, train=False)[0], first(params, state, X, train=False)[0], 1e-6)
    third, like, _ = jt.nnx.functional(Net(jt.nnx.DisAlignHead))
    aligned, _ = decoupling.disalign(params, head="head")
    assert jax.tree.structure(aligned) == jax.tree.structure(like)
    close(third(aligned, state, X, train=False)[0], first(params, state, X, train=False)[0], 1e-6)


def test_convert_puts_a_head_in_the_place_of_a_linear_layer():
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 5, rngs=nnx.Rngs(1)))
    model.layers[1].bias[...] = jnp.arange(5.0)
    convert = functools.partial(jt.nnx.convert, model, rngs=nnx.Rngs(2))
    for kind in (jt.nnx.LWSHead, jt.nnx.DisAlignHead):
        new = convert({r"layers/1": kind})
        assert type(new.layers[1]) is kind and type(new.layers[0]) is nnx.Linear
        close(new(X), model(X), 1e-6)
    fresh = convert({r"layers/1": functools.partial(jt.nnx.NormedHead, s=2.0)}, init="fresh")
    assert np.abs(fresh(X)).max() <= 2 and fresh.layers[1].kernel.shape == (6, 5)
    for target, message in (
        (jt.nnx.NormedHead, "init='fresh'"),
        (functools.partial(jt.nnx.DisAlignHead, compat="reference"), "another function"),
        (functools.partial(jt.nnx.LWSHead, use_bias=False), "needs the bias"),
    ):
        with pytest.raises(ValueError, match=message):
            convert({r"layers/1": target})


def test_ldam_on_a_normed_head_trains_without_a_warning():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jt.linen.NormedHead(3)(nn.Dense(6)(x))

    net, y = Net(), np.array([[0, 1], [2, 0], [1, 1]])
    params = net.init(jax.random.key(0), X)["params"]
    loss = longtail.ldam([50, 10, 3])
    value, grads = jax.value_and_grad(lambda p: loss(net.apply({"params": p}, 100 * X), y).mean())(
        params
    )
    heads.check_normed(net.apply({"params": params}, X))
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    loss(net.apply({"params": params}, 100 * X), y)


@pytest.mark.parametrize("kind", ["NormedHead", "LWSHead", "DisAlignHead", "CausalHead"])
def test_heads_are_equivariant_to_the_order_of_the_classes(kind):
    model = getattr(jt.nnx, kind)(8, 5, rngs=nnx.Rngs(0))
    apply, params, state = jt.nnx.functional(model)
    draw = np.random.default_rng(4).normal
    params = jax.tree.map(lambda p: draw(size=p.shape).astype(np.float32), params)
    order = np.array([3, 1, 4, 0, 2])
    moved = {k: p[..., order] if p.shape[-1] == 5 else p for k, p in params.items()}
    y, _ = apply(params, state, X, train=True)
    close(apply(moved, state, X, train=True)[0], y[..., order], 1e-6)
