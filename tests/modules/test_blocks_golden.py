"""The blocks of jt.nnx against the reference implementations: training, gradients, evaluation, fusion."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jaxtricks import _tree

NORM = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, use_fast_variance=False)

# our path -> the reference's name, of each normalization and of each kernel


def repvgg_names(m):
    names = {"square": "rbr_dense", "point": "rbr_1x1"}
    norms = {f"{ours}/norm": f"{theirs}.bn" for ours, theirs in names.items()}
    if m["identity"]:
        norms["identity/norm"] = "rbr_identity"
    return norms, {f"{ours}/conv": f"{theirs}.conv" for ours, theirs in names.items()}


def dbb_names(m):
    depthwise = m["g"] == m["o"]
    norms = {
        "square/norm": "dbb_origin.bn",
        "pool/norm": "dbb_avg.avgbn",
        "sequence/first/norm": "dbb_1x1_kxk.bn1.bn",
        "sequence/norm": "dbb_1x1_kxk.bn2",
    }
    first = "conv1" if depthwise or "internal" in m else "idconv1"
    kernels = {
        "square/conv": "dbb_origin.conv",
        "sequence/first/conv": f"dbb_1x1_kxk.{first}",
        "sequence/conv": "dbb_1x1_kxk.conv2",
    }
    if not depthwise:
        norms |= {"point/norm": "dbb_1x1.bn", "pool/first/norm": "dbb_avg.bn.bn"}
        kernels |= {"point/conv": "dbb_1x1.conv", "pool/first/conv": "dbb_avg.conv"}
    return norms, kernels


def mobileone_names(m):
    names = {f"square_{i}": f"conv_kxk.{i}" for i in range(m["nb"])}
    if m["k"] > 1:
        names["point"] = "conv_scale"
    norms = {f"{ours}/norm": f"{theirs}.bn" for ours, theirs in names.items()}
    if m["identity"]:
        norms["identity/norm"] = "identity"
    return norms, {f"{ours}/conv": f"{theirs}.conv" for ours, theirs in names.items()}


def unireplknet_names(m):
    norms, kernels = {"large/norm": "origin_bn"}, {"large/conv": "lk_origin"}
    for i, (k, d) in enumerate(zip(m["kernel_sizes"], m["dilates"], strict=True)):
        norms[f"dilated_{i}/norm"] = f"dil_bn_k{k}_{d}"
        kernels[f"dilated_{i}/conv"] = f"dil_conv_k{k}_{d}"
    return norms, kernels


NAMES = {
    "repvgg": repvgg_names,
    "dbb": dbb_names,
    "mobileone_timm": mobileone_names,
    "unireplknet": unireplknet_names,
}
MAKE = {
    "repvgg": lambda m: jt.nnx.RepVGGBlock,
    "dbb": lambda m: functools.partial(
        jt.nnx.DiverseBranchBlock, internal_features=m.get("internal")
    ),
    "mobileone_timm": lambda m: functools.partial(jt.nnx.MobileOneBlock, num_branches=m["nb"]),
    "unireplknet": lambda m: jt.nnx.DilatedReparamBlock,
}
CASES = [
    *(("repvgg", f"case{i:02d}") for i in (0, 2, 3, 4, 5)),
    *(("dbb", f"case{i:02d}") for i in (0, 1, 2, 4, 5)),
    *(("mobileone_timm", f"case{i:02d}") for i in (0, 1, 2)),
    *(("unireplknet", f"case{i:02d}") for i in (0, 1)),
]


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(value)
    return tree


def params_of(g, names, prefix):
    norms, kernels = names
    flat = {f"{ours}/kernel": g[f"{prefix}{theirs}.weight"] for ours, theirs in kernels.items()}
    for ours, theirs in norms.items():
        flat[f"{ours}/scale"] = g[f"{prefix}{theirs}.weight"]
        flat[f"{ours}/bias"] = g[f"{prefix}{theirs}.bias"]
    return nested(flat)


def state_of(g, names, prefix):
    flat = {}
    for ours, theirs in names[0].items():
        flat[f"{ours}/mean"] = g[f"{prefix}{theirs}.running_mean"]
        flat[f"{ours}/var"] = g[f"{prefix}{theirs}.running_var"]
    return nested(flat)


def before_step(g, names, old, new):
    """The running statistics from which a step with the biased variance ends at torch's.

    torch's running variance is the unbiased one, n / (n - 1) times the biased; a border that is made of
    running statistics shows it in outputs too.
    """
    state = state_of(g, names, old)
    for (path, theirs), (_, start) in zip(
        _tree.leaves_with_paths(state_of(g, names, new)),
        _tree.leaves_with_paths(state),
        strict=True,
    ):
        if path.endswith("var"):
            # The 1x1 convolutions in front see the whole input, the others give the output's size.
            source = "x" if "/first/" in path else "y"
            n = g[f"train0/{source}"][..., 0].size
            batch = (theirs - 0.9 * start) / 0.1 * (n - 1) / n
            *parents, last = path.split("/")
            functools.reduce(dict.__getitem__, parents, state)[last] = (theirs - 0.1 * batch) / 0.9
    return state


def close(actual, expected, tol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


def same_paths(a, b):
    assert [p for p, _ in _tree.leaves_with_paths(a)] == [p for p, _ in _tree.leaves_with_paths(b)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_block_equals_reference_code(golden, name, case):
    arrays, meta = golden(name)
    g = {k[len(case) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{case}/")}
    m = meta["cases"][case]
    names = NAMES[name](m)
    block = MAKE[name](m)(
        m["i"],
        m["o"],
        (m["k"], m["k"]),
        m["s"],
        padding=m["p"],
        feature_group_count=m["g"],
        norm=NORM,
        rngs=nnx.Rngs(0),
    )
    apply, params, state = jt.nnx.functional(block)
    start = state_of(g, names, "init/")
    same_paths(params, params_of(g, names, "init/"))
    same_paths(state, start)
    params, state = params_of(g, names, "init/"), start
    relu = jax.nn.relu if m.get("relu") else lambda y: y

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, state, x, train):
        y, new = apply(params, state, x, train=train)
        return relu(y), new

    def evaluated(state, stage):
        close(run(params, state, g[f"{stage}/x"], False)[0], g[f"{stage}/y_eval"], 3e-6)
        fill(block, params, state)
        conv = block.fused()
        close(conv.kernel[...], g[f"{stage}/fused_kernel"], 1e-6)
        close(conv.bias[...], g[f"{stage}/fused_bias"], 2e-6)
        close(relu(conv(g[f"{stage}/x"])), g[f"{stage}/y_deploy"], 3e-6)

    evaluated(start, "eval0")
    weights = jnp.asarray(g["train0/cot"])
    first = before_step(g, names, "init/", "train0/")
    loss = lambda p, x: jnp.sum(run(p, first, x, True)[0] * weights)
    dparams, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(g["train0/x"]))
    close(dx, g["train0/dx"], 2e-5)
    expected = dict(_tree.leaves_with_paths(params_of(g, names, "train0/grad/")))
    for path, gradient in _tree.leaves_with_paths(dparams):
        # Normalized again after the average, the inner scale has a gradient that cancels (float64: 3e-6).
        close(gradient, expected[path], 2e-4 if path.startswith("pool") else 3e-5)
    steps = sum(f"train{t}/x" in g for t in range(3))
    for t in range(steps):
        old = f"train{t - 1}/" if t else "init/"
        state = before_step(g, names, old, f"train{t}/")
        y, state = run(params, state, g[f"train{t}/x"], True)
        close(y, g[f"train{t}/y"], 4e-6)
        jax.tree.map(lambda a, b: close(a, b, 4e-6), state, state_of(g, names, f"train{t}/"))
    evaluated(state_of(g, names, f"train{steps - 1}/"), "eval1")


def fill(block, params, state):
    """Write plain trees into a module's variables."""
    for path, value in [*_tree.leaves_with_paths(params), *_tree.leaves_with_paths(state)]:
        *parents, last = path.split("/")
        getattr(functools.reduce(getattr, parents, block), last)[...] = value


def test_whole_network_equals_reference_code(golden):
    """RepVGG's own network: blocks, relu, mean, linear; branch form and one convolution per block."""
    arrays, meta = golden("repvgg_net")
    g, m = {k[4:]: v for k, v in arrays.items()}, meta["cases"]["net"]
    x = fused = jnp.asarray(g["x"])
    for b in m["blocks"]:
        block = jt.nnx.RepVGGBlock(
            b["i"],
            b["o"],
            strides=b["stride"],
            padding=1,
            feature_group_count=b["groups"],
            norm=NORM,
            rngs=nnx.Rngs(0),
        )
        names, prefix = repvgg_names(b), f"train/{b['name']}."
        fill(block, params_of(g, names, prefix), state_of(g, names, prefix))
        block.eval()
        conv = block.fused()
        close(conv.kernel[...], g[f"deploy/{b['name']}.rbr_reparam.weight"], 1e-6)
        close(conv.bias[...], g[f"deploy/{b['name']}.rbr_reparam.bias"], 2e-6)
        x, fused = jax.nn.relu(block(x)), jax.nn.relu(conv(fused))
    head = lambda x: (
        x.mean((1, 2)) @ g["train/linear.weight"] + g["train/linear.bias"].reshape(1, -1)
    )
    close(head(x), g["logits_eval"], 3e-6)
    close(head(fused), g["logits_deploy"], 3e-6)
