"""The seed, line by line: what each of its ten snippets does, and each reference it links, by our one line.

The seed is the list of ten TensorFlow and Keras techniques that this project grew from. A row is our line,
word for word that of README.zh-CN.md, and how it is run beside arrays that the seed's code or the linked
reference left in tests/golden (or beside a literal, where the snippet is plain arithmetic).
"""

import contextlib
import functools
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtricks import _compat, amp

from tests.modules.test_blocks_golden import dbb_names, fill, params_of, repvgg_names, state_of
from tests.rooms.test_agc import arrays_of
from tests.rooms.test_ebn import part
from tests.rooms.test_memopt import as_roles, deviation
from tests.rooms.test_weightstd import value_and_gradients

PAGE = (pathlib.Path(__file__).parents[2] / "README.zh-CN.md").read_text(encoding="utf-8")
HEADINGS = [
    "数据回流",
    "自动精度混合",
    "优化器节省显存",
    "权重标准化",
    "自适应梯度裁剪",
    "重计算",
    "归一化",
    "学习率策略",
    "重参数化",
    "长尾学习",
]


class Row(NamedTuple):
    """Our line, an expression as a reader would write it, and check(ours, golden).

    `ours` gives the line's value for the names in it; check runs that value and gives (own result, the
    seed's, tolerance) of everything compared.
    """

    line: str
    check: Callable[..., list[tuple[Any, Any, float]]]


def close(actual, expected, tol):
    """tol is relative to the largest entry; zero is to the bit."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    atol = tol * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# --- how a line is run beside what the seed or its reference left ----------------------------------------


def copies(ours, golden):
    """flat_map(from_tensors(t).repeat(2)): each element twice, in a row."""
    return [(list(ours(source=range(5))), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 0)]


def repeated_batch(ours, golden):
    """Echoed behind `batch`: two steps of SGD (rate 0.25, loss w^2 / 2 - w x) from one batch x = 4."""
    step = lambda w, x: (w - 0.25 * (w - x), w)
    w, seen = ours(step=step)(jnp.asarray(0.0), jnp.asarray(4.0), 0, jax.random.key(0))
    return [(w, 1.75, 0), (seen, [0.0, 1.0], 0)]


def lowered(ours, golden):
    """mixed_float16: a Dense layer's operands and result are float16, its variables stay float32."""
    x, w = jnp.asarray([[1 / 3], [2 / 3], [1.0]]), jnp.asarray([[0.1, 0.3]])
    forward = ours(forward=lambda w: x @ w)
    y, pull = jax.vjp(forward, w)
    (dw,) = pull(jnp.ones_like(y))
    assert y.dtype == jnp.float16 and dw.dtype == w.dtype == jnp.float32
    expected = [[0.033325195, 0.099975586], [0.06665039, 0.19995117], [0.099975586, 0.30004883]]
    return [(y, np.float16(expected), 0)]


def loss_scales(ours, golden):
    """Keras' LossScaleOptimizer: doubled by the 2000th good step in a row, halved by one that overflows."""
    tx = ours(tx=optax.sgd(0.1))
    good = np.ones(6003, bool)
    good[[2000, 4002, 4003]] = False

    def step(carry, good):
        w, state = carry
        grad = jnp.where(good, amp.loss_scale(state), jnp.inf)
        updates, state = tx.update(grad, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, amp.loss_scale(state))

    w = jnp.asarray(0.0)
    _, (path, scales) = jax.jit(lambda c: jax.lax.scan(step, c, good))((w, tx.init(w)))
    at = np.array([0, 1998, 1999, 2000, 3999, 4000, 4001, 4002, 4003, 6002])
    expected = 2.0 ** np.array([15, 15, 16, 15, 15, 16, 16, 15, 14, 14])
    stays = [path[t] - path[t - 1] for t in (2000, 4002, 4003)]
    return [(scales[at], expected, 0), (stays, [0, 0, 0], 0), (path[0], -0.1, 1e-6)]


def trajectory(file, setting, dtype=np.float64):
    """Parameters along the reference optimizer's steps; deviation gives shares of what is allowed."""

    def check(ours, golden):
        arrays, meta = golden(file)
        names = {"roles": as_roles(meta.get("factor_rule"))}
        with _compat.enable_x64() if dtype == np.float64 else contextlib.nullcontext():
            errors, _ = deviation((arrays, meta), setting, ours(**names), dtype)
        assert max(errors.values()) <= 1, errors
        return []

    return check


def clipped(ours, golden):
    arrays, meta = golden("agc")
    names = [n for n, steps in meta["steps"].items() if 0 in steps]
    with _compat.enable_x64():
        params, grads = arrays_of(arrays, "param", names), arrays_of(arrays, "grad", names, 0)
        tx = ours()
        got = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])(grads)
    wants = {n: arrays[f"clipped/clip0.01_eps1e-3/{n}"][meta["steps"][n].index(0)] for n in names}
    return [(got[n], wants[n], 1e-10) for n in names]


def conv_layer(ours, golden):
    """The layer and its gradients, for ordinary kernels and for ones so small that eps decides.

    The reference adds a bias of its own, which the seed's layer has not.
    """
    arrays, rows = golden("wsconv_haiku")[0], []
    apply, params, state = jt.nnx.functional(ours(rngs=nnx.Rngs(0)))
    assert sorted(params) == ["gain", "kernel"]

    @jax.jit
    def run(w, gain, x, cot):
        layer = lambda w, gain, x: apply({"kernel": w, "gain": gain}, state, x, train=True)[0]
        y, pull = jax.vjp(layer, w, gain, x)
        return y, pull(cot)

    for case, tol in (("case00", 2e-6), ("case08", 1e-5)):
        g = part(arrays, case)
        y, grads = run(g["w"], g["gain"], g["x"], g["cot"])
        rows.append((y + g["bias"].reshape(1, 1, 1, -1), g["y"], tol))
        rows += ((d, g[k], 10 * tol) for k, d in zip(("dw", "dgain", "dx"), grads, strict=True))
    return rows


def timm_kernel(ours, golden):
    g = part(golden("wsconv_timm")[0], "case00")
    standardize = lambda kernel, gain: ours(kernel=kernel, gain=gain)
    run = functools.partial(value_and_gradients, standardize=standardize)
    y, grads = jax.jit(lambda g: run(g, window_strides=(1, 1), padding=[(1, 1), (1, 1)]))(g)
    return [(y, g["y"], 2e-6), *((grads[k], g[k], 3e-5) for k in ("dx", "dw", "dgain"))]


def penalty(ours, golden):
    """kernel_regularizer=l2(1e-4): 1e-4 times the sum of squares, of the raw kernel alone."""
    params = {"conv": {"kernel": jnp.arange(1.0, 5.0).reshape(1, 1, 2, 2), "gain": jnp.ones(2)}}
    value, grads = jax.value_and_grad(lambda p: ours(params=p))(params)
    conv = grads["conv"]
    return [
        (value, 30e-4, 1e-6),
        (conv["kernel"].ravel(), [2e-4, 4e-4, 6e-4, 8e-4], 1e-6),
        (conv["gain"], [0, 0], 0),
    ]


def recomputed(ours, golden):
    """The gradient of sin(x^2) weighed by 1, 2, 3, in float64 by hand, and that fn ran twice."""
    calls = []

    def fn(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(x * x)

    weights = jnp.asarray([1.0, 2.0, 3.0])
    grad = jax.jit(jax.grad(lambda x: jnp.sum(weights * ours(fn=fn)(x))))
    got = grad(jnp.asarray([0.5, 1.0, 2.0]))
    jax.effects_barrier()
    return [
        (got, [0.9689124217106447, 2.1612092234725595, -7.843723450363345], 1e-6),
        (len(calls), 2, 0),
    ]


def same_mask(ours, golden):
    """RecomputeContext: dropout draws in the second pass what it drew in the first. y = x * mask is y' x."""

    def dropout(x, key):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    x, key = jnp.arange(1.0, 65.0), jax.random.key(3)
    y, pull = jax.vjp(lambda x: ours(fn=dropout)(x, key), x)
    (mask,) = pull(jnp.ones_like(x))
    assert 16 < mask.sum() < 48
    return [(mask * x, y, 0)]


def batch_norm(ours, golden):
    """Three steps of the Keras layer with its defaults: values, running statistics, first gradients."""
    g = part(golden("ebn_keras")[0], "case00")
    norm = ours(rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.asarray(g["init/moving_mean"])
    apply, _, state = jt.nnx.functional(norm)
    params = {"scale": jnp.asarray(g["init/gamma"]), "bias": jnp.asarray(g["init/beta"])}
    run = jax.jit(functools.partial(apply, train=True))
    x = jnp.asarray(g["train0/x"])
    layer = lambda p, x: run(p, state, x)[0]
    grads, dx = jax.jit(lambda p, x, cot: jax.vjp(layer, p, x)[1](cot))(params, x, g["train0/cot"])
    rows = [
        (grads["scale"], g["train0/dgamma"], 2e-5),
        (grads["bias"], g["train0/dbeta"], 2e-5),
        (dx, g["train0/dx"], 8e-5),
    ]
    for t in range(3):
        y, state = run(params, state, g[f"train{t}/x"])
        rows.append((y, g[f"train{t}/y"], 1e-5))
    # Keras keeps one variance a channel; what it started from decays, the rest is shared.
    shared = g["train2/moving_variance"] - 0.99**3 * g["init/moving_variance"]
    own = np.full(shared.shape, state["var"] - 0.99**3)
    return [*rows, (state["mean"], g["train2/moving_mean"], 1e-5), (own, shared, 1e-3)]


def rates(file, setting, every=1):
    """The learning rate in force at each step; `every` where the golden cycle is that much shorter."""

    def check(ours, golden):
        with _compat.enable_x64():
            expected = golden(file)[0][f"lr/{setting}"]
            return [(ours()(every * jnp.arange(len(expected))), expected, 1e-12)]

    return check


def acb_names(m):
    lines = {"square": "square", "vertical": "ver", "horizontal": "hor"}
    norms = {f"{ours}/norm": f"{theirs}_bn" for ours, theirs in lines.items()}
    return norms, {f"{ours}/conv": f"{theirs}_conv" for ours, theirs in lines.items()}


def branches(file, names_of, train):
    """Case 0 of a block, with Flax's default normalization: evaluation, fusion, and a step of training.

    (DBB's border in training is made of running statistics, which torch keeps at another rate:
    test_blocks_golden.py has that.)
    """

    def check(ours, golden):
        arrays, meta = golden(file)
        g, names = part(arrays, "case00"), names_of(meta["cases"]["case00"])
        block = ours(rngs=nnx.Rngs(0))
        params, state = params_of(g, names, "init/"), state_of(g, names, "init/")
        rows = []
        if train:
            apply, _, _ = jt.nnx.functional(block)
            y, _ = jax.jit(functools.partial(apply, train=True))(params, state, g["train0/x"])
            rows.append((y, g["train0/y"], 4e-6))
        fill(block, params, state)
        block.eval()

        @nnx.jit
        def evaluated(block, x):
            conv = block.fused()
            return block(x), conv.kernel[...], conv.bias[...], conv(x)

        wants = {"y_eval": 3e-6, "fused_kernel": 1e-6, "fused_bias": 2e-6, "y_deploy": 3e-6}
        got = zip(evaluated(block, g["eval0/x"]), wants.items(), strict=True)
        return [*rows, *((own, g[f"eval0/{name}"], tol) for own, (name, tol) in got)]

    return check


def loss(archive, key, at=None, logits=None, injected=()):
    """Mean loss and its gradient by the logits, in float32. Inputs lie at `at`, by default the key's file."""
    file, setting = key.split("/")

    def check(ours, golden):
        arrays, _ = golden(archive)
        get = lambda name: arrays[f"{at or file}/a__{name}"]
        z = arrays[f"{file}/a__{logits}"] if logits else get("logits")
        extra, draws = {}, contextlib.nullcontext()
        if "features" in injected:
            extra["features"] = get("feature_l1")
        if "uniform" in injected:  # what the reference drew
            extra["key"] = jax.random.key(0)
            less = lambda key, p, shape: get("uniform") < p
            draws = mock.patch.object(jax.random, "bernoulli", less)
        with draws:
            criterion, y = ours(counts=get("counts")), get("labels").astype(np.int32)
            mean = lambda z: criterion(z, y, **extra).mean()
            value, grad = jax.jit(jax.value_and_grad(mean))(z)
        want = f"{file}/a__{setting}__"
        return [(value, arrays[f"{want}loss"], 2e-6), (grad, arrays[f"{want}grad"], 5e-6)]

    return check


first = functools.partial(loss, "longtail", at="shared")
more = functools.partial(loss, "longtail_more")


def vector(archive, want, tol=1e-6, **inputs):
    """One call of arrays of the archive."""

    def check(ours, golden):
        arrays, _ = golden(archive)
        got = ours(**{name: arrays[key] for name, key in inputs.items()})
        return [(got, arrays[want], tol)]

    return check


def deferred(ours, golden):
    arrays, _ = golden("longtail_more")
    of = lambda name: arrays[f"drw/cifar10_lt100__{name}"]
    ones, wants = np.ones(10, np.float32), of("drw__w")
    got = [
        ours(epoch=epoch, ones=ones, counts=of("counts")) for epoch in map(int, of("drw__epochs"))
    ]
    assert len({float(w[-1]) for w in wants}) > 1
    return [(np.stack(got), wants, 1e-6)]


def scaled_rows(ours, golden):
    arrays, _ = golden("longtail_more")
    kernel = arrays["heads/a__W"].T.copy()
    return [(ours(kernel=kernel), arrays["heads/a__tau_norm_1.0__W"].T, 2e-6)]


# --- the table -------------------------------------------------------------------------------------------

CLASS_PROB = "samplers/a__bagoftricks_class_prob__balanced"
ROWS = {
    "数据回流-example": Row('jt.echo.echo(source, 2, schedule="adjacent")', copies),
    "数据回流-batch": Row("jt.echo.echo_step(step, 2)", repeated_batch),
    "自动精度混合-policy": Row('jt.amp.autocast(forward, "p=f32,c=f16,o=f16")', lowered),
    "自动精度混合-loss_scale": Row("jt.amp.dynamic_loss_scale(tx)", loss_scales),
    "优化器节省显存-Adafactor": Row(
        "jt.memopt.adafactor()", trajectory("adafactor_mesh", "defaults")
    ),
    "优化器节省显存-HF": Row(
        'jt.memopt.adafactor(**jt.memopt.PRESETS["hf"])', trajectory("adafactor_hf", "defaults")
    ),
    "优化器节省显存-T5X": Row(
        "jt.memopt.adafactor(0.01, roles=roles, min_dim_size_to_factor=4)",
        trajectory("adafactor_t5x", "lr0.01", np.float32),
    ),
    "优化器节省显存-SM3": Row("jt.memopt.sm3(0.1, momentum=0.9)", trajectory("sm3", "m0.9_lr0.1")),
    "权重标准化-WSConv2D": Row("jt.nnx.WSConv(3, 5, (3, 3), rngs=rngs)", conv_layer),
    "权重标准化-timm": Row('jt.weightstd.standardize(kernel, gain, preset="timm")', timm_kernel),
    "权重标准化-L2": Row("jt.weightstd.l2(params)", penalty),
    "自适应梯度裁剪-NFNets": Row("jt.agc.adaptive_grad_clip()", clipped),
    "重计算-recompute_grad": Row("jt.remat.recompute_grad(fn)", recomputed),
    "重计算-dropout": Row("jt.remat.recompute_grad(fn)", same_mask),
    "归一化-EBN": Row("jt.nnx.ExtendedBatchNorm(3, rngs=rngs)", batch_norm),
    "学习率策略-triangular": Row(
        "jt.cyclical.cyclical()", rates("clr_keras", "triangular", every=100)
    ),
    "学习率策略-triangular2": Row(
        'jt.cyclical.cyclical(mode="triangular2")', rates("clr_keras", "triangular2", every=100)
    ),
    "学习率策略-exp_range": Row(
        'jt.cyclical.cyclical(step_size_up=20, mode="exp_range", gamma=0.99994)',
        rates("clr_keras", "exp_range"),
    ),
    "学习率策略-torch": Row(
        "jt.cyclical.cyclical(0.01, 0.1, 15, 25)", rates("clr_torch", "cyclic_triangular_asym")
    ),
    "重参数化-ACNet": Row(
        "jt.nnx.ACBlock(4, 6, (3, 3), rngs=rngs)", branches("acb", acb_names, train=True)
    ),
    "重参数化-RepVGG": Row(
        "jt.nnx.RepVGGBlock(6, 6, rngs=rngs)", branches("repvgg", repvgg_names, train=True)
    ),
    "重参数化-DBB": Row(
        "jt.nnx.DiverseBranchBlock(4, 6, (3, 3), rngs=rngs)",
        branches("dbb", dbb_names, train=False),
    ),
    "长尾学习-BalancedSoftmax": Row(
        "jt.longtail.balanced_softmax(counts)", first("balanced_softmax/mean")
    ),
    "长尾学习-LDAM": Row(
        "jt.longtail.ldam(counts)", first("ldam/m0.5_s30_w_none", logits="cos_logits")
    ),
    "长尾学习-DRW": Row(
        "jt.longtail.weights.deferred(epoch, 160, ones, jt.longtail.weights.effective_number(counts))",
        deferred,
    ),
    "长尾学习-ClassBalanced": Row(
        "jt.longtail.class_balanced(counts)",
        first("tf_logit_adjustment_cb/cb_softmax_beta0.9999_gamma0.0"),
    ),
    "长尾学习-Focal": Row("jt.longtail.focal(1.0)", first("focal/softmax_gamma1.0_w_none")),
    "长尾学习-LogitAdjust": Row(
        "jt.longtail.logit_adjusted(counts)", first("tf_logit_adjustment_cb/la_tau1.0")
    ),
    "长尾学习-posthoc": Row(
        "jt.longtail.posthoc.adjust(logits, counts)",
        vector(
            "longtail",
            "tf_logit_adjustment_cb/a__posthoc_tau1.0__logits",
            logits="shared/a__logits",
            counts="shared/a__counts",
        ),
    ),
    "长尾学习-VS": Row("jt.longtail.vs(counts)", first("vs_la_cdt/vs_g0.3_t1.0_w_none")),
    "长尾学习-CDT": Row("jt.longtail.cdt(counts, 0.2)", first("vs_la_cdt/bot_cdt_g0.2")),
    "长尾学习-LADE": Row("jt.longtail.lade(counts)", more("lade/total_lambda0.01_alpha0.1")),
    "长尾学习-Equalization": Row(
        "jt.longtail.equalization(counts, threshold=0.005)",
        more("equalization/softmax_gamma0.9_lambda0.005", injected=("uniform",)),
    ),
    "长尾学习-Seesaw": Row("jt.longtail.seesaw(counts)", more("seesaw/p0.8_q2.0")),
    "长尾学习-MiSLAS": Row(
        "jt.longtail.label_aware_smoothing(counts)", more("smoothing/concave_h0.4_t0.1")
    ),
    "长尾学习-IB": Row(
        "jt.longtail.influence_balanced()",
        more("influence/ib_alpha1000_w_none", logits="logits_used", injected=("features",)),
    ),
    "长尾学习-RIDE": Row(
        "jt.longtail.experts.ride()", loss("longtail_experts", "experts/ride_ce", logits="experts")
    ),
    "长尾学习-sampling": Row(
        "jt.longtail.sampling.class_probabilities(counts)",
        vector("longtail", CLASS_PROB, counts="samplers/a__counts"),
    ),
    "长尾学习-tau_norm": Row("jt.longtail.heads.tau_normalize(kernel, 1.0)", scaled_rows),
}


@pytest.mark.parametrize("name", ROWS)
def test_our_line_does_what_the_seed_does(name, golden):
    line, check = ROWS[name]
    ours = lambda **names: eval(line, {"jt": jt, **names})
    rows = check(ours, golden)
    for actual, expected, tol in rows:
        close(actual, expected, tol)


# --- defaults --------------------------------------------------------------------------------------------

SAME = {
    "jt.amp.dynamic_loss_scale": dict(
        init=2**15, growth_interval=2000, growth=2, backoff=0.5, min_scale=1
    ),
    "jt.memopt.adafactor": dict(
        learning_rate=None,
        multiply_by_parameter_scale=True,
        beta1=None,
        clipping_threshold=1.0,
        factored=True,
        decay="pow",
        decay_rate=0.8,
        eps=(1e-30, 1e-3),
        min_dim_size_to_factor=128,
    ),
    "jt.nnx.WSConv.__init__": dict(strides=1, preset="nfnet", use_gain=True, use_bias=False),
    "jt.weightstd.l2": dict(scale=1e-4),
    "jt.agc.adaptive_grad_clip": dict(clipping=0.01, eps=1e-3),
    "jt.remat.recompute_grad": dict(seed=None),
    "jt.nnx.ExtendedBatchNorm.__init__": dict(
        momentum=0.99, epsilon=1e-3, use_scale=True, use_bias=True, variance="channel"
    ),
    "jt.cyclical.cyclical": dict(
        base=1e-3,
        peak=6e-3,
        step_size_up=2000,
        step_size_down=None,
        mode="triangular",
        gamma=1.0,
        scale_fn=None,
        scale_by="cycle",
    ),
    "jt.nnx.ACBlock.__init__": dict(strides=1, gamma_init=1.0),
    "nnx.BatchNorm.__init__": dict(epsilon=1e-5),  # torch's, in the blocks
    "jt.longtail.ldam": dict(max_margin=0.5, s=30),
    "jt.longtail.class_balanced": dict(beta=0.9999),
    "jt.longtail.logit_adjusted": dict(tau=1.0),
    "jt.longtail.seesaw": dict(p=0.8, q=2.0),
    "jt.longtail.label_aware_smoothing": dict(head=0.4, tail=0.1, shape="concave"),
    "jt.longtail.influence_balanced": dict(alpha=1000.0),
}
DIFFERENT = {
    # (what, argument): (the seed's, ours, why)
    ("jt.echo.echo", "schedule"): (
        "adjacent",
        "spread",
        "copies side by side fall into one batch, which then has fewer different examples",
    ),
    ("jt.amp.autocast", "policy"): (
        "p=f32,c=f16,o=f16",
        "p=f32,c=bf16,o=f32",
        "bfloat16 has the range of float32, so it needs no loss scale, and TPUs multiply in it",
    ),
    ("jt.memopt.adafactor", "clip_per_slice"): (
        False,
        True,
        "layers stacked in one array step as they would apart; without stacks the two are the same",
    ),
    ("jt.memopt.sm3", "momentum"): (
        inspect.Parameter.empty,  # the reference has no default
        0.0,
        "the momentum is a whole copy of the parameters",
    ),
    ("nnx.BatchNorm.__init__", "momentum"): (
        0.9,
        0.99,
        "the blocks take Flax's default; torch's momentum of 0.1 is Flax's 0.9",
    ),
}


def default(what, argument):
    return inspect.signature(eval(what, {"jt": jt, "nnx": nnx})).parameters[argument].default


@pytest.mark.parametrize("what", SAME)
def test_our_defaults_are_the_seeds(what):
    for argument, value in SAME[what].items():
        assert default(what, argument) == value, argument


@pytest.mark.parametrize(("what", "argument"), DIFFERENT)
def test_where_our_default_differs_the_page_says_so(what, argument):
    theirs, ours, why = DIFFERENT[what, argument]
    assert default(what, argument) == ours != theirs
    assert why and f"`{argument}`" in PAGE


# --- the page --------------------------------------------------------------------------------------------


def table():
    """[(heading, seed's line, our line, differences, row id)] of README.zh-CN.md."""
    rows, heading = [], None
    for text in PAGE.splitlines():
        if text.startswith("### "):
            heading = text.removeprefix("### ").split(" ")[-1]
        elif text.startswith("| ") and text.endswith("` |"):
            rows.append((heading, *(cell.strip() for cell in text.strip("|").split(" | "))))
    return rows


def test_the_page_has_the_seeds_headings_in_its_order():
    assert list(dict.fromkeys(heading for heading, *_ in table())) == HEADINGS


def test_every_row_of_the_page_is_a_row_here_and_back():
    rows = table()
    assert [row[-1].strip("`") for row in rows] == list(ROWS)
    for heading, seeds, ours, _, name in rows:
        name = name.strip("`")
        assert name.split("-")[0] == heading and seeds
        assert ours == f"`{ROWS[name].line}`"
    assert all(len(row) == 5 for row in rows)
    assert len(re.findall("^### ", PAGE, re.MULTILINE)) == len(HEADINGS)
