"""The lab's networks: what they compute, how they start, and that they are written for every trick."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtricks import _jaxpr, _tree
from jaxtricks.lab import models

IMAGES = (8, 8, 8, 1)
SHAPE = dict(widths=(4, 8))
TEXT = dict(context=12, features=16, layers=2, heads=2)
CLASSES = 10

# name -> factory (rngs, recompute)
MODELS = {
    "resnet": lambda **how: models.ResNet(1, CLASSES, **SHAPE, **how),
    "nfnet": lambda **how: models.NFNet(1, CLASSES, **SHAPE, **how),
    "repvgg": lambda **how: models.RepVGG(1, CLASSES, **SHAPE, **how),
    "transformer": lambda **how: models.Transformer(CLASSES, **TEXT, **how),
}
every = pytest.mark.parametrize("name", sorted(MODELS))


def batch(name):
    """(inputs, labels) that can be learned: the label is in the input."""
    if name == "transformer":
        tokens = jax.random.randint(jax.random.key(0), (8, TEXT["context"]), 0, CLASSES)
        return tokens, (tokens + 1) % CLASSES
    images = jax.random.normal(jax.random.key(0), IMAGES)
    return images, jnp.arange(IMAGES[0]) % CLASSES


@functools.cache
def made(name, recompute=False):
    return jt.nnx.functional(MODELS[name](recompute=recompute, rngs=nnx.Rngs(0)))


def loss_fn(params, state, x, labels, *, apply):
    logits, state = apply(params, state, x, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses.mean(), (logits, state)


@functools.cache
def first_step(name, recompute=False):
    """((loss, (logits, state)), gradients) at the start."""
    apply, params, state = made(name, recompute)
    grad = jax.value_and_grad(functools.partial(loss_fn, apply=apply), has_aux=True)
    return jax.jit(grad)(params, state, *batch(name))


@every
def test_starts_near_chance_and_learns(name):
    apply, params, state = made(name)
    x, labels = batch(name)
    (loss, (logits, new)), grads = first_step(name)
    assert logits.shape == (*labels.shape, CLASSES)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    # Batch normalization in front of a head of unit variance is not as quiet as the others.
    slack = 0.05 if name in ("nfnet", "transformer") else 0.8
    assert abs(float(loss) - math.log(CLASSES)) < slack
    params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    after, _ = jax.jit(functools.partial(loss_fn, apply=apply))(params, state, x, labels)
    assert after < loss


@every
def test_recomputing_changes_nothing(name):
    """Outputs, statistics and gradients, up to what XLA rounds otherwise where it fuses otherwise."""
    plain, again = first_step(name), first_step(name, True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), plain, again)
    apply, params, state = made(name, True)
    closed, _ = _jaxpr.trace(functools.partial(apply, train=True), params, state, batch(name)[0])
    blocks = [e for e in closed.jaxpr.eqns if e.primitive.name.startswith("custom_vjp")]
    assert len(blocks) == BLOCKS[name]


BLOCKS = {"resnet": 2, "nfnet": 2, "repvgg": 3, "transformer": 2}


@every
def test_amp_multiplies_in_bfloat16_only(name):
    apply, params, state = made(name)
    policy = jt.amp.Policy.parse("p=f32,c=bf16,o=f32")

    def loss(params, x, labels):
        params, x = policy.cast_to_compute((params, x))
        return loss_fn(params, state, x, labels, apply=apply)[0]

    closed, _ = _jaxpr.trace(jax.grad(loss), params, *batch(name))
    products = [e for e in _jaxpr.walk(closed.jaxpr) if e.primitive.name in ("dot_general", CONV)]
    assert len(products) > 10
    for eqn in products:
        assert {str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)} == {"bfloat16"}


CONV = "conv_general_dilated"


@every
def test_roles_of_every_kernel(name):
    model = MODELS[name](rngs=nnx.Rngs(0))
    rule = jt.nnx.roles(model)
    params = made(name)[1]
    for path, leaf in _tree.leaves_with_paths(params):
        if path.endswith("skip_gain"):
            assert leaf.shape == ()  # a scalar needs no roles
        elif jt.roles.is_kernel(path, leaf.shape):
            assert rule(path, leaf.shape) == ("in",) * (leaf.ndim - 1) + ("out",)
        else:
            assert rule(path, leaf.shape) == ("none",)
    assert "head/kernel" in dict(_tree.leaves_with_paths(params))


# ---- NFNet


def test_nfnet_has_no_normalization_and_no_state():
    apply, params, state = made("nfnet")
    assert state == {}
    assert not any("norm" in path for path, _ in _tree.leaves_with_paths(params))
    x = batch("nfnet")[0]
    (alone, _), (together, _) = (apply(params, state, v, train=True) for v in (x[:1], x))
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)  # no example sees another
    np.testing.assert_array_equal(together, apply(params, state, x, train=False)[0])


def test_nfnet_keeps_the_variance():
    """With its branches on, every block receives the variance that its beta expects."""
    model = models.NFNet(16, 4, widths=(32, 32), blocks=2, alpha=0.5, rngs=nnx.Rngs(0))
    x = model.stem(jax.random.normal(jax.random.key(1), (16, 16, 16, 16)))
    for block in model.blocks:
        assert float(jnp.var(x)) == pytest.approx(block.beta**-2, rel=0.3)
        block.skip_gain[...] = jnp.ones(())
        x = nnx.jit(block)(x)


def test_nfnet_starts_as_its_shortcuts():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    model = models.NFNet(1, 3, widths=(4,), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.blocks[0](x), x)
    assert math.isclose(model.act.gain, math.sqrt(2 / (1 - 1 / math.pi)))


# ---- RepVGG


def test_repvgg_fused_is_a_copy_of_plain_convolutions():
    model = MODELS["repvgg"](rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), IMAGES)
    for _ in range(3):
        model(images)
    model.eval()
    fused, _ = jt.nnx.fuse(model)
    assert [type(layer.block) for layer in fused.layers] == [nnx.Conv] * 3
    assert all(type(layer.block) is jt.nnx.RepVGGBlock for layer in model.layers)
    np.testing.assert_allclose(fused(images), model(images), atol=2e-5)
    counts = _jaxpr.census(fused, images)
    assert sum(n for (primitive, _), n in counts.items() if primitive == CONV) == 3
    assert len(jax.tree.leaves(nnx.state(fused, nnx.Param))) == 3 * 2 + 2


# ---- transformer


def test_no_logit_depends_on_a_later_token():
    apply, params, state = made("transformer")
    run = jax.jit(functools.partial(apply, train=False))
    tokens = batch("transformer")[0]
    before = run(params, state, tokens)[0]
    for t in (1, 6, 11):
        after = run(params, state, tokens.at[:, t].add(1) % CLASSES)[0]
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert np.abs(before[:, t:] - after[:, t:]).max((0, 2)).min() > 0
    short = apply(params, state, tokens[:, :5], train=False)[0]
    np.testing.assert_allclose(short, before[:, :5], atol=1e-6)


def test_attention_is_jaxs():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 8))
    ours = models.transformer.causal_attention(q, k, v)
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_transformer_names_what_does_not_fit():
    with pytest.raises(ValueError, match="3 `heads`"):
        models.Transformer(5, features=16, heads=3, rngs=nnx.Rngs(0))
    model = models.Transformer(5, **TEXT, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="13 tokens"):
        model(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.slow
def test_nfnet_stochastic_depth():
    """Rates rise linearly; branches drop in training alone, by key; it learns, and keeps no statistics."""
    model = models.NFNet(1, CLASSES, **SHAPE, blocks=2, drop_rate=0.4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose([block.rate for block in model.blocks], [0, 0.1, 0.2, 0.3])
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    for block in model.blocks:
        block.skip_gain[...] = jnp.ones(())
    apply, params, state = jt.nnx.functional(model)
    x, labels = batch("nfnet")
    run = jax.jit(functools.partial(apply, train=True))
    draws = [run(params, state, x, key=jax.random.key(seed))[0] for seed in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert any(np.abs(draws[0] - other).max() > 1e-4 for other in draws[2:])
    evaluated = jax.jit(functools.partial(apply, train=False))(params, state, x)[0]
    plain = models.NFNet(1, CLASSES, **SHAPE, blocks=2, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(evaluated, plain(x), atol=1e-6)
    with pytest.raises(ValueError, match="key"):
        apply(params, state, x, train=True)
    again = models.NFNet(
        1, CLASSES, **SHAPE, blocks=2, drop_rate=0.4, recompute=True, rngs=nnx.Rngs(0)
    )
    rerun = jt.nnx.functional(again)[0]
    np.testing.assert_allclose(
        rerun(params, state, x, train=True, key=jax.random.key(0))[0], draws[0], atol=1e-6
    )
    with pytest.raises(ValueError, match="drop_rate"):
        models.NFNet(1, CLASSES, drop_rate=1.5, rngs=nnx.Rngs(0))

    def loss(params, state, key):
        logits, state = apply(params, state, x, train=True, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), state

    tx = optax.adam(1e-2)

    @jax.jit
    def step(carry, key):
        params, state, opt = carry
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, key)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), state, opt), value

    carry = params, state, tx.init(params)
    _, values = jax.lax.scan(step, carry, jax.random.split(jax.random.key(4), 60))
    assert values[-10:].mean() < 0.5 * values[:10].mean()


@pytest.mark.parametrize(
    ("name", "inwards"),
    [
        ("resnet", "stages/0/second/conv/kernel"),
        ("nfnet", "blocks/0/second/kernel"),
        ("repvgg", None),
        ("transformer", "blocks/0/contract/kernel"),
    ],
)
def test_classes_declare_how_kernels_are_split(name, inwards):
    model = MODELS[name](rngs=nnx.Rngs(0))
    axes = models.split_axes(model, jt.nnx.roles(model))
    _, params, _ = jt.nnx.functional(model)
    kernels = {p: x.shape for p, x in _tree.by_path(params).items() if p.endswith("kernel")}
    assert axes("head/kernel", kernels["head/kernel"]) == []
    for path, shape in kernels.items():
        if path == inwards:
            assert len(shape) - 1 not in axes(path, shape) and axes(path, shape)
        elif not path.startswith("head/") and inwards is None:
            assert axes(path, shape) == [len(shape) - 1]
    assert inwards is None or inwards in kernels
    assert models.declared_paths(model, "unsplit") == ("head",)
